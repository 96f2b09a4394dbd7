"""One numpy array in a file: a header, and the elements (numpy/lib/format.py, versions 1.0 to 3.0).

The array has no name in the file: `ckpt` calls it `array`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NUMPY, DType
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError, about
from ckpt_cli.files.local import LocalFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.model import Checkpoint, Entry, Opaque, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.pickles.arguments import sizes
from ckpt_cli.pickles.embedded import Place

NAME, ENTRY = "npy", "array"

MAGIC = b"\x93NUMPY"

OBJECT = "object"
"""How the dtype of an array of objects is called."""

HEAD = 12
"""Bytes up to the end of the header's length, in any version."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the elements."""

    nbytes: int
    """Bytes of the header, the magic included."""
    code: str
    """The dtype as numpy spells it, such as `<f4`; of a structured one its fields."""
    dtype: DType | None
    """None where elements are no plain numbers."""
    big_endian: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]

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
    code = {"|O": OBJECT}.get(descr, descr) if isinstance(descr, str) else repr(descr)[:200]
    big_endian = plain and descr[0] == ">" and dtype is not None and dtype.bits > 8
    return Header(len(data), code, dtype, big_endian, shape, stride)


def read(file: LocalFile) -> Checkpoint:
    """Open an array: its header is read, no element is."""
    with about(file.path):
        if file.size < HEAD:
            raise TruncatedError(f"a numpy array's header is cut short: the file has {file.size} bytes")
        header = parse_header(file.read(0, header_size(file.read(0, HEAD))), ENTRY)
        dtype = header.dtype
        nbytes = dtype.nbytes(Tensor(ENTRY, dtype, header.shape).numel) if dtype else 0
        if header.nbytes + nbytes > file.size:
            raise TruncatedError(
                f"the array needs bytes {header.nbytes}–{header.nbytes + nbytes}, the file has {file.size}"
            )
        container = PlainFile(file)
        storage = container.add(Storage(ENTRY, nbytes), header.nbytes)
        entries = [header.entry(ENTRY, storage)]
        if header.code == OBJECT:
            rest = file.view(header.nbytes, file.size - header.nbytes)
            entries = object_entries(ENTRY, header, rest, Place(header.nbytes))
    version = f"numpy array, version {file.read(6, 1)[0]}.0"
    return Checkpoint(file.path, NAME, entries, container, version, top_level=[ENTRY])


def object_entries(name: str, header: Header, data: bytes | memoryview, place: Place) -> list[Entry]:
    """What is in an array of objects: a pickle follows its header (numpy/lib/format.py, `write_array`).

    Raises MalformedError where that holds something else.
    """
    from dataclasses import replace

    from ckpt_cli.pickles.entries import entries_of
    from ckpt_cli.pickles.numpy_calls import object_array
    from ckpt_cli.pickles.reader import read_pickle

    graph = read_pickle(data)
    if object_array(graph.root) is None:
        return [header.entry(name, Storage(name, 0))]
    found = entries_of(graph, _NoStorages(), place=place)
    return [replace(entry, name=f"{name}.{entry.name}" if entry.name else name) for entry in found]


class _NoStorages:
    """The storages of a pickle that has all bytes in it."""

    big_endian = False

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """There are none outside of the pickle."""
        raise MalformedError("the pickle of a numpy array refers to a storage outside of it")
