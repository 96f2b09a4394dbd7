"""Copies as cheap as the file system can make them: shared blocks, else in the kernel, holes kept."""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator

from ckpt_cli.files import system
from ckpt_cli.files.at_once import in_place, is_elsewhere
from ckpt_cli.files.source import ByteSource, LocalFile, SourceFile

CHUNK = 16 << 20
"""Bytes copied at a time."""

PIECE = 8 << 20
"""Bytes read at a time of what the system cannot copy, as it is compressed or changed on its way."""

AHEAD = 32 << 20
"""Bytes that are fetched from elsewhere while those before them are written."""

Progress = Callable[[int], object]
"""Called with the number of bytes done since the last call."""

_WORTH = 1 << 20
"""Bytes from which on it pays to ask the system to begin writing them to the disk."""

_CHECKED = 1 << 20
"""Bytes read at a time for a checksum: what the processor's cache holds."""

OnProgress = Callable[[int, int], object]
"""Called with the bytes done and the bytes in all."""

_SOON = 0.9
"""Seconds of work without a report: to compute the bytes in all may take as long."""


def no_progress(_: int) -> None:
    """Report nothing."""


def counting(on_progress: OnProgress | None, total: Callable[[], int], otherwise: Progress = no_progress) -> Progress:
    """Return a `Progress` that reports the total so far to `on_progress`; `otherwise` where that is None."""
    if on_progress is None:
        return otherwise
    begin, done, whole = time.monotonic(), 0, 0

    def progress(nbytes: int) -> None:
        nonlocal done, whole
        done += nbytes
        if nbytes and time.monotonic() - begin > _SOON:
            whole = whole or max(total(), 1)
            on_progress(min(done, whole), whole)

    return progress


def copy_into(source: SourceFile, target: LocalFile, progress: Progress = no_progress) -> None:
    """Copy a whole file."""
    if system.share_blocks(source.fd, target.fd):
        target.size = source.size
        progress(source.size)
    else:
        copy_range(source, 0, source.size, target, 0, progress)


def copy_range(
    source: SourceFile, begin: int, nbytes: int, target: LocalFile, at: int, progress: Progress = no_progress
) -> None:
    """Copy a range to offset `at` of the target, which ends there; what is a hole becomes one."""
    source.check(begin, nbytes)
    os.ftruncate(target.fd, at + nbytes)
    target.size = at + nbytes
    reached = begin
    for first, last in _data_ranges(source, begin, begin + nbytes):
        _copy(source, first, last, target.fd, at + first - begin, progress)
        progress(first - reached)
        reached = last
    progress(begin + nbytes - reached)


def crc_of_range(source: SourceFile, begin: int, nbytes: int, crc: int = 0) -> int:
    """The CRC-32 of a range, going on from `crc`; holes are not read."""
    from ckpt_cli.files.crc32 import of_zeros

    reached, end = begin, begin + nbytes
    for first, last in _data_ranges(source, begin, end):
        crc = of_zeros(first - reached, crc)
        for at in range(first, last, _CHECKED):
            count = min(_CHECKED, last - at)
            fetched = in_place(source, at, count)
            crc = zlib.crc32(source.read(at, count) if fetched is None else fetched, crc)
        reached = last
    return of_zeros(end - reached, crc)


def _data_ranges(source: SourceFile, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that are not holes."""
    if source.fd < 0:
        yield begin, end
        return
    position = begin
    while position < end and (part := system.next_data(source.fd, position, end)) is not None:
        first, position = part
        if first < end:
            yield first, min(position, end)


def _copy(source: SourceFile, begin: int, end: int, target: int, at: int, progress: Progress) -> None:
    if is_elsewhere(source):
        _copy_fetched(source, begin, end, target, at, progress)
        return
    in_kernel = source.fd >= 0
    while begin < end:
        count = min(CHUNK, end - begin)
        copied = system.copy_in_kernel(source.fd, target, count, begin, at) if in_kernel else None
        if copied is None:
            in_kernel = False
            data = system.read_at(source.fd, count, begin) if source.fd >= 0 else source.read(begin, count)
            system.write_all(target, data, at)
            copied = len(data)
        if not copied:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        write_back(target, at, copied)
        begin += copied
        at += copied
        progress(copied)


def _copy_fetched(source: SourceFile, begin: int, end: int, target: int, at: int, progress: Progress) -> None:
    """Copy a range of a file elsewhere; while a piece is written the next ones are fetched."""
    room = memoryview(b"")
    asked = begin if end - begin > PIECE else end  # a short range was announced with others (`formats/writing.py`)
    while begin < end:
        while asked < min(end, begin + AHEAD):
            source.expect(asked, min(PIECE, end - asked))
            asked += PIECE
        count = min(PIECE, end - begin)
        piece = in_place(source, begin, count)
        if piece is None:
            room = room or memoryview(bytearray(count))
            piece = room[:count]
            source.read_into(piece, begin)
        system.write_all(target, piece, at)
        write_back(target, at, len(piece))
        begin += len(piece)
        at += len(piece)
        progress(len(piece))


class _NearCopy(LocalFile):
    """A file without a name that goes when nothing refers to it."""

    def __init__(self, path: str) -> None:
        from tempfile import TemporaryFile

        with TemporaryFile() as file:
            super().__init__(path, fd=os.dup(file.fileno()))

    def __del__(self) -> None:
        self.close()


def near_copy(source: SourceFile, begin: int, nbytes: int) -> SourceFile:
    """Return a copy of a range of a file elsewhere in a temporary file, for what has to go through it many times."""
    copy = _NearCopy(source.path)
    copy_range(source, begin, nbytes, copy, 0)
    return copy


def long_view(source: ByteSource, begin: int, nbytes: int) -> memoryview:
    """Return a view of a range; a long one of a file elsewhere is of a temporary copy, which memory need not hold."""
    if nbytes <= _HELD or not is_elsewhere(source.whole):
        return source.view(begin, nbytes)
    source.check(begin, nbytes)
    return near_copy(source.whole, source.begin + begin, nbytes).view(0, nbytes)


_HELD = 64 << 20
"""Bytes of a file elsewhere that are held in memory at once."""


def beginnings(source: ByteSource) -> Iterator[memoryview]:
    """Yield longer and longer beginnings of a source elsewhere, then all of it; of any other only that."""
    if is_elsewhere(source.whole):
        yield from (memoryview(source.read(0, nbytes)) for nbytes in _BEGINNINGS if nbytes < source.size)
    yield long_view(source, 0, source.size)


_BEGINNINGS = (256 << 10, 4 << 20, 32 << 20)


def write_back(fd: int, at: int, nbytes: int) -> None:
    """Let the system begin to write a new range to the disk, so that it need not wait for all of it at the end."""
    if nbytes >= _WORTH:
        system.begin_to_write(fd, at, nbytes)
