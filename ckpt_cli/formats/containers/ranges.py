"""Tensors that lie in several ranges of one file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ckpt_cli.files.source import Extent
from ckpt_cli.model.checkpoint import Storage


class JoinedRanges:
    """The bytes of storages one behind another, as those of a single one."""

    __slots__ = ("_ends", "_parts")
    composed = True

    def __init__(self, parts: Sequence[Storage]) -> None:
        self._parts = parts
        self._ends = list(accumulate(part.nbytes for part in parts))

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage; of one part they are not copied."""
        found = [part.view(first, count) for part, first, count in self._pieces(begin, nbytes)]
        return found[0] if len(found) == 1 else memoryview(b"".join(found))

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the ranges of the file."""
        return [extent for part, first, count in self._pieces(begin, nbytes) for extent in part.extents(first, count)]

    def _pieces(self, begin: int, nbytes: int) -> list[tuple[Storage, int, int]]:
        """Return the parts that a range lies in, each with its first byte there and the number of bytes."""
        found = []
        number, end = bisect_right(self._ends, begin), begin + nbytes
        while begin < end:
            first = self._ends[number] - self._parts[number].nbytes
            stop = min(end, self._ends[number])
            found.append((self._parts[number], begin - first, stop - begin))
            begin, number = stop, number + 1
        return found
