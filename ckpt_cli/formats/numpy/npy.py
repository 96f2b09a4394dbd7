"""One numpy array as numpy saves it: a header, and the elements (numpy/lib/format.py, versions 1.0 to 3.0)."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_NUMPY, DType
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.plain import NoStorages
from ckpt_cli.formats.signatures import NUMPY
from ckpt_cli.model.checkpoint import Deferred, Entry, Opaque, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.pickles.tensors.arguments import COUNT_END, sizes

if TYPE_CHECKING:
    from ckpt_cli.pickles.graph import Graph
    from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

NAME, ENTRY = "npy", "array"

HEAD = 12
"""Bytes up to the end of the header's length, in any version."""

PICKLED = -1
"""In the place of an element's size: the elements are one pickle, as numpy writes an array with objects in it."""

_ALIGNMENT = 64
"""Bytes that the elements are aligned to in the file."""

_BFLOAT16 = "<V2"
"""The spelling of ml_dtypes' bfloat16 in numpy: 2 bytes that have an order, while those of its own `|V2` have none."""

_SIZED = re.compile(r"[<>|=]?(?:([biufcSaVU])(\d{1,12})|[Mm](8)(?:\[[^\]]*\])?)")
"""A dtype that says how long it is; of text in characters of 4 bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header before the elements."""

    version: int
    """The major version of its layout: 1, 2 or 3."""
    nbytes: int
    """Bytes of the header, the magic included."""
    code: str
    """The dtype as numpy spells it, such as `<f4`; of a structured one its fields."""
    dtype: DType | None
    """None where elements are no plain numbers."""
    big_endian: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int | None
    """Bytes of one element; `PICKLED` where there are objects, None where the dtype does not say."""

    @property
    def nbytes_of_elements(self) -> int:
        """Bytes of all elements, where each has a size."""
        return prod(self.shape) * (self.itemsize or 0)

    def entry(self, name: str, storage: Storage) -> Entry:
        """The array over a storage; one of objects, text or dates is a value that shows its shape and dtype."""
        if self.dtype is None:
            if text_kind(self) is not None:
                return Value(name, TextArray(self, storage))
            return Value(name, Opaque(f"numpy.ndarray(shape={self.shape}, dtype={self.code})"))
        return Tensor(name, self.dtype, self.shape, self.stride, storage, big_endian=self.big_endian)


_TEXT = re.compile(r"[<>|=]?([USa])\d{1,12}")
"""The dtypes of text in characters of 4 bytes, and of bytes."""

_TEXTS = 1 << 16
"""Texts of an array that are read to be shown."""


def text_kind(header: Header) -> str | None:
    """Return `U` or `S` for an array of text or bytes that is small enough to be shown; None for any other."""
    match = _TEXT.fullmatch(header.code)
    if match is None or header.nbytes_of_elements > limits.ITEM_BYTES:
        return None
    return None if prod(max(size, 1) for size in header.shape) > _TEXTS else "U" if match[1] == "U" else "S"


class TextArray(Deferred):
    """An array of text as nested lists of str; one of bytes as the text of such lists."""

    __slots__ = ("_header", "_storage")

    def __init__(self, header: Header, storage: Storage) -> None:
        super().__init__()
        self._header = header
        self._storage = storage

    def load(self) -> object:
        """Read the elements, each without the NULs at its end, as numpy does."""
        header = self._header
        data = bytes(self._storage.view(0, header.nbytes_of_elements))
        made = self._nested(data, header.shape, header.stride, 0)
        return made if text_kind(header) == "U" else Opaque(repr(made))

    def _nested(self, data: bytes, shape: tuple[int, ...], stride: tuple[int, ...], at: int) -> object:
        if shape:
            return [self._nested(data, shape[1:], stride[1:], at + number * stride[0]) for number in range(shape[0])]
        size = self._header.itemsize or 0
        raw = data[at * size : (at + 1) * size]
        if text_kind(self._header) != "U":
            return raw.rstrip(b"\0")
        codec = "utf-32-be" if self._header.code[0] == ">" else "utf-32-le"
        return raw.decode(codec, "replace").rstrip("\0")


def header_size(head: bytes) -> int:
    """Bytes of the header that begins with these 12 bytes; raises MalformedError where they begin none."""
    if head[:6] != NUMPY or len(head) < HEAD or head[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise MalformedError("it does not begin as a numpy array of version 1, 2 or 3")
    size = sum(text_in(head))
    if size > limits.NPY_HEADER:
        raise LimitError(f"a numpy array with a header of {size} bytes")
    return size


def text_in(head: bytes) -> tuple[int, int]:
    """The first byte of the text in the header that begins with these 12 bytes, and its bytes as they say."""
    begin = 12 if head[6:7] >= b"\2" else 10
    return begin, int.from_bytes(head[8:begin], "little")


def parse_header(data: bytes, name: str) -> Header:
    """A whole header: a Python literal, which is read as data and not run."""
    import ast

    begin, _ = text_in(data)
    try:
        fields = ast.literal_eval(data[begin:].decode("utf-8" if data[6] == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise MalformedError("the header of a numpy array is not a literal") from None
    if not isinstance(fields, dict) or not {"descr", "fortran_order", "shape"} <= fields.keys():
        raise MalformedError("the header of a numpy array lacks its dtype, order or shape")
    descr, shape = fields["descr"], sizes(name, fields["shape"])
    stride = contiguous_stride(shape[::-1])[::-1] if fields["fortran_order"] is True else contiguous_stride(shape)
    plain = isinstance(descr, str) and descr[:1] in ("<", ">", "|", "=")
    dtype = BY_NUMPY.get(descr[1:]) if plain else None
    if descr == _BFLOAT16:
        dtype = BY_NAME["bfloat16"]
    code = {"|O": "object"}.get(descr, descr) if isinstance(descr, str) else repr(descr)[:200]
    big_endian = plain and descr[0] == ">" and dtype is not None and dtype.bits > 8
    return Header(data[6], len(data), code, dtype, big_endian, shape, stride, _itemsize(descr))


def _itemsize(descr: object) -> int | None:
    """Bytes of one element of a dtype: a string, or a list of fields (numpy/lib/format.py `dtype_to_descr`)."""
    if isinstance(descr, str):
        if descr[-1:] == "O":
            return PICKLED
        match = _SIZED.fullmatch(descr)
        if match is None:
            return None
        return int(match[3] or match[2]) * (4 if match[1] == "U" else 1)
    if not isinstance(descr, list):
        return None
    sizes_of_fields = [_size_of_field(field) for field in descr]
    if PICKLED in sizes_of_fields:
        return PICKLED
    return None if None in sizes_of_fields else sum(filter(None, sizes_of_fields))


def _size_of_field(field: object) -> int | None:
    """The same of a field: its name, its dtype, and its shape if it has one."""
    if not isinstance(field, tuple) or not 2 <= len(field) <= 3:
        return None
    size = _itemsize(field[1])
    shape = field[2] if len(field) == 3 else ()
    shape = (shape,) if isinstance(shape, int) else shape
    if size is None or size == PICKLED:
        return size
    if not isinstance(shape, tuple) or not all(type(item) is int and 0 <= item < COUNT_END for item in shape):
        return None
    return prod(shape) * size if len(shape) <= limits.DIMENSIONS else None


def header_bytes(name: str, code: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of the array `name` in version 1.0; raises UnsupportedError for one that is too long."""
    raw = f"{{'descr': '{code}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    raw += b" " * (-(10 + len(raw) + 1) % _ALIGNMENT) + b"\n"
    if len(raw) > 0xFFFF:
        raise UnsupportedError(f"tensor {name!r} has too many dimensions for an array's header")
    return NUMPY + b"\1\0" + struct.pack("<H", len(raw)) + raw


def object_entries(name: str, header: Header, graph: Graph, place: PicklePlace) -> list[Entry]:
    """The entries of the array's pickle below the array's name; the array itself where nothing in it opens up.

    The pickle follows the header (numpy/lib/format.py `write_array`). Raises MalformedError for tensors that do not
    fit it.
    """
    from ckpt_cli.pickles.flatten import entries_of

    found = entries_of(graph, NoStorages("the pickle of a numpy array refers to a storage outside of it"), place=place)
    if [(type(entry), entry.name) for entry in found] == [(Value, "")]:
        return [header.entry(name, Storage(name, 0))]
    return [replace(entry, name=f"{name}.{entry.name}" if entry.name else name) for entry in found]
