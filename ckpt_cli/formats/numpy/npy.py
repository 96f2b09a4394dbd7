"""One numpy array as numpy saves it: a header, and the elements (numpy/lib/format.py, versions 1.0 to 3.0)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_NUMPY, DType
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.model.checkpoint import Entry, Opaque, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.pickles.tensors.arguments import COUNT_END, sizes

NAME, ENTRY = "npy", "array"

MAGIC = b"\x93NUMPY"

HEAD = 12
"""Bytes up to the end of the header's length, in any version."""

PICKLED = -1
"""In the place of an element's size: the elements are one pickle, as numpy writes an array with objects in it."""

_BFLOAT16 = "<V2"
"""How numpy spells bfloat16 of ml_dtypes: 2 bytes that have an order, while those of its own `|V2` have none."""

_SIZED = re.compile(r"[<>|=]?(?:([biufcSaVU])(\d{1,12})|[Mm](8)(?:\[[^\]]*\])?)")
"""A dtype that says how long it is; of text in characters of 4 bytes."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the elements."""

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
        """The array over a storage; one of objects, text or dates is a value told by its shape and dtype."""
        if self.dtype is None:
            return Value(name, Opaque(f"numpy.ndarray(shape={self.shape}, dtype={self.code})"))
        return Tensor(name, self.dtype, self.shape, self.stride, storage, big_endian=self.big_endian)


def header_size(head: bytes) -> int:
    """Bytes of the header that begins with these 12 bytes; raises MalformedError where they begin none."""
    if head[:6] != MAGIC or len(head) < HEAD or head[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise MalformedError("it does not begin as a numpy array of version 1, 2 or 3")
    begin, layout = (10, "<H") if head[6] == 1 else (12, "<I")
    size: int = begin + struct.unpack_from(layout, head, 8)[0]
    if size > limits.NPY_HEADER:
        raise LimitError(f"a numpy array with a header of {size} bytes")
    return size


def parse_header(data: bytes, name: str) -> Header:
    """A whole header: a Python literal, which is read as data and not run."""
    import ast

    start = 10 if data[6] == 1 else 12
    try:
        fields = ast.literal_eval(data[start:].decode("utf-8" if data[6] == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise MalformedError("the header of a numpy array is no literal") from None
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
