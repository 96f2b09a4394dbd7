"""The identity of a journal's file: its old inode and time, and a checksum of the bytes that the edit leaves alone.

An edit changes the time of the file as any other write does. Where the time is another one, a sample of the bytes
outside the patches tells a half-done edit from a file that was saved again in place.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from ckpt_cli.files.source import SourceFile

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
