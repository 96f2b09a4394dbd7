"""Bytes that stand within a pickle: arrays of numpy, and tensors that were pickled without torch.save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Extent
from ckpt_cli.pickles.graph import ByteArray, Call, Global, Inline, Located, RawString, callee

_AS_TEXT = ("_codecs.encode", "builtins.bytes", "__builtin__.bytes", "builtins.bytearray", "__builtin__.bytearray")
"""The functions that make bytes in protocols 0 to 2, from a text of `nbytes` characters (`save_bytes` of pickle.py)."""

_CODECS = {"str": "utf-8", "escaped": "raw-unicode-escape"}
"""The encodings of long texts that stay in the file."""

_WIDEST = {"utf-8": 2, "raw-unicode-escape": 6, None: 1}
"""Bytes that one character below 256 takes at most."""


class PicklePlace:
    """The place of a pickle's data in a file, for the storages within it."""

    def __init__(self, begin: int | None, file: int = 0) -> None:
        self.begin = begin
        """The byte of the file that is the data's first; None where they are compressed there."""
        self.file = file
        """The file's number within its container."""
        self._decoded: tuple[Buffer, bytes] | None = None
        """The text that was turned into bytes last: large arrays are read piece by piece."""

    def decoded(self, buffer: Buffer) -> bytes:
        """The bytes that a text stands for; raises LimitError where that is too much to hold or to do."""
        last = self._decoded
        if last is not None and last[0] is buffer:
            return last[1]
        size = len(buffer.data)
        if size > limits.INFLATED_AT_ONCE:
            raise LimitError(f"{size} bytes of text in the pickle would have to be decoded")
        current().inflate(size)
        found = buffer.decode()
        self._decoded = (buffer, found)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """The bytes that a node stands for."""

    data: bytes | memoryview
    """The bytes, or a text whose characters they are, as the pickle encodes it."""
    offset: int | None
    """Their position where they stand plainly in the pickle's data."""
    codec: str | None = None
    """The encoding of a text; None where the data are the bytes themselves."""

    def may_hold(self, nbytes: int) -> bool:
        """True if there can be `nbytes` bytes in it: a character of a text takes up to `_WIDEST`."""
        size = len(self.data)
        return size // _WIDEST[self.codec] <= nbytes <= size if self.codec else size == nbytes

    def decode(self) -> bytes:
        """The bytes of a text; raises MalformedError where it stands for none."""
        try:
            return str(self.data, self.codec or "latin-1").encode("latin-1")
        except UnicodeError:
            raise MalformedError("the pickle has a text in the place of bytes that stands for none") from None


@dataclass(frozen=True, slots=True, eq=False)
class InlineBytes:
    """The bytes of a storage within a pickle."""

    key: str
    """The key of the storage."""
    begin: int
    """The first byte within the buffer."""
    buffer: Buffer
    place: PicklePlace
    composed: ClassVar[bool] = False

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Some of its bytes."""
        data = self.place.decoded(self.buffer) if self.buffer.codec else self.buffer.data
        first = self.begin + offset
        if first + nbytes > len(data):
            raise MalformedError(f"{self.key} is a text of {len(data)} bytes, {first + nbytes} are needed")
        return memoryview(data)[first : first + nbytes]

    def extents(self, offset: int, nbytes: int) -> Sequence[Extent]:
        """Return where some of its bytes stand plainly; raises UnsupportedError where they do not."""
        if not nbytes:
            return []
        if self.buffer.offset is None:
            raise UnsupportedError(
                "the pickle has these bytes as text (protocols 0 to 2), where each takes one byte or two: they can be "
                "shown but not set",
                hint="pickle it again with protocol 4",
            )
        if self.place.begin is None:
            raise UnsupportedError("the pickle that has these bytes is compressed: they can be shown but not set")
        return [Extent(self.place.file, self.place.begin + self.buffer.offset + self.begin + offset, nbytes)]


def buffer_of(node: object, data: bytes | memoryview) -> Buffer | None:
    """Return the bytes that a node of a pickle with these data stands for; None for a node of another kind."""
    if isinstance(node, ByteArray):
        node = node.data
    if isinstance(node, Located):
        return Buffer(node, node.offset)
    if isinstance(node, Inline) and node.kind not in _CODECS:
        return Buffer(data[node.offset : node.offset + node.nbytes], node.offset)
    if isinstance(node, RawString):
        return Buffer(node.raw, node.offset)
    return _of_call(node, data) if isinstance(node, Call) else None


def _of_call(node: Call, data: bytes | memoryview) -> Buffer | None:
    func, args = callee(node.func), node.args
    if not isinstance(func, Global) or func.qualified not in _AS_TEXT or not isinstance(args, tuple):
        return None
    if not args:
        return Buffer(b"", 0)
    text = args[0]
    if isinstance(text, str):
        try:
            return Buffer(text.encode("latin-1"), None)
        except UnicodeEncodeError:
            return None
    if isinstance(text, Inline) and text.kind in _CODECS:
        return Buffer(data[text.offset : text.offset + text.nbytes], None, _CODECS[text.kind])
    return buffer_of(text, data) if isinstance(text, Located | ByteArray | RawString) else None
