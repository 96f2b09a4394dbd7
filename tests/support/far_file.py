"""A file elsewhere that counts, and the ledger of what was asked of its server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckpt_cli.errors import TruncatedError
from ckpt_cli.files.source import Identity

PAGE = 16 << 10
HEAD = TAIL = 256 << 10
CACHE = 64 << 20
DIRECT = 1 << 20
"""Bytes from which on a read goes past the cache."""
PART = 8 << 20
"""Bytes of one request of a long read."""
AT_ONCE = 16
"""Requests that are under way at a time."""


@dataclass(slots=True)
class Ledger:
    """What a command asked of the server."""

    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Each request: what it was (`get`, `list`), of which path, and the bytes of its answer."""
    waits: int = 0
    """The times that the main thread waited for an answer, requests at once counted as one: they take their time."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, path: str, nbytes: int = 0) -> None:
        """Count one request."""
        with self._lock:
            self.requests.append((kind, path, nbytes))

    def wait(self, requests: int = 1) -> None:
        """Count the round trips that some requests at once take."""
        if threading.current_thread() is threading.main_thread():
            self.waits += -(-requests // AT_ONCE)

    @property
    def count(self) -> int:
        """Requests."""
        return len(self.requests)

    @property
    def nbytes(self) -> int:
        """Bytes of all answers."""
        return sum(nbytes for _, _, nbytes in self.requests)

    def of(self, kind: str) -> int:
        """Requests of one kind."""
        return sum(each == kind for each, _, _ in self.requests)


class FarFile:
    """A file elsewhere, with the page cache and the reading ahead of `remote/source.py`."""

    begin = 0
    in_memory = False
    fd = -1
    writable = False

    def __init__(self, path: str, real: str, ledger: Ledger, *, listed: bool = False, begun: bool = False) -> None:
        self.path, self._real, self._ledger = path, real, ledger
        self.size = os.stat(real).st_size
        self.seen: Identity = (0, 0, self.size, 0)
        self.was_read = False
        self.on_read: Callable[[], None] | None = None
        self._pages: dict[int, None] = {}
        self._ahead: list[list[int]] = []
        """Ranges that were asked for ahead: first and last byte, and the bytes that were not yet read."""
        self._next, self._run = -1, 1
        self._begun = not listed
        self._lock = threading.RLock()
        self.largest_view = 0
        if not listed:
            self._get(0, HEAD)
            if not begun:
                ledger.wait()

    @property
    def whole(self) -> FarFile:
        """The file itself."""
        return self

    def _get(self, begin: int, end: int) -> None:
        end = min(end, self.size)
        self._ledger.note("get", self.path, max(end - begin, 0))
        for page in range(begin // PAGE, -(-end // PAGE)):
            self._pages.pop(page, None)
            self._pages[page] = None
        while len(self._pages) * PAGE > CACHE:
            del self._pages[next(iter(self._pages))]

    def _missing(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The runs of pages of a range that are not in the cache, as ranges of bytes."""
        runs: list[list[int]] = []
        for page in range(begin // PAGE, -(-end // PAGE)):
            if page in self._pages:
                self._pages.pop(page)
                self._pages[page] = None
            elif runs and runs[-1][1] == page:
                runs[-1][1] = page + 1
            else:
                runs.append([page, page + 1])
        return [(first * PAGE, min(last * PAGE, self.size)) for first, last in runs]

    def _fetch(self, begin: int, end: int) -> None:
        with self._lock:
            if begin >= end or self._take_ahead(begin, end):
                return
            if not self._begun:
                self._begun = True
                if end <= HEAD:
                    self._get(0, HEAD)
                    self._ledger.wait()
                    return
            if end - begin >= DIRECT:
                parts = range(begin, end, PART)
                for at in parts:
                    self._ledger.note("get", self.path, min(PART, end - at))
                self._ledger.wait(len(parts))
                return
            missing = self._missing(begin, end)
            for first, last in missing:
                if first >= self.size - TAIL:
                    self._get(max(self.size - TAIL, 0) // PAGE * PAGE, self.size)
                else:
                    self._run = min(self._run * 2, (4 << 20) // PAGE) if first == self._next else 1
                    last = max(last, first + self._run * PAGE)
                    self._get(first, last)
                    self._next = last
                self._ledger.wait()

    def _take_ahead(self, begin: int, end: int) -> bool:
        """True if a range was asked for ahead; what was read whole is dropped."""
        cover = sorted(each for each in self._ahead if each[0] < end and begin < each[1])
        at = begin
        for first, last, _ in cover:
            if first > at:
                return False
            at = max(at, last)
        if at < end:
            return False
        for each in cover:
            each[2] -= min(end, each[1]) - max(begin, each[0])
            if each[2] <= 0:
                self._ahead.remove(each)
        return True

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        self.check(offset, nbytes)
        if self.on_read is not None:
            self.on_read()
        self._fetch(offset, offset + nbytes)
        with open(self._real, "rb") as file:
            return os.pread(file.fileno(), nbytes, offset)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes."""
        return self._bytes(offset, nbytes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer."""
        buffer[:] = self._bytes(offset, len(buffer))

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes."""
        self.largest_view = max(self.largest_view, nbytes)
        return memoryview(self._bytes(offset, nbytes))

    def expect(self, offset: int, nbytes: int) -> None:
        """Begin to fetch a range, as far as there is room for it."""
        self.check(offset, nbytes)
        with self._lock:
            held = sum(last - first for first, last, _ in self._ahead)
            covered = any(first <= offset and offset + nbytes <= last for first, last, _ in self._ahead)
            if not nbytes or covered or held + nbytes > CACHE or not self._missing(offset, offset + nbytes):
                return
            for at in range(offset, offset + nbytes, PART):
                size = min(PART, offset + nbytes - at)
                self._ledger.note("get", self.path, size)
                self._ahead.append([at, at + size, size])

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch many short ranges at once."""
        with self._lock:
            self._begun = True
            pages = {page for at, nbytes in ranges for page in range(at // PAGE, -(-(at + nbytes) // PAGE)) if nbytes}
            runs: list[list[int]] = []
            for page in sorted(pages - self._pages.keys()):
                if runs and runs[-1][1] == page:
                    runs[-1][1] = page + 1
                else:
                    runs.append([page, page + 1])
            for first, last in runs:
                self._get(first * PAGE, last * PAGE)
            self._ledger.wait(len(runs))

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedError(
                f"bytes {offset}–{offset + nbytes} are promised, the file has {self.size}", path=self.path
            )

    def note_read(self) -> None:
        """Note that a value is read."""
        self.on_read, self.was_read = None, True

    def has_changed(self) -> bool:
        """Return False: each reply would have said so."""
        return False

    def is_whole(self) -> bool:
        """Return True."""
        return True

    def forget(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
