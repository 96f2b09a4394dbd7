"""Every byte of some files read once, in their order, in jobs (`parallel/map.py`).

A job is a range of a file with the records and the runs of elements in it; what it answers merges with what others
answer in the order of the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field, replace
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING

from ckpt_cli.arrays.lines import lines_of
from ckpt_cli.arrays.tally import Tally, merged, tally
from ckpt_cli.dtypes import DType
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import announce, is_left_to_workers
from ckpt_cli.files.crc32 import combine
from ckpt_cli.files.source import SourceFile
from ckpt_cli.parallel import map as jobs
from ckpt_cli.parallel.map import JOB, buffer

if TYPE_CHECKING:
    from concurrent.futures import Executor

BLOCK = 2 << 20
"""Bytes that a job reads at a time, so that they are still in the processor's last cache when they are summed."""

_NEAR = 4096
"""Bytes that a job may have between two parts."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """A range of a file that one question is asked of."""

    number: int
    """The caller's number for the question: an index of the records or of the tensors."""
    begin: int
    """The first byte in the file."""
    end: int
    dtype: DType | None = None
    """Of the elements; None for a record, whose CRC is asked for."""
    big_endian: bool = False
    width: int = 0
    """Elements of a row, where rows and columns of equal elements are asked for; else 0."""
    origin: int = 0
    """The byte of the file at which the first row begins."""

    def cut(self, begin: int, end: int) -> FileRange:
        """Return the part of it within a range."""
        return replace(self, begin=max(self.begin, begin), end=min(self.end, end))

    @property
    def itemsize(self) -> int:
        """Bytes that must not be parted."""
        return self.dtype.itemsize if self.dtype is not None else 1


@dataclass(slots=True)
class Job:
    """A range of a file, and what is asked of it."""

    file: SourceFile
    begin: int
    end: int
    parts: list[FileRange] = field(default_factory=list)


@dataclass(slots=True)
class Answers:
    """The answers from the bytes, by the numbers of the parts."""

    crcs: dict[int, int] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)

    def add(self, part: FileRange, found: int | Tally) -> None:
        """Take what a part says, which follows what was taken of its number before."""
        if isinstance(found, Tally):
            self.tallies[part.number] = merged(self.tallies.get(part.number), found)
        else:
            self.crcs[part.number] = combine(self.crcs.get(part.number, 0), found, part.end - part.begin)


def jobs_of(file: SourceFile, parts: Iterable[FileRange]) -> Iterator[Job]:
    """Cut a file into jobs, in its order; parts that overlap are asked together where their elements allow it."""
    pending = [(part.begin, place, part) for place, part in enumerate(parts) if part.begin < part.end]
    heapify(pending)
    job: Job | None = None
    while pending:
        begin, place, part = pending[0]
        if job is None or not _joins(job, part, begin) or _parts_next(job, pending):
            if job is not None:
                yield job
            job = Job(file, begin, begin)
        end = min(part.end, job.begin + JOB)
        job.parts.append(part.cut(begin, end))
        job.end = max(job.end, end)
        if end < part.end:
            heapreplace(pending, (end, place, part))
        else:
            heappop(pending)
    if job is not None:
        yield job


def _joins(job: Job, part: FileRange, begin: int) -> bool:
    """True if a part from `begin` on belongs into a job, whose blocks must not cut its elements."""
    return (
        job.begin <= begin < job.begin + JOB and begin <= job.end + _NEAR and (begin - job.begin) % part.itemsize == 0
    )


def _parts_next(job: Job, pending: list[tuple[int, int, FileRange]]) -> bool:
    """True if a job had to end within the next part, where one with other elements begins: it ends before it."""
    begin, _, part = pending[0]
    after = min(pending[1:3], default=None)
    return after is not None and job.end <= begin and after[0] < part.end and not _joins(job, after[2], after[0])


def read_all(work: Iterable[Job], executor: Executor, on_progress: Callable[[int], None] = lambda _: None) -> Answers:
    """Run jobs; `on_progress` gets the bytes of each that is done, in order."""
    answers = Answers()
    work = list(work)
    announce((job.file, job.begin, job.end - job.begin) for job in work)
    for nbytes, found in jobs.run(map(_expected, work), _read, executor, places=_places):
        for part, answer in found:
            answers.add(part, answer)
        on_progress(nbytes)
    return answers


def _places(job: Job) -> list[tuple[SourceFile, int, int]]:
    """Return what a job reads."""
    return [(job.file, job.begin, job.end - job.begin)]


def _expected(job: Job) -> Job:
    """A job whose bytes the system was asked to read ahead, unless the workers share no memory."""
    if not is_left_to_workers():
        job.file.expect(job.begin, job.end - job.begin)
    return job


def _read(job: Job) -> tuple[int, list[tuple[FileRange, int | Tally]]]:
    """Read a job's bytes, block by block; how many, and what each part says."""
    room = buffer(BLOCK)
    found: list[tuple[FileRange, int | Tally]] = []
    for begin in range(job.begin, job.end, BLOCK):
        end = min(begin + BLOCK, job.end)
        block = room[: end - begin]
        job.file.read_into(block, begin)
        for part in job.parts:
            if part.begin < end and begin < part.end:
                piece = part.cut(begin, end)
                found.append((piece, _ask(piece, block[piece.begin - begin : piece.end - begin])))
    return job.end - job.begin, found


def _ask(part: FileRange, data: memoryview) -> int | Tally:
    if part.dtype is None:
        return zlib.crc32(data)
    found = tally(data, part.dtype, big_endian=part.big_endian)
    if not part.width:
        return found
    begin = (part.begin - part.origin) // part.itemsize
    return replace(found, lines=lines_of(data, begin, part.width, part.itemsize))


def total(work: Sequence[Job]) -> int:
    """Bytes that jobs read."""
    return sum(job.end - job.begin for job in work)
