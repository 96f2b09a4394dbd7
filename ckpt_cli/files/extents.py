"""A range of one of several open files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """Where bytes stand, unencoded, in a file."""

    file: int
    """The number of the file within its container."""
    offset: int
    """The first byte."""
    nbytes: int
    """How many."""

    def cut(self, offset: int, nbytes: int) -> Extent:
        """A part of it."""
        return Extent(self.file, self.offset + offset, nbytes)
