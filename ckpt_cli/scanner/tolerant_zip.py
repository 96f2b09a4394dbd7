"""A zip file as a suspicious reader takes it: what its directory and its local headers say, and where they differ.

Nothing is refused here that can be read in some way, because readers differ: Python's zipfile takes the last of two
records of a name, torch the first; one believes flags and CRCs, the other does not look at them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.source import ByteSource
from ckpt_cli.formats.zip.layout import (
    CENTRAL,
    CENTRAL_MAGIC,
    DESCRIBED,
    END,
    END64,
    FULL,
    LOCAL,
    LONGEST_DESCRIPTOR,
    end64_at,
    find_end,
    find_locator,
    local_header_in,
    name_in,
    widened,
)

_COMMENT = 1 << 16
"""Bytes in which an end record with its comment is looked for."""

_STRANGE_FLAGS = 0x1 | 0x20 | 0x40 | 0x2000
"""Encrypted, patched, strongly encrypted, masked: Python's zipfile refuses such records and torch reads them."""


_MARGIN = 24
"""Bytes of extra fields or of a comment in which a pickle has room."""

_NAME = 200
"""Characters of a name that a fault quotes: records may share the bytes of a long one."""


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
    margins: list[tuple[int, int]] = field(default_factory=list)
    """Places and lengths of its extra fields and comment, where they are long enough to hold a pickle."""
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
    comment: int
    """Bytes of that comment, which ends there."""
    members: list[Member]
    faults: list[str]
    """The faults of the zip as a whole, in words."""


def zips_within(source: ByteSource, budget: ScanBudget | None = None) -> Iterator[LooseZip]:
    """The zips of a file, the last one first: what stands before a zip may be a zip as well (DCP's `.distcp`).

    A scan counts the records in its `budget`: zips within zips may list the same bytes over and over.
    """
    end = source.size
    for _ in range(limits.SCAN_FILES):
        found = _zip_before(source, end, budget, anywhere=end == source.size)
        if found is None:
            return
        yield found
        end = found.begin
        if end <= 0:
            return


def _zip_before(source: ByteSource, end: int, budget: ScanBudget | None, *, anywhere: bool) -> LooseZip | None:
    """The zip that ends at a byte, or some bytes before the end of the file."""
    if end < END.size:
        return None
    reaches = (END.size + _COMMENT, 16 * _COMMENT) if anywhere else (END.size,)  # torch does not mind junk behind it
    last = find_end(source, end, reaches)
    if last is None:
        return None
    stop = min(last.position + END.size + last.comment, end)
    faults = []
    before, count, size, offset = last.position, last.records, last.size, last.offset
    located = find_locator(source, before)
    if located is not None:
        wide = _end64(source, *located)
        if wide is None:
            faults.append("its zip64 end record is not where its locator says")
        else:
            before, count, size, offset = wide
    directory = before - size
    begin = directory - offset
    if directory < 0 or begin < 0:
        faults.append("its end record points out of the file")
        directory, begin = (offset, 0) if offset < last.position else (0, 0)
    most = limits.ZIP_RECORDS if budget is None else max(min(limits.ZIP_RECORDS, budget.records), 0)
    members = _members(source, begin, directory, min(size, before - directory), count, faults, most)
    if budget is not None:
        budget.records -= len(members)
    return LooseZip(begin, directory, stop, stop - last.position - END.size, members, faults)


def _end64(source: ByteSource, locator: int, at64: int) -> tuple[int, int, int, int] | None:
    """Return the place, count, size and offset of the zip64 end record: before the locator, or where that says."""
    for place in (locator - END64.size, at64):
        wide = end64_at(source, place)
        if wide is not None:
            return place, *wide
    return None


def _members(
    source: ByteSource, begin: int, directory: int, size: int, count: int, faults: list[str], most: int
) -> list[Member]:
    if size > limits.ZIP_DIRECTORY:
        faults.append(f"its directory of {size} bytes is larger than any that is read")
        size = limits.ZIP_DIRECTORY
    raw = source.read(directory, max(min(size, source.size - directory), 0))
    position = seen = 0
    members: list[Member] = []
    while position + CENTRAL.size <= len(raw) and seen < most:
        fields = CENTRAL.unpack_from(raw, position)
        signature, flags, method = fields[0], fields[3], fields[4]
        crc, stored, nbytes, name_length, extra_length, comment_length = fields[7:13]
        if signature != CENTRAL_MAGIC:
            break
        after = position + CENTRAL.size + name_length
        name = name_in(raw[position + CENTRAL.size : after])
        nbytes, stored, header, _ = widened(raw[after : after + extra_length], nbytes, stored, fields[16])
        members.append(Member(name, begin + header, method, flags, crc, stored, nbytes))
        if max(extra_length, comment_length) >= _MARGIN:
            members[-1].margins.append((directory + after, extra_length + comment_length))
        seen += 1
        position = after + extra_length + comment_length
    _compare_all(source, members)
    if seen != count or position != len(raw):
        faults.append(f"its directory has {seen} records that can be read, its end record says {count}")
    return members


def _compare_all(source: ByteSource, members: Sequence[Member]) -> None:
    """Find the data of each, and what its local header says otherwise; those elsewhere are fetched many at a time."""
    elsewhere = is_elsewhere(source.whole)
    for number, member in enumerate(members):
        if elsewhere and not number % _TOGETHER:
            some = members[number : number + _TOGETHER]
            source.expect_all([(each.header, _HEAD + min(max(each.stored, 0), _LOOK)) for each in some])
        _compare(source, member)


_TOGETHER = 1_000
"""Local headers that are fetched together."""

_HEAD, _LOOK = LOCAL.size + 200, 4096
"""Bytes of most local headers, and of a record that are looked at to see what it is."""


def _compare(source: ByteSource, member: Member) -> None:
    """Find the data, and what the local header says otherwise."""
    if not 0 <= member.header <= source.size - LOCAL.size:
        member.faults.append("has no local header")
        return
    local = local_header_in(source.read(member.header, LOCAL.size))
    if local is None:
        member.faults.append("has no local header")
        return
    room = source.size - member.header - LOCAL.size
    name = name_in(source.read(member.header + LOCAL.size, min(local.name_length, room)))
    member.begin = member.header + local.size
    extra = local.size - LOCAL.size - local.name_length
    if extra >= _MARGIN:
        member.margins.append((member.begin - extra, extra))
    if name != member.name:
        member.faults.append(f"is called {name[:_NAME]!r} in its local header")
    if local.method != member.method:
        member.faults.append(f"has method {local.method} in its local header and {member.method} in the directory")
    odd = (local.flags | member.flags) & _STRANGE_FLAGS
    if odd:
        member.faults.append(f"has flags {odd:#x}, by which some readers refuse it and others do not")
    elif local.flags != member.flags:
        member.faults.append(f"has flags {local.flags:#x} in its local header and {member.flags:#x} in the directory")
    if not local.flags & DESCRIBED:
        _compare_sizes(member, local.crc, local.stored, local.nbytes)
    if member.end > source.size:
        member.faults.append("reaches beyond the end of the file")


def _compare_sizes(member: Member, crc: int, stored: int, nbytes: int) -> None:
    """Compare what a local header without a descriptor says; torch leaves it 0, zip64 full."""
    for word, here, there in (("bytes", nbytes, member.nbytes), ("stored bytes", stored, member.stored)):
        if here not in (0, FULL, there):
            member.faults.append(f"has {here} {word} by its local header and {there} by the directory")
    if crc not in (0, member.crc):
        member.faults.append("has another CRC in its local header than in the directory")


def unlisted(found: LooseZip) -> Iterator[tuple[int, int]]:
    """The ranges between records that are longer than a descriptor: what no directory lists."""
    last = found.begin
    for member in sorted(found.members, key=lambda member: member.header):
        if member.begin < 0:
            continue
        if member.header > last + LONGEST_DESCRIPTOR or (member.header > last and last == found.begin):
            yield last, member.header
        last = max(last, member.end)
    if found.directory > last + LONGEST_DESCRIPTOR:
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
