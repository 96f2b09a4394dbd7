"""The msgpack files of Flax: nested maps whose leaves are arrays, each a shape, a dtype and the bytes.

Sources: the specification of msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md) and
flax/serialization.py (`_ndarray_to_bytes`, `_msgpack_ext_pack`, `_chunk`): extension 1 is an array, 2 a complex
number, 3 a scalar of numpy. An array of more than 1 GiB is a map of flat chunks.

Only what stands between the bytes of arrays is read.
"""

from __future__ import annotations

import struct
from math import prod

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import CkptError, LimitError, MalformedError, UnknownFormatError, about
from ckpt_cli.files.source import ByteSource, SourceFile
from ckpt_cli.formats.containers.ranges import JoinedRanges
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.pickles.describe import describe

NAME = "msgpack"

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
"""Extension types of Flax."""

_WINDOW = 1 << 14
"""Bytes that are read together."""

_TEXT = 1 << 16
"""Bytes of a text that is read to be shown."""

_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
            0xD2: ">i", 0xD3: ">q"}  # fmt: skip
_PLAIN: dict[int, object] = {0xC0: None, 0xC2: False, 0xC3: True}
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Of these and the next ones, the bytes of the number of bytes or items."""
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
"""Extensions of so few bytes."""

_SCALARS = {"float16": "<e", "float32": "<f", "float64": "<d", "bool": "<?", "int8": "<b", "int16": "<h", "int32": "<i",
            "int64": "<q", "uint8": "<B", "uint16": "<H", "uint32": "<I", "uint64": "<Q"}  # fmt: skip


def read(file: SourceFile) -> Checkpoint:
    """Open a msgpack file: maps, names and shapes are read, no array is.

    Raises UnknownFormatError for one without arrays, MalformedError, TruncatedError or LimitError for one that is not
    sound.
    """
    with about(file.path):
        container = PlainFile(file)
        document = _Document(file, container)
        document.item("", 0)
        if not any(isinstance(entry, Tensor) for entry in document.entries):
            raise UnknownFormatError("a msgpack file without arrays, so not one that Flax wrote")
    rest = file.size - document.at
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=document.entries,
        container=container,
        version="msgpack of Flax",
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in document.entries)),
        unread=[f"{rest} bytes after the last item (byte {document.at})"] if rest else [],
    )


class _Document:
    """A place in the file that moves on as items are read, and the entries so far."""

    def __init__(self, file: ByteSource, container: PlainFile) -> None:
        self.at = 0
        self.entries: list[Entry] = []
        self._file = file
        self._container = container
        self._window = b""
        self._begin = 0
        """The first byte of the window."""
        self._items = 0
        self._names = 0
        """Bytes of all names so far."""

    def item(self, name: str, depth: int) -> None:
        """Read an item and what is in it."""
        self._items += 1
        if self._items > limits.MSGPACK_ITEMS:
            raise LimitError(f"it has more than {limits.MSGPACK_ITEMS:,} items")
        code = self._take(1)[0]
        count = self._count(code, 0x80, 0x8F, _MAPS)
        if count is not None:
            self._map(name, count, depth)
            return
        count = self._count(code, 0x90, 0x9F, _LISTS)
        if count is not None:
            self._nest(name, depth)
            for number in range(count):
                self.item(self._below(name, str(number)), depth + 1)
            return
        size = _FIXED.get(code) or (self._number(_EXTENSIONS[code]) if code in _EXTENSIONS else None)
        if size is not None:
            self._extension(name, self._take(1)[0], size)
        else:
            self.entries.append(Value(name, self._leaf(code)))

    def _map(self, name: str, count: int, depth: int) -> None:
        self._nest(name, depth)
        first, chunked = len(self.entries), False
        for _ in range(count):
            key = self._leaf(self._take(1)[0])
            chunked = chunked or key == _CHUNKED
            self.item(self._below(name, str(key)), depth + 1)
        if chunked:
            parts = self.entries[first:]
            self.entries[first:] = [self._joined(name, parts)]

    def _nest(self, name: str, depth: int) -> None:
        if depth > limits.GROUP_NESTING:
            raise LimitError(f"{describe(name[:200])} nests more than {limits.GROUP_NESTING} deep", fixed=True)

    def _below(self, name: str, key: str) -> str:
        found = f"{name}.{key}" if name else key
        self._names += len(found)
        if len(found) > limits.NAME_LENGTH or self._names > limits.NAME_BYTES:
            raise LimitError(f"its names are far too long, as {describe(found[:100])} is")
        return found

    def _leaf(self, code: int) -> object:
        """Return an item that is not a container: plain data, or what is shown in its place."""
        if code < 0x80 or code >= 0xE0:
            return code - 256 * (code >= 0xE0)
        if code in _PLAIN:
            return _PLAIN[code]
        if code in _NUMBERS:
            layout = _NUMBERS[code]
            return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        size = self._count(code, 0xA0, 0xBF, _TEXTS)
        if size is not None:
            if size > _TEXT:
                self._skip(size)
                return Opaque(f"<text of {size} bytes>")
            return self._take(size).decode("utf-8", "replace")
        if code not in _BYTES:
            raise MalformedError(f"byte {self.at - 1} begins no item that may stand there (0x{code:02x})")
        size = self._number(_BYTES[code])
        self._skip(size)
        return Opaque(f"<{size} bytes>")

    def _count(self, code: int, first: int, last: int, longer: dict[int, int]) -> int | None:
        """Return the number of bytes or items of one kind of item; None for an item of another kind."""
        if first <= code <= last:
            return code - first
        return self._number(longer[code]) if code in longer else None

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "big")

    def _extension(self, name: str, kind: int, size: int) -> None:
        end = self.at + size
        self._file.check(self.at, size)
        if kind in (_ARRAY, _SCALAR):
            found = self._array(name, end)
            if kind == _SCALAR and isinstance(found, Tensor):
                found = Value(name, _scalar(found))
        elif kind == _COMPLEX:
            found = Value(name, Opaque(str(self._complex())))
        else:
            found = Value(name, Opaque(f"<extension {kind} of {size} bytes>"))
            self.at = end
        if self.at != end:
            raise MalformedError(f"{describe(name)} has {size} bytes, of which its items take {size + self.at - end}")
        self.entries.append(found)

    def _array(self, name: str, end: int) -> Entry:
        """Return the array whose shape, dtype and bytes begin here."""
        if self._take(1) != b"\x93":
            raise MalformedError(f"array {describe(name)} is not a shape, a dtype and bytes")
        dimensions = self._count(self._take(1)[0], 0x90, 0x9F, _LISTS)
        if dimensions is None or dimensions > limits.DIMENSIONS:
            raise MalformedError(f"array {describe(name)} has no shape of up to {limits.DIMENSIONS} dimensions")
        shape = tuple(self._size(name) for _ in range(dimensions))
        spelled = self._leaf(self._take(1)[0])
        nbytes = self._content(name)
        begin, self.at = self.at, self.at + nbytes
        if self.at > end:
            raise MalformedError(f"array {describe(name)} has bytes behind its end")
        dtype = BY_NAME.get(spelled) if isinstance(spelled, str) else None
        if dtype is None or dtype.bits % 8:
            return Value(name, Opaque(f"numpy.ndarray(shape={shape}, dtype={str(spelled)[:100]})"))
        if dtype.nbytes_of(shape) != nbytes:
            raise MalformedError(f"array {describe(name)} of {dtype} {list(shape)} has {nbytes} bytes")
        storage = self._container.storage(name, nbytes, begin)
        return Tensor(name, dtype, shape, contiguous_stride(shape), storage)

    def _size(self, name: str) -> int:
        size = self._leaf(self._take(1)[0])
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise MalformedError(f"array {describe(name)} has {describe(str(size))} in its shape")
        return size

    def _content(self, name: str) -> int:
        """Return the number of bytes in the item that begins here: bytes, or text as msgpack had for them at first."""
        code = self._take(1)[0]
        if code in _BYTES:
            return self._number(_BYTES[code])
        size = self._count(code, 0xA0, 0xBF, _TEXTS)
        if size is None:
            raise MalformedError(f"array {describe(name)} has no bytes")
        return size

    def _complex(self) -> complex:
        if self._take(1) != b"\x92":
            raise MalformedError("a complex number is not two numbers")
        parts = [self._leaf(self._take(1)[0]) for _ in range(2)]
        if not all(isinstance(part, int | float) for part in parts):
            raise MalformedError("a complex number is not two numbers")
        return complex(parts[0], parts[1])  # type: ignore[call-overload, no-any-return]

    def _joined(self, name: str, parts: list[Entry]) -> Tensor:
        """Return the array of some flat chunks."""
        sizes, chunks = {}, {}
        for part in parts:
            group, _, number = part.name[len(name) + 1 if name else 0 :].partition(".")
            if group == "shape" and isinstance(part, Value):
                sizes[number] = part.value
            elif group == "chunks" and isinstance(part, Tensor):
                chunks[number] = part
        shape = tuple(sizes.get(str(number)) for number in range(len(sizes)))
        flat = [chunks[str(number)] for number in range(len(chunks)) if str(number) in chunks]
        if len(flat) != len(chunks) or not flat or len({chunk.dtype.name for chunk in flat}) > 1:
            raise MalformedError(f"array {describe(name)} has not all of its chunks")
        if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > limits.DIMENSIONS:
            raise MalformedError(f"array {describe(name)} has no shape")
        whole: tuple[int, ...] = tuple(size for size in shape if isinstance(size, int))
        if prod(whole) != sum(chunk.numel for chunk in flat):
            raise MalformedError(f"array {describe(name)} of {list(whole)} has chunks of another size")
        storages = [chunk.storage for chunk in flat if chunk.storage is not None]
        dtype: DType = flat[0].dtype
        storage = Storage(name, dtype.nbytes_of(whole), "cpu", JoinedRanges(storages))
        return Tensor(name or "array", dtype, whole, contiguous_stride(whole), storage)

    def _take(self, nbytes: int) -> bytes:
        """Return the next bytes and move on."""
        first = self.at - self._begin
        if first < 0 or first + nbytes > len(self._window):
            self._file.check(self.at, nbytes)
            self._begin, first = self.at, 0
            self._window = self._file.read(self.at, min(max(nbytes, _WINDOW), self._file.size - self.at))
        self.at += nbytes
        return self._window[first : first + nbytes]

    def _skip(self, nbytes: int) -> None:
        self._file.check(self.at, nbytes)
        self.at += nbytes


def _scalar(found: Tensor) -> object:
    """Return the number that an array of one element is."""
    layout = _SCALARS.get(found.dtype.name)
    if found.shape != () or found.storage is None or layout is None:
        return Opaque(f"<a scalar of {found.dtype}>")
    try:
        return struct.unpack(layout, found.storage.view(0, found.nbytes))[0]
    except CkptError:
        return Opaque(f"<a scalar of {found.dtype}>")
