"""The ranges of a file that are known to be read, as pieces that one request each fetches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from ckpt_cli.remote.fetched import PART

NEAR = 128 << 10
"""Bytes between two ranges up to which one request fetches both: a request takes as long as they do, or longer."""

_TOGETHER = 32 << 20
"""Bytes of ranges that are read after one another, of which those that are neighbours in the file become one piece."""


class Piece:
    """A part of a file that is fetched at once."""

    __slots__ = ("begin", "end", "gaps", "is_begun")

    def __init__(self, begin: int, end: int, gaps: list[tuple[int, int]]) -> None:
        self.begin = begin
        self.end = end
        self.gaps = gaps
        """The ranges in it that nobody reads."""
        self.is_begun = False
        """True once it was asked for."""


class Plan:
    """The pieces that were not asked for yet, and some that were."""

    def __init__(self) -> None:
        self._pieces: tuple[list[int], list[Piece]] = ([], [])
        """The first bytes of all, in order, and the pieces themselves; replaced at once, as threads read it."""

    def add(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Add ranges, pairs of the first byte and the one after the last, in about the order in which they are read."""
        found = [piece for piece in self._pieces[1] if not piece.is_begun]
        batch: list[tuple[int, int]] = []
        nbytes = 0
        for begin, end in ranges:
            batch.append((begin, end))
            nbytes += end - begin
            if nbytes >= _TOGETHER:
                found += _pieces(batch)
                batch, nbytes = [], 0
        found += _pieces(batch)
        apart: list[Piece] = []
        reached = 0
        for piece in sorted(found, key=lambda piece: piece.begin):
            piece.begin = max(piece.begin, reached)  # what is in two of them belongs to the one that begins first
            if piece.begin < piece.end:
                apart.append(piece)
                reached = piece.end
        self._pieces = [piece.begin for piece in apart], apart

    def piece_at(self, offset: int) -> Piece | None:
        """Return the piece that has a byte; None where there is none."""
        begins, pieces = self._pieces
        number = bisect_right(begins, offset) - 1
        return pieces[number] if number >= 0 and offset < pieces[number].end else None


def _pieces(ranges: list[tuple[int, int]]) -> Iterator[Piece]:
    """Yield pieces of at most `PART` bytes that have some ranges, which may overlap."""
    for begin, end, gaps in together(ranges):
        for low in range(begin, end, PART):
            high = min(low + PART, end)
            yield Piece(low, high, [(max(a, low), min(b, high)) for a, b in gaps if a < high and low < b])


def together(ranges: Iterable[tuple[int, int]], near: int = NEAR) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Yield ranges of any length that hold some ranges, those near each other in one, and the gaps in each."""
    begin = end = -1
    gaps: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if end < 0 or low > end + near:
            if end > begin:
                yield begin, end, gaps
            begin, end, gaps = low, high, []
            continue
        if low > end:
            gaps.append((end, low))
        end = max(end, high)
    if end > begin:
        yield begin, end, gaps
