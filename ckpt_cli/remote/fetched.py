"""What was fetched of files elsewhere: pages that are kept, parts that are fetched ahead, and the threads for it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import IO
from weakref import WeakSet

from ckpt_cli.remote.blocks import Block, Blocks

PAGE = 4 << 10
"""Bytes that are kept together."""

_PAGES = (32 << 20) // PAGE
"""Pages that are kept in memory, of all files together."""

KEPT = 1 << 30
"""Bytes of pages that are kept in a temporary file, once memory has no room for them."""

PART = 8 << 20
"""Bytes of one request of a long read, at most."""

_EXPECTED = 64 << 20
"""Bytes that are fetched ahead and not yet read, of all files together."""

_REST = 8
"""The share of a part that may be left unread when it is dropped to make room, as a divisor."""

_WORKERS = 16
"""Requests at a time."""


@cache
def _workers(process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - threads do not come along when a process forks
    """Return the threads of a process that fetch; one pool serves all files, and it is made when it is needed."""
    return ThreadPoolExecutor(_WORKERS, "ckpt-fetch")


def workers() -> ThreadPoolExecutor:
    """Return the threads that fetch."""
    return _workers(os.getpid())


class Part:
    """A range that is being fetched ahead, or is there."""

    __slots__ = ("_read", "begin", "block", "born", "data", "end", "future", "left")

    def __init__(self, begin: int, end: int, born: int, block: Block, gaps: Iterable[tuple[int, int]] = ()) -> None:
        self.begin = begin
        self.end = end
        self.born = born
        """Bytes that had been expected before it."""
        self.left = end - begin
        """Bytes that have not been read yet."""
        self.block = block
        """What its bytes are in."""
        self.data = memoryview(block)[: end - begin]
        """Its bytes; as long as anybody has this part or a view of it, the block cannot be used again."""
        self.future: Future[None] | None = None
        self._read: list[tuple[int, int]] = []
        """The ranges that were read, or that nobody reads, apart from each other and in order."""
        for gap in gaps:
            self.was_read(*gap)

    def was_read(self, begin: int, end: int) -> None:
        """Take a range from what is left to read; bytes may be read more than once, as those of samples are."""
        kept = []
        for low, high in self._read:
            if high < begin or low > end:
                kept.append((low, high))
            else:
                self.left += high - low
                begin, end = min(low, begin), max(high, end)
        self.left -= end - begin
        self._read = sorted([*kept, (begin, end)])


class _There:
    """The pages that are there, by file and number, so that long ranges are looked up at once."""

    def __init__(self) -> None:
        self._marks: dict[tuple[int, int], bytearray] = {}
        """By file and number of a group, a byte for each of its pages: 1 for those that are there."""

    def mark(self, page: tuple[int, int], there: bool) -> None:
        """Note that a page is there or not."""
        file, number = page
        group = (file, number // _GROUP)
        if there and group not in self._marks:
            self._marks[group] = bytearray(_GROUP)
        if group in self._marks:
            self._marks[group][number % _GROUP] = there

    def missing(self, file: int, first: int, end: int) -> list[tuple[int, int]]:
        """Return the runs of pages, from one to before another, that are not there."""
        runs: list[tuple[int, int]] = []
        for base in range(first // _GROUP * _GROUP, end, _GROUP):
            marks = self._marks.get((file, base // _GROUP), _NOTHING)
            at, last = max(first - base, 0), min(end - base, _GROUP)
            while (at := marks.find(0, at, last)) >= 0:
                until = marks.find(1, at, last)
                until = last if until < 0 else until
                if runs and runs[-1][1] == base + at:
                    runs[-1] = runs[-1][0], base + until
                else:
                    runs.append((base + at, base + until))
                at = until
        return runs


_GROUP = 128
"""Pages that are looked up together."""

_NOTHING = bytes(_GROUP)


class _Spill:
    """Pages in a temporary file without a name, for which memory had no room: they are not fetched again."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        """The first byte and the bytes of each page."""
        self._end = 0

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._places

    def put(self, key: tuple[int, int], data: bytes) -> None:
        """Keep a page, unless it is there; where the disk has no room it is not kept."""
        if key in self._places or len(self._places) >= KEPT // PAGE:
            return
        if self._file is None:
            from tempfile import TemporaryFile

            with suppress(OSError):
                self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - it goes with this object
        with suppress(OSError):
            if self._file is not None:
                self._file.seek(self._end)
                if self._file.write(data) == len(data):
                    self._places[key] = self._end, len(data)
                    self._end += len(data)

    def get(self, key: tuple[int, int]) -> bytes | None:
        """Return a page; None where it is not there."""
        place = self._places.get(key)
        if place is None or self._file is None:
            return None
        with suppress(OSError):
            self._file.seek(place[0])
            data = self._file.read(place[1])
            if len(data) == place[1]:
                return data
        del self._places[key]
        return None


_all: WeakSet[Fetched] = WeakSet()


def _forked() -> None:
    for fetched in list(_all):
        fetched.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Fetched:
    """What was fetched of all files of one command or one open checkpoint, and what is being fetched."""

    def __init__(self) -> None:
        _all.add(self)
        self.nbytes = 0
        """Bytes that came over the network, of all files together."""
        self._lock = threading.Lock()
        self._pages: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._spill = _Spill()
        self._there = _There()
        self._blocks = Blocks(PART)
        self._expected = 0
        """Bytes under way, or there and not yet read."""
        self._asked = 0
        """Bytes that were ever expected."""
        self._parts: dict[int, list[Part]] = {}
        self._numbers: dict[object, int] = {}
        self._whole: set[int] = set()
        """Files of which nearly all will be read."""
        self._sampled: set[tuple[int, int, int]] = set()
        """Ranges of parts, by file, that are read once more than counts."""

    def forked(self) -> None:
        """Begin with the pages only in a process that was forked: the threads that fetch are in the other one."""
        self._lock = threading.Lock()
        self._spill = _Spill()  # both would move about in one file
        self._there = _There()
        for page in self._pages:
            self._there.mark(page, True)
        self._parts = {}
        self._expected = 0

    def number_of(self, file: object) -> int:
        """Return the number by which a version of a file is called here."""
        with self._lock:
            return self._numbers.setdefault(file, len(self._numbers))

    def count(self, nbytes: int) -> None:
        """Count bytes that came over the network."""
        with self._lock:
            self.nbytes += nbytes

    def page(self, file: int, number: int) -> bytes | None:
        """Return a page of a file, which is now the one used last; None if it is not there."""
        with self._lock:
            found = self._pages.get((file, number))
            if found is not None:
                self._pages.move_to_end((file, number))
                return found
            found = self._spill.get((file, number))
            self._there.mark((file, number), found is not None)
            return found

    def missing(self, file: int, first: int, end: int) -> list[tuple[int, int]]:
        """Return the runs of pages, from one to before another, that are not there."""
        with self._lock:
            return self._there.missing(file, first, end)

    def keep(self, file: int, first: int, data: bytes | bytearray) -> None:
        """Keep pages of a file from the first one on, which the data begin with; the last may be short."""
        with self._lock:
            for at in range(0, len(data), PAGE):
                page = (file, first + at // PAGE)
                self._pages[page] = bytes(data[at : at + PAGE])
                self._there.mark(page, True)
            while len(self._pages) > _PAGES:
                page, oldest = self._pages.popitem(last=False)
                self._spill.put(page, oldest)
                self._there.mark(page, page in self._spill)

    def expect(
        self, file: int, begin: int, end: int, fetch: Callable[[Part], None], gaps: Sequence[tuple[int, int]] = ()
    ) -> bool:
        """Begin to fetch a range of a file, what is under way already left out; False where too much is under way.

        Nobody reads the `gaps` in it.
        """
        with self._lock:
            parts = self._parts.setdefault(file, [])
            for low, high in _without(begin, end, parts):
                self._asked += high - low
                self._drop_unread()
                if self._expected + high - low > _EXPECTED:
                    self._drop_read()
                if self._expected + high - low > _EXPECTED:
                    return False
                within = [(max(a, low), min(b, high)) for a, b in gaps if a < high and low < b]
                part = Part(low, high, self._asked, self._blocks.take(high - low), within)
                self._expected += high - low
                parts.append(part)
                part.future = workers().submit(fetch, part)
        return True

    def _drop_unread(self) -> None:
        """Drop what was fetched long ago and has not been read since, so that it does not stop all that follows."""
        for parts in self._parts.values():
            for part in [part for part in parts if self._asked - part.born > 4 * _EXPECTED]:
                if part.future is not None and part.future.done():
                    parts.remove(part)
                    self._blocks.give(part.block)
                    self._expected -= part.end - part.begin

    def _drop_read(self) -> None:
        """Drop parts of which nearly all was read: the little that lies between what readers want is never read."""
        for parts in self._parts.values():
            for part in [part for part in parts if _REST * part.left <= part.end - part.begin]:
                parts.remove(part)
                self._blocks.give(part.block)
                self._expected -= part.end - part.begin

    def part_at(self, file: int, begin: int, end: int) -> tuple[Part | None, int]:
        """Return the part that has the byte `begin`; else None, and where the next one begins, at most `end`."""
        with self._lock:
            following = end
            for part in self._parts.get(file, ()):
                if part.begin <= begin < part.end:
                    return part, part.end
                if begin < part.begin < following:
                    following = part.begin
            return None, following

    def was_read(self, file: int, part: Part, begin: int, end: int) -> None:
        """Note that a range of a part was read, which goes when all of it was; readers need not come in order."""
        with self._lock:
            if (file, begin, end) in self._sampled:
                self._sampled.remove((file, begin, end))
                return
            part.was_read(begin, end)
            if part.left <= 0:
                self._remove(file, part)

    def note_whole(self, file: int) -> None:
        """Note that nearly all of a file will be read."""
        self._whole.add(file)

    def is_whole(self, file: int) -> bool:
        """True if nearly all of a file will be read."""
        return file in self._whole

    def keep_sampled(self, file: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Note ranges, pairs of the first byte and the bytes, whose first read leaves them there for another one."""
        with self._lock:
            self._sampled.update((file, begin, begin + nbytes) for begin, nbytes in ranges)

    def failed(self, file: int, part: Part) -> None:
        """Drop a part that could not be fetched."""
        with self._lock:
            self._remove(file, part)

    def _remove(self, file: int, part: Part) -> None:
        parts = self._parts.get(file, [])
        if part in parts:
            parts.remove(part)
            self._blocks.give(part.block)
            self._expected -= part.end - part.begin

    def clear(self) -> None:
        """Drop the pages, which are fetched again when they are read."""
        with self._lock:
            self._pages.clear()
            self._spill = _Spill()
            self._there = _There()

    def forget(self, file: int) -> None:
        """Drop all that is expected of a file."""
        with self._lock:
            self._sampled = {each for each in self._sampled if each[0] != file}
            for part in self._parts.pop(file, []):
                self._expected -= part.end - part.begin
                if part.future is not None:
                    part.future.cancel()


def _without(begin: int, end: int, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a range without some parts, in pieces of at most `PART`."""
    for part in sorted(parts, key=lambda part: part.begin):
        if part.end <= begin or part.begin >= end:
            continue
        yield from pieces(begin, part.begin)
        begin = part.end
    yield from pieces(begin, end)


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield a range in pieces of at most `PART`."""
    for low in range(begin, end, PART):
        yield low, min(low + PART, end)
