"""The journal of patches as it stands on disk: a redo and undo log.

    .NAME.ckpt-journal:  magic | header length u32 | header crc u32 | header JSON | patch… | trailer
    patch:               file u32 | offset u64 | nbytes u64 | crc u32 of (these fields, old, new) | old | new
    trailer:             magic | number of patches u64 | crc u32 of every patch's crc

A journal without its trailer is one whose writing was cut short. The header has the identity of each file and of the
journal itself; that of the version before, with another magic, had names and sizes only. An identity is the file's
inode and time as they were, and a checksum of the bytes that the edit leaves alone: an edit changes the time as any
other write does, and where the time is another one, a sample of the bytes outside the patches tells a half-done edit
from a file that was saved again in place.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

from ckpt_cli.errors import MalformedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.journal.pointer import name_below
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import create_private, sync, write_all

_WHOLE = 512 << 10
"""Bytes up to which all of a file is in its sample."""

_ENDS = 64 << 10
"""Bytes of a longer one that are sampled at its begin and at its end, where headers and directories are."""

_BLOCKS = 48
"""Blocks that are sampled between, evenly spread."""

_BLOCK = 4096


class Identity(NamedTuple):
    """A file as it was when something was noted about it."""

    device: int
    inode: int
    mtime: int
    """Nanoseconds."""
    size: int

    def is_inode(self, other: Identity) -> bool:
        """True if both are the same file, whatever was written into it."""
        return (self.device, self.inode) == (other.device, other.inode)


def identity_of(found: os.stat_result) -> Identity:
    """The identity of a file as the system describes it."""
    return Identity(found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def parsed_identity(value: object) -> Identity:
    """The identity that a journal's JSON holds; raises ValueError or TypeError for anything else."""
    if not isinstance(value, list):
        raise TypeError
    return Identity(*map(int, value))


class Sample:
    """Parts of the first `size` bytes of a file, from which patched ranges are taken away, in any order."""

    def __init__(self, size: int) -> None:
        self._pieces = [(0, size)] if size else []
        if size > _WHOLE:
            room = size - 2 * _ENDS - _BLOCK
            begins = [_ENDS + room * number // (_BLOCKS - 1) for number in range(_BLOCKS)]
            self._pieces = [(0, _ENDS), *((begin, begin + _BLOCK) for begin in begins), (size - _ENDS, size)]

    def exclude(self, begin: int, end: int) -> None:
        """Take a range away."""
        first = bisect_right(self._pieces, begin, key=lambda piece: piece[1])
        last = bisect_left(self._pieces, end, key=lambda piece: piece[0])
        if first < last:
            left = (self._pieces[first][0], begin), (end, self._pieces[last - 1][1])
            self._pieces[first:last] = [piece for piece in left if piece[0] < piece[1]]

    def checksum(self, file: SourceFile) -> int:
        """The CRC-32 of what is left of the sample."""
        crc = 0
        for begin, end in self._pieces:
            crc = zlib.crc32(file.read(begin, end - begin), crc)
        return crc


MAGIC = b"ckpt-journal-2\n\0"
_BEFORE = b"ckpt-journal-1\n\0"
"""Begins a journal of the version before, which has no identities."""
_TRAILER = b"ckpt-journal-end"
_HEAD = struct.Struct("<16sII")
_PATCH = struct.Struct("<IQQ")
_CRC = struct.Struct("<I")
_END = struct.Struct("<16sQI")
_HEADER_LIMIT = 1 << 20
_PATCH_LIMIT = 16 << 20
_GROWTH_LIMIT = 1 << 30
"""Bytes that an edit in place makes a file longer by at most."""
_HELD = 1 << 20


class File(TypedDict):
    """One patched file as the journal's header names it."""

    name: str
    """A name in the journal's own folder, or in a folder in it after a slash: a journal may not reach elsewhere."""
    size: int
    """Bytes that it has before the edit."""
    new_size: int
    """Bytes that it has after it."""
    identity: Identity | None
    """The file as it was before the edit; None in a journal of the version before."""
    sample: int
    """The checksum of a sample of what the edit leaves alone."""


class Header(TypedDict):
    """The journal's header."""

    files: list[File]
    journal: Identity | None
    """The journal itself: where this is not its identity, it was copied, and inodes say nothing."""


@dataclass(frozen=True, slots=True)
class LoggedPatch:
    """One patch as the journal keeps it."""

    file: int
    offset: int
    old: bytes
    new: bytes
    crc: int
    """The checksum that the journal states."""


class _Log:
    """Gathers what is written one after another, so that a journal of many patches takes few writes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = bytearray()
        self._written = 0

    def add(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._held += piece
        if len(self._held) >= _HELD:
            self.flush()

    def flush(self) -> int:
        """Write what is held; returns the bytes written so far."""
        write_all(self._fd, bytes(self._held), self._written)
        self._written += len(self._held)
        self._held.clear()
        return self._written


def write_journal(path: str, overlay: Overlay, files: Sequence[SourceFile]) -> int:
    """Write the whole journal of some files and make it durable; returns its size in bytes.

    The first file is the one beside which it stands, the others are all that are patched.
    """
    named: list[File] = []
    for file in files:
        name = name_below(spelled(file.path), os.path.dirname(path))
        sample = Sample(min(file.size, overlay.size(file)))
        for patch in overlay.patches(file):
            sample.exclude(patch.offset, patch.end)
        named.append(
            File(
                name=name,
                size=file.size,
                new_size=overlay.size(file),
                identity=identity_of(os.fstat(file.fd)),
                sample=sample.checksum(file),
            )
        )
    fd = create_private(path)
    try:
        header = json.dumps(Header(files=named, journal=identity_of(os.fstat(fd)))).encode()
        log = _Log(fd)
        log.add(_HEAD.pack(MAGIC, len(header), zlib.crc32(header)), header)
        count = total = 0
        for place, file in enumerate(files):
            for patch in overlay.patches(file):
                fields = _PATCH.pack(place, patch.offset, patch.nbytes)
                old, new = overlay.old_bytes(file, patch), overlay.new_bytes(patch)
                crc = _CRC.pack(zlib.crc32(new, zlib.crc32(old, zlib.crc32(fields))))
                total = zlib.crc32(crc, total)
                count += 1
                log.add(fields, crc, old, new)
        log.add(_END.pack(_TRAILER, count, total))
        size = log.flush()
        sync(fd)
        return size
    finally:
        os.close(fd)


def header_of(journal: LocalFile) -> Header | None:
    """The journal's header where it and the trailer stand, else None."""
    if journal.size < _HEAD.size + _END.size:
        return None
    magic, length, crc = _HEAD.unpack(journal.read(0, _HEAD.size))
    if magic not in (MAGIC, _BEFORE) or length > min(_HEADER_LIMIT, journal.size - _HEAD.size - _END.size):
        return None
    header = journal.read(_HEAD.size, length)
    if zlib.crc32(header) != crc or journal.read(journal.size - _END.size, len(_TRAILER)) != _TRAILER:
        return None
    try:
        parsed = json.loads(header)
        named = [_file(entry, has_identity=magic == MAGIC) for entry in parsed["files"]]
        own = parsed_identity(parsed["journal"]) if magic == MAGIC else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # its checksum holds, but no ckpt wrote it
        return None
    if not named or any(not 0 <= entry["new_size"] <= entry["size"] + _GROWTH_LIMIT for entry in named):
        return None
    return Header(files=named, journal=own)


def _file(entry: Any, *, has_identity: bool) -> File:
    """A file as the header's JSON has it."""
    return File(
        name=str(entry["name"]),
        size=int(entry["size"]),
        new_size=int(entry["new_size"]),
        identity=parsed_identity(entry["identity"]) if has_identity else None,
        sample=int(entry["sample"]) if has_identity else 0,
    )


def reach(entry: File) -> int:
    """The byte after the last that a patch of a file may write."""
    return max(entry["size"], entry["new_size"])


def is_complete(journal: LocalFile, header: Header) -> bool:
    """True if every patch's checksum holds, and the patches are those that the trailer counts."""
    files = header["files"]
    if journal.size > _HEADER_LIMIT + (_PATCH.size + _CRC.size + 2) * (1 + sum(map(reach, files))):
        return False
    _, count, total = _END.unpack(journal.read(journal.size - _END.size, _END.size))
    found = running = 0
    reached = (0, 0)
    try:
        for patch in patches_of(journal):
            if patch.file >= len(files) or (patch.file, patch.offset) < reached or not patch.new:
                return False
            reached = (patch.file, patch.offset + len(patch.new))
            fields = _PATCH.pack(patch.file, patch.offset, len(patch.new))
            checksum = zlib.crc32(patch.new, zlib.crc32(patch.old, zlib.crc32(fields)))
            if checksum != patch.crc:
                return False
            running = zlib.crc32(_CRC.pack(checksum), running)
            found += 1
    except MalformedError:
        return False
    return (found, running) == (count, total)


def patches_of(journal: LocalFile) -> Iterator[LoggedPatch]:
    """The patches in order, each checked against the journal's size."""
    _, length, _ = _HEAD.unpack(journal.read(0, _HEAD.size))
    position, end = _HEAD.size + length, journal.size - _END.size
    while position < end:
        head = _PATCH.size + _CRC.size
        if position + head > end:
            raise MalformedError("a patch is cut short", path=journal.path)
        file, offset, nbytes = _PATCH.unpack(journal.read(position, _PATCH.size))
        (crc,) = _CRC.unpack(journal.read(position + _PATCH.size, _CRC.size))
        position += head
        if nbytes > _PATCH_LIMIT or position + 2 * nbytes > end:
            raise MalformedError("a patch is cut short", path=journal.path)
        yield LoggedPatch(file, offset, journal.read(position, nbytes), journal.read(position + nbytes, nbytes), crc)
        position += 2 * nbytes
