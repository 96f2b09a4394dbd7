"""The fields of a protobuf message, as the wire format has them; what is long is not read.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ckpt_cli.errors import MalformedError, TruncatedError
from ckpt_cli.files.source import ByteSource

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; groups, 3 and 4, are not in use any more."""

_WINDOW = 1 << 12
"""Bytes that are read together: the small fields between long ones."""

_VARINT = 10
"""Bytes of a number at most."""


class Field(NamedTuple):
    """One field of a message."""

    number: int
    wire: int
    begin: int
    """The first byte of its content in the source."""
    size: int
    """Bytes of its content."""
    value: int
    """The number that it is; 0 for one that has a length."""

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.begin + self.size


class Reader:
    """Reads the fields of messages in one source."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self._begin = 0
        self._window = b""

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message in a range; raises MalformedError or TruncatedError."""
        at = begin
        while at < end:
            key, after = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if wire == VARINT:
                value, at = self._varint(after, end)
                yield Field(number, wire, after, at - after, value)
                continue
            if wire == BYTES:
                size, after = self._varint(after, end)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise MalformedError(f"byte {at} begins a field of wire type {wire}, which there is not")
            if not number or size > end - after:
                raise TruncatedError(f"the field at byte {at} needs {size} bytes, {end - after} are left")
            at = after + size
            yield Field(number, wire, after, size, 0)

    def text(self, field: Field, most: int) -> str:
        """Return the text that a field is, of a long one the beginning."""
        return self.source.read(field.begin, min(field.size, most)).decode("utf-8", "replace")

    def numbers(self, field: Field) -> Iterator[int]:
        """Yield the numbers of a field of packed ones, or the one that it is."""
        if field.wire == VARINT:
            yield field.value
            return
        at = field.begin
        while at < field.end:
            value, at = self._varint(at, field.end)
            yield value

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the number that begins at a byte, and the byte after it."""
        value = 0
        for place in range(at, min(at + _VARINT, end)):
            byte = self._byte(place)
            value |= (byte & 0x7F) << 7 * (place - at)
            if byte < 0x80:
                return value & (1 << 64) - 1, place + 1
        raise TruncatedError(f"the number at byte {at} does not end within {min(_VARINT, max(end - at, 0))} bytes")

    def _byte(self, at: int) -> int:
        place = at - self._begin
        if not 0 <= place < len(self._window):
            self._begin, place = at, 0
            self._window = self.source.read(at, min(_WINDOW, self.source.size - at))
        return self._window[place]
