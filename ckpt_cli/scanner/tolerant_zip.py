"""A zip file as a suspicious reader takes it: what its directory and its local headers say, and where they differ.

Nothing is refused here that can be read in some way, because readers differ: Python's zipfile takes the last of two
records of a name, torch the first; one believes flags and CRCs, the other does not look at them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ckpt_cli import limits
from ckpt_cli.files.source import ByteSource

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF
_COMMENT = 1 << 16
_DESCRIBED = 0x8
_STRANGE_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000
"""Encrypted, patched, strongly encrypted, masked: Python's zipfile refuses such records and torch reads them."""

_DESCRIPTOR = 24
"""Bytes of the longest descriptor that may stand between a record's data and the next header."""


@dataclass(slots=True)
class Member:
    """One record as the directory has it, and what its local header says otherwise."""

    name: str
    header: int
    """The first byte of its local header."""
    method: int
    flags: int
    crc: int
    stored: int
    nbytes: int
    begin: int = -1
    """The first byte of its data; -1 where its local header is missing."""
    faults: list[str] = field(default_factory=list)
    """The differences between its local header and the directory, in words."""

    @property
    def end(self) -> int:
        """The byte after its data."""
        return self.begin + self.stored


@dataclass(slots=True)
class LooseZip:
    """One zip within a file."""

    begin: int
    """The byte from which its offsets count."""
    directory: int
    """The first byte of its directory."""
    end: int
    """The byte after its end record and comment."""
    members: list[Member]
    faults: list[str]
    """The faults of the zip as a whole, in words."""


def zips_within(source: ByteSource) -> Iterator[LooseZip]:
    """The zips of a file, the last one first: what stands before a zip may be a zip as well (DCP's `.distcp`)."""
    end = source.size
    for _ in range(limits.SCAN_FILES):
        found = _zip_before(source, end, anywhere=end == source.size)
        if found is None:
            return
        yield found
        end = found.begin
        if end <= 0:
            return


def _zip_before(source: ByteSource, end: int, *, anywhere: bool) -> LooseZip | None:
    """The zip that ends at a byte, or some bytes before the end of the file."""
    if end < _END.size:
        return None
    reach = min(end, _END.size + (_COMMENT if anywhere else 0))
    tail = source.read(end - reach, reach)
    at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    if at < 0 and anywhere:  # junk may follow, which torch does not mind
        reach = min(end, 16 * _COMMENT)
        tail = source.read(end - reach, reach)
        at = tail.rfind(b"PK\5\6", 0, len(tail) - _END.size + 4)
    if at < 0:
        return None
    place = end - reach + at
    _, _, _, _, count, size, offset, comment = _END.unpack_from(tail, at)
    stop = min(place + _END.size + comment, end)
    faults = []
    before = place
    if place >= _LOCATOR.size:
        signature, _, at64, _ = _LOCATOR.unpack(source.read(place - _LOCATOR.size, _LOCATOR.size))
        if signature == b"PK\6\7":
            wide = _end64(source, place - _LOCATOR.size, at64)
            if wide is None:
                faults.append("its zip64 end record is not where its locator says")
            else:
                before, count, size, offset = wide
    directory = before - size
    begin = directory - offset
    if directory < 0 or begin < 0:
        faults.append("its end record points out of the file")
        directory, begin = (offset, 0) if offset < place else (0, 0)
    members = list(_members(source, begin, directory, min(size, before - directory), count, faults))
    return LooseZip(begin, directory, stop, members, faults)


def _end64(source: ByteSource, locator: int, at64: int) -> tuple[int, int, int, int] | None:
    """Return the place, count, size and offset of the zip64 end record: before the locator, or where that says."""
    for place in (locator - _END64.size, at64):
        if 0 <= place <= source.size - _END64.size:
            fields = _END64.unpack(source.read(place, _END64.size))
            if fields[0] == b"PK\6\6":
                return place, fields[7], fields[8], fields[9]
    return None


def _members(
    source: ByteSource, begin: int, directory: int, size: int, count: int, faults: list[str]
) -> Iterator[Member]:
    if size > limits.ZIP_DIRECTORY:
        faults.append(f"its directory of {size} bytes is larger than any that is read")
        size = limits.ZIP_DIRECTORY
    raw = source.read(directory, max(min(size, source.size - directory), 0))
    position = seen = 0
    while position + _CENTRAL.size <= len(raw) and seen < limits.ZIP_RECORDS:
        fields = _CENTRAL.unpack_from(raw, position)
        signature, flags, method = fields[0], fields[3], fields[4]
        crc, stored, nbytes, name_length, extra_length, comment_length = fields[7:13]
        if signature != b"PK\1\2":
            break
        after = position + _CENTRAL.size + name_length
        name = raw[position + _CENTRAL.size : after].decode("utf-8", "surrogateescape")
        nbytes, stored, header = _wide(raw[after : after + extra_length], nbytes, stored, fields[16])
        member = Member(name, begin + header, method, flags, crc, stored, nbytes)
        _compare(source, member)
        yield member
        seen += 1
        position = after + extra_length + comment_length
    if seen != count or position != len(raw):
        faults.append(f"its directory has {seen} records that can be read, its end record says {count}")


def _wide(extra: bytes, nbytes: int, stored: int, header: int) -> tuple[int, int, int]:
    """The sizes and the offset, taken from the zip64 extra (id 1) where they are there."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            room = min(length, len(extra) - position - 4) // 8
            wide = list(struct.unpack_from(f"<{room}Q", extra, position + 4))
            values = [wide.pop(0) if value == _FULL and wide else value for value in (nbytes, stored, header)]
            return values[0], values[1], values[2]
        position += 4 + length
    return nbytes, stored, header


def _compare(source: ByteSource, member: Member) -> None:
    """Find the data, and what the local header says otherwise."""
    if not 0 <= member.header <= source.size - _LOCAL.size:
        member.faults.append("has no local header")
        return
    fields = _LOCAL.unpack(source.read(member.header, _LOCAL.size))
    signature, flags, method, crc, stored, nbytes, name_length, extra_length = (
        fields[0],
        fields[2],
        fields[3],
        *fields[6:],
    )
    if signature != b"PK\3\4":
        member.faults.append("has no local header")
        return
    room = source.size - member.header - _LOCAL.size
    raw = source.read(member.header + _LOCAL.size, min(name_length, room))
    name = raw.decode("utf-8", "surrogateescape")
    member.begin = member.header + _LOCAL.size + name_length + extra_length
    if name != member.name:
        member.faults.append(f"is called {name!r} in its local header")
    if method != member.method:
        member.faults.append(f"has method {method} in its local header and {member.method} in the directory")
    odd = (flags | member.flags) & _STRANGE_FLAGS
    if odd:
        member.faults.append(f"has flags {odd:#x}, by which some readers refuse it and others do not")
    elif flags != member.flags:
        member.faults.append(f"has flags {flags:#x} in its local header and {member.flags:#x} in the directory")
    if not flags & _DESCRIBED:
        _compare_sizes(member, crc, stored, nbytes)
    if member.end > source.size:
        member.faults.append("reaches beyond the end of the file")


def _compare_sizes(member: Member, crc: int, stored: int, nbytes: int) -> None:
    """Compare what a local header without a descriptor says; torch leaves it 0, zip64 full."""
    for word, here, there in (("bytes", nbytes, member.nbytes), ("stored bytes", stored, member.stored)):
        if here not in (0, _FULL, there):
            member.faults.append(f"has {here} {word} by its local header and {there} by the directory")
    if crc not in (0, member.crc):
        member.faults.append("has another CRC in its local header than in the directory")


def content(source: ByteSource, member: Member, most: int) -> memoryview | None:
    """A record's bytes, inflated where they must be; None where that is not possible."""
    stored = min(member.stored, source.size - member.begin)
    if member.begin < 0 or stored < 0:
        return None
    if member.method == 0:
        return source.view(member.begin, stored)
    if member.method != 8:
        return None
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return memoryview(inflater.decompress(source.view(member.begin, min(stored, most)), most))
    except zlib.error:
        return None


def unlisted(found: LooseZip) -> Iterator[tuple[int, int]]:
    """The ranges between records that are longer than a descriptor: what no directory lists."""
    last = found.begin
    for member in sorted(found.members, key=lambda member: member.header):
        if member.begin < 0:
            continue
        if member.header > last + _DESCRIPTOR or (member.header > last and last == found.begin):
            yield last, member.header
        last = max(last, member.end)
    if found.directory > last + _DESCRIPTOR:
        yield last, found.directory


def inflated_crc(source: ByteSource, member: Member) -> int | None:
    """The CRC-32 of a deflated record's content; None where it does not inflate to what the directory says."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    position, end, crc, seen = member.begin, min(member.end, source.size), 0, 0
    pending = b""
    try:
        while not inflater.eof and (pending or position < end) and seen <= member.nbytes:
            if not pending:
                pending = source.read(position, min(1 << 20, end - position))
                position += len(pending)
            piece = inflater.decompress(pending, 1 << 20)
            pending = inflater.unconsumed_tail
            crc = zlib.crc32(piece, crc)
            seen += len(piece)
    except zlib.error:
        return None
    return crc if seen == member.nbytes else None
