"""A file elsewhere as a source of bytes: pages that are kept, and ranges that are fetched ahead and side by side.

Small reads go through pages, of which the last used 32 MiB are kept in memory, and others in a temporary file. The
first request for a file is for its first 256 KiB, and a read within the last 256 KiB fetches all of these: together
they have the directory and the pickle of most files. Other reads fetch what they need, and twice as much each time
while a file is read in order. Long reads pass the pages by, in parts that are fetched side by side. `expect` begins to
fetch a part; at most 64 MiB are under way, or there and not yet read. Of ranges that `will_read` announces, neighbours
are one part.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from ckpt_cli.errors import TruncatedError
from ckpt_cli.remote.fetched import KEPT, PAGE, PART, Fetched, Part, pieces, workers
from ckpt_cli.remote.plan import NEAR, Piece, Plan, together
from ckpt_cli.remote.store import Object

BEGINNING = 256 << 10
"""Bytes of the first request for a file, and of the one for its end."""

_AHEAD = 4 << 20
"""Bytes that one request fetches at most while a file is read in order by small reads."""

_LONG = 1 << 20
"""Bytes up to which a range that is expected grows."""

_BY = PART
"""Bytes from which on a read passes the pages by: of what is shorter and was not announced, most is a document."""

_SHORTEST = 64 << 10
"""Bytes that one request of `expect` fetches at least."""

_RUN = PART // PAGE
"""Pages of one request of `expect_all`, at most."""

_NEAR_OF_ALL = 512 << 10
"""Bytes between two small ranges up to which one request fetches both, of a file of which nearly all will be read."""

_SIDE_BY_SIDE = 4
"""Requests of `expect_all` at a time: their runs are no more than the pages that memory has room for."""

_MISS = 16 << 10
"""Bytes that a small read fetches at least."""

_THERE = 64 << 10
"""Bytes that are there up to which they are fetched again with what lies around them."""


class RemoteFile:
    """A file elsewhere, of one version; raises ChangedError where its server has another one.

    It can be pickled, and is opened in another process without a request.
    """

    begin = 0
    in_memory = False
    fd = -1
    writable = False

    def __init__(self, path: str, found: Object, fetched: Fetched, key: object = None) -> None:
        """Of a `path` that is one file's only among all that share what was fetched, unless a `key` is."""
        self.path = path
        self.size = found.version.size
        """Bytes in it."""
        self.seen = identity_of(found)
        """What stands for the identity of a file on the disk."""
        self.was_read = False
        self.on_read: Callable[[], None] | None = None
        self._object = found
        self._fetched = fetched
        self._key = fetched.number_of((key or path, found.version))
        self._next = -1
        """The page after those that were fetched last; -1 before the first."""
        self._reach = -1
        """The byte before which everything near it is expected."""
        self._step = _SHORTEST
        """Bytes that are expected at least, while short ranges are expected in order."""
        self._run = _MISS
        """Bytes that the last miss fetched, while the file is read in order."""
        self._plan = Plan()

    @property
    def revision(self) -> str:
        """The commit of a hub that it is read at; empty where its server has none."""
        return self._object.revision

    @property
    def whole(self) -> RemoteFile:
        """The file itself."""
        return self

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from `offset`; raises TruncatedError where the file is too short."""
        self.check(offset, nbytes)
        if nbytes <= PAGE - offset % PAGE and nbytes:
            page = self._fetched.page(self._key, offset // PAGE)
            if page is not None:
                return page[offset % PAGE : offset % PAGE + nbytes]
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises TruncatedError where the file is too short."""
        end = offset + len(buffer)
        self.check(offset, len(buffer))
        at = offset
        while at < end:
            part, until = self._part_at(at, end)
            if part is None:
                self._fill(buffer[at - offset : until - offset], at)
            else:
                until = min(until, end)
                buffer[at - offset : until - offset] = self._taken(part, at, until - at)
            at = until

    def _part_at(self, begin: int, end: int) -> tuple[Part | None, int]:
        """Return the part that has a byte, if need be a planned one that is now begun, and where it ends.

        Where there is none, None and where the next one begins, at most `end`.
        """
        part, until = self._fetched.part_at(self._key, begin, end)
        if part is None and self._begin_planned(begin, until):
            return self._fetched.part_at(self._key, begin, end)
        return part, until

    def _taken(self, part: Part, offset: int, nbytes: int) -> memoryview:
        """Return bytes of a part that was expected, once they are there, and count them as read."""
        assert part.future is not None
        try:
            part.future.result()
        except BaseException:
            self._fetched.failed(self._key, part)
            raise
        self._fetched.was_read(self._key, part, offset, offset + nbytes)
        return part.data[offset - part.begin : offset - part.begin + nbytes]

    def _fill(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from pages, and from the server where it is long."""
        end = offset + len(buffer)
        if len(buffer) < _BY:
            self._fetch_pages(offset, end)
        at = offset
        while at < end and (page := self._fetched.page(self._key, at // PAGE)) is not None:
            piece = page[at % PAGE : at % PAGE + end - at]
            buffer[at - offset : at - offset + len(piece)] = piece
            at += len(piece)
        if at < end:
            self._fetch(buffer[at - offset :], at)

    def _ask(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer by one request, and count its bytes."""
        self._object.read_into(buffer, offset)
        self._fetched.count(len(buffer))

    def _fetch(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the server, in parts side by side."""
        parts = list(pieces(offset, offset + len(buffer)))
        fetching = [workers().submit(self._ask, buffer[low - offset : high - offset], low) for low, high in parts[1:]]
        try:
            low, high = parts[0]
            self._ask(buffer[: high - low], low)
            for future in fetching:
                future.result()
        except BaseException:
            for future in fetching:
                future.cancel()
            for future in fetching:
                if not future.cancelled():
                    future.exception()
            raise

    def _fetch_pages(self, begin: int, end: int) -> None:
        """Fetch the pages of a range that are not there, and more where the file is read in order."""
        runs = self._fetched.missing(self._key, begin // PAGE, -(-end // PAGE))
        if not runs:
            return
        first, last = runs[0][0], runs[-1][1]
        tail = max(self.size - BEGINNING, 0) // PAGE
        if first >= tail:
            first, last = tail, -(-self.size // PAGE)
        elif self._next < 0 and not first:
            last = max(last, BEGINNING // PAGE)
        elif first == self._next:
            self._run = min(2 * self._run, _AHEAD)
            last = max(last, first + self._run // PAGE)
        else:
            self._run = _MISS
            last = max(last, min(first + _MISS // PAGE, -(-self.size // PAGE)))
        self._fetch_run(first, last)
        self._next = last

    def _fetch_run(self, first: int, last: int) -> None:
        """Fetch pages by one request, and keep them."""
        low, high = first * PAGE, min(last * PAGE, self.size)
        data = bytearray(high - low)
        self._ask(memoryview(data), low)
        self._fetched.keep(self._key, first, data)

    def keep(self, data: bytes) -> None:
        """Keep bytes that came, and that the file begins with: whole pages or all of it."""
        self._fetched.count(len(data))
        self._fetched.keep(self._key, 0, data)

    def begin_to_read(self) -> None:
        """Fetch its beginning, unless that is there."""
        last = -(-min(self.size, BEGINNING) // PAGE)
        for run in self._fetched.missing(self._key, 0, last):
            self._fetch_run(*run)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes as a read-only view of what was fetched."""
        if nbytes <= PAGE:
            return memoryview(self.read(offset, nbytes))
        found = self.in_place(offset, nbytes)
        if found is not None:
            return found
        data = bytearray(nbytes)
        self.read_into(memoryview(data), offset)
        return memoryview(data).toreadonly()

    def in_place(self, offset: int, nbytes: int) -> memoryview | None:
        """Return the bytes as a read-only view of one part that was expected; None where they have to be read."""
        self.check(offset, nbytes)
        part, until = self._part_at(offset, offset + nbytes)
        if part is None or until < offset + nbytes:
            return None
        return self._taken(part, offset, nbytes).toreadonly()

    def expect(self, offset: int, nbytes: int) -> None:
        """Begin to fetch a range that will be read, unless much is under way already; never waits.

        A short range becomes a longer one, as those who read a file in order expect the ranges behind it next; twice
        as long each time that they do. Of what was announced, whole pieces are fetched.
        """
        end = min(offset + nbytes, self.size)
        if not 0 <= offset < end:
            return
        while (piece := self._plan.piece_at(offset)) is not None:
            if not piece.is_begun and not self._begin_piece(piece):
                return
            offset = piece.end
            if offset >= end:
                return
        runs = self._fetched.missing(self._key, offset // PAGE, -(-end // PAGE))
        if not runs:
            return
        offset = max(offset, runs[0][0] * PAGE)
        if runs[-1][1] * PAGE < end:
            end = runs[-1][1] * PAGE
        elif offset > self._reach or end < self._reach - _LONG:
            self._step = _SHORTEST
            end = min(max(end, offset + self._step), self.size)
        elif end > self._reach:
            self._step = min(2 * self._step, _LONG)
            end = min(max(end, self._reach + self._step), self.size)
        if self._fetched.expect(self._key, offset, end, self._fetch_part):
            self._reach = max(end, self._reach) if offset <= self._reach else end

    def _fetch_part(self, part: Part) -> None:
        self._ask(part.data, part.begin)

    def will_read(self, ranges: Sequence[tuple[int, int]], sampled: Sequence[tuple[int, int]] = ()) -> None:
        """Note ranges, pairs of offset and bytes, that will be read, in about this order.

        Nothing is fetched before the first of some neighbours is expected or read: then all of these are, in one piece.
        What is `sampled` is read once before.
        """
        self._fetched.keep_sampled(self._key, sampled)
        wanted = ((offset, min(offset + nbytes, self.size)) for offset, nbytes in ranges)
        self._plan.add((offset, end) for offset, end in wanted if 0 <= offset < end)

    def _begin_planned(self, offset: int, end: int) -> bool:
        """Begin to fetch the piece that has a byte, unless there is none or it was begun; True if it was done now.

        Nothing is fetched where the bytes before `end` are there.
        """
        piece = self._plan.piece_at(offset)
        if piece is None or piece.is_begun:
            return False
        return bool(self._fetched.missing(self._key, offset // PAGE, -(-end // PAGE))) and self._begin_piece(piece)

    def _begin_piece(self, piece: Piece) -> bool:
        """Begin to fetch what is not there of a piece; False where too much is under way."""
        missing = self._fetched.missing(self._key, piece.begin // PAGE, -(-piece.end // PAGE))
        wanted = [(max(first * PAGE, piece.begin), min(last * PAGE, piece.end)) for first, last in missing]
        for begin, end, there in together(wanted, _THERE):
            if not self._fetched.expect(self._key, begin, end, self._fetch_part, (*piece.gaps, *there)):
                return False
        piece.is_begun = True
        return True

    def expect_all(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch many small ranges side by side, and keep them as pages; waits until they are there.

        Those that are near each other are fetched together. Of more than is kept only the first ones are fetched.
        """
        wanted = [(offset, min(offset + nbytes, self.size)) for offset, nbytes in ranges]
        found: list[tuple[int, int]] = []
        for offset, end in sorted(wanted):
            if 0 <= offset < end:
                found += self._fetched.missing(self._key, offset // PAGE, -(-end // PAGE))
        left = KEPT // PAGE
        runs: list[tuple[int, int]] = []
        near = _NEAR_OF_ALL if self._fetched.is_whole(self._key) else NEAR
        for first, end, _ in together(found, near // PAGE):
            runs += [(low, min(low + _RUN, end)) for low in range(first, min(end, first + left), _RUN)]
            left -= end - first
            if left <= 0:
                break
        while runs:  # no more at a time than memory has room for
            some, runs = runs[:_SIDE_BY_SIDE], runs[_SIDE_BY_SIDE:]
            for future in [workers().submit(self._fetch_run, first, last) for first, last in some]:
                future.result()

    def check(self, offset: int, nbytes: int) -> None:
        """Raise TruncatedError for a range that is not all there."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedError(
                f"bytes {offset}–{offset + nbytes} are promised, the file has {self.size}", path=self.path
            )

    def note_whole(self) -> None:
        """Note that nearly all of it will be read: longer ranges between small ones are fetched, where all is kept."""
        if self.size <= KEPT:
            self._fetched.note_whole(self._key)

    def note_read(self) -> None:
        """Note that a value is read."""
        self.on_read, self.was_read = None, True

    def has_changed(self) -> bool:
        """Return False: every reply is compared with the version, and one of another version is an error."""
        return False

    def is_whole(self) -> bool:
        """Return True, as for `has_changed`."""
        return True

    def forget(self) -> None:
        """Do nothing: views are copies."""

    def close(self) -> None:
        """Drop what is fetched ahead."""
        self._fetched.forget(self._key)

    def __reduce__(self) -> tuple[Callable[[str, bytes], RemoteFile], tuple[str, bytes]]:
        return _reopened, (self.path, pickle.dumps(self._object))


def identity_of(found: Object) -> tuple[int, int, int, int]:
    """Return a number for the version of a file, in the form of the identity of a file on the disk."""
    version = found.version
    return 0, int.from_bytes((version.tag or version.changed).encode()[:256], "big"), version.size, 0


@lru_cache(maxsize=1024)
def _reopened(path: str, found: bytes) -> RemoteFile:
    """Return a file that was sent to this process: the same each time, so that what it fetched is kept."""
    return RemoteFile(path, pickle.loads(found), _fetched_of_process(), key=found)  # noqa: S301 - of our own process


@cache
def _fetched_of_process() -> Fetched:
    return Fetched()
