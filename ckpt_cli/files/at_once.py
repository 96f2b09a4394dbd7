"""Work that waits for servers, done at once for several files instead of for one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ckpt_cli.files.source import SourceFile

_MOST = 16
"""Files that are asked for at a time."""

DOCUMENT = 256 << 10
"""Bytes at the begin, and at the end, of a file that are fetched together: most documents are no longer."""

Ranges = Sequence[tuple[int, int]]
"""Pairs of the first byte of a range and its bytes."""


def is_elsewhere(file: SourceFile) -> bool:
    """True if reading a file may mean to wait for a server."""
    return file.fd < 0 and not file.in_memory


def in_place(file: SourceFile, offset: int, nbytes: int) -> memoryview | None:
    """Return bytes of a file elsewhere that were fetched in one piece; None where they have to be read."""
    find: Callable[[int, int], memoryview | None] | None = getattr(file, "in_place", None)
    return find(offset, nbytes) if find is not None else None


def revision_of(files: Iterable[SourceFile]) -> str | None:
    """Return the commit of a hub at which files are read; None for files that lie anywhere else, or at several."""
    found = {getattr(file, "revision", "") for file in files}
    return found.pop() or None if len(found) == 1 else None


def fetch(wanted: Mapping[SourceFile, Ranges]) -> None:
    """Fetch short ranges of several files that will be read, all at once; nothing of what lies on the disk."""
    there = [(file, ranges) for file, ranges in wanted.items() if ranges and is_elsewhere(file)]
    if len(there) < 2:
        for file, ranges in there:
            file.expect_all(ranges)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(there), _MOST)) as pool:
        list(pool.map(lambda item: item[0].expect_all(item[1]), there))


Place = tuple[SourceFile, int, int]
"""A file, the first byte of a range, and its bytes."""


def announce(places: Iterable[Place], sampled: Iterable[Place] = ()) -> None:
    """Say which ranges of files elsewhere will be read, in about this order: neighbours are then fetched together.

    What is `sampled` is read once before. Nothing is fetched here, and nothing is done about files on the disk.
    """
    samples = _by_file(sampled)
    for file, ranges in _by_file(places).items():
        file.will_read(ranges, samples.get(file, ()))


def _by_file(places: Iterable[Place]) -> dict[SourceFile, list[tuple[int, int]]]:
    found: dict[SourceFile, list[tuple[int, int]]] = {}
    for file, begin, nbytes in places:
        if is_elsewhere(file):
            found.setdefault(file, []).append((begin, nbytes))
    return found


class _Reading(threading.local):
    """Which process reads what this thread makes jobs of."""

    is_elsewhere = False


_reading = _Reading()


@contextmanager
def left_to_workers() -> Iterator[None]:
    """Context manager: other processes read what jobs are made of in the block, so that nothing is fetched here."""
    before, _reading.is_elsewhere = _reading.is_elsewhere, True
    try:
        yield
    finally:
        _reading.is_elsewhere = before


def is_left_to_workers() -> bool:
    """True in a block of `left_to_workers`."""
    return _reading.is_elsewhere


class Ahead:
    """Fetches short ranges of items that are asked for one after another: with one of them those that come next.

    After the first few it takes four times as many each time, so that who asks for some items fetches no others, and
    who asks for all waits rarely.
    """

    def __init__(self, count: int, ranges_of: Callable[[int], Iterable[tuple[SourceFile, int, int]]]) -> None:
        self._ranges_of = ranges_of
        """Gives the ranges of the item of a number: its file, the first byte and the bytes."""
        self._fetched = bytearray(count)
        """By number, 1 for the items that were fetched."""
        self._many = 1
        self._asked = 0

    def ask(self, number: int) -> None:
        """Fetch what will be read of an item, unless that was done."""
        if self._fetched[number]:
            return
        wanted: dict[SourceFile, list[tuple[int, int]]] = {}
        left = self._many
        while left and 0 <= number < len(self._fetched):
            for file, begin, nbytes in self._ranges_of(number):
                wanted.setdefault(file, []).append((begin, max(nbytes, _LEAST) if self._many == 1 else nbytes))
            self._fetched[number] = 1
            left -= 1
            number = self._fetched.find(0, number)
        self._asked += 1
        if self._asked > _ALONE:
            self._many = min(4 * self._many, _ITEMS)
        fetch(wanted)


_LEAST = 16 << 10
"""Bytes that are fetched of what is asked for alone, as more of it may be wanted."""

_ITEMS = 4096
"""Items that are fetched together at most."""

_ALONE = 4
"""Items that are fetched alone at first: a version, a byte order, a pickle, and what somebody asks for by name."""
