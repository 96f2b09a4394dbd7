"""Map independent jobs on an executor: how all heavy work runs.

A job is a few megabytes of a checkpoint: chunks of its values (`parallel/tensor_chunks.py`), or ranges of its files
(`parallel/byte_ranges.py`). What it answers is small, and answers come back in the order of the jobs, so that any
number of workers gives the same. The executor is given; `workers` makes one of threads for those who begin a request.
Jobs and answers can be pickled, so that the workers may be processes, on other machines where these see the same files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_cli.files.at_once import Place, announce, left_to_workers

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from ckpt_cli.files.source import SourceFile

JOB = 4 << 20
"""Bytes of a job, from which on the next one begins."""

AHEAD = 16
"""Jobs that are under way at a time."""

_LOCAL = threading.local()

_Job = TypeVar("_Job")
_Answer = TypeVar("_Answer")


@contextmanager
def workers(jobs: int) -> Iterator[Executor]:
    """Context manager: an executor of `jobs` threads, or of one a processor for 0.

    Jobs that have not begun when an error ends it are dropped.
    """
    from concurrent.futures import ThreadPoolExecutor

    from ckpt_cli.files.system import processors

    pool = ThreadPoolExecutor(jobs or processors())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def shares_memory(executor: Executor) -> bool:
    """True if what is fetched here is there for the workers too."""
    from concurrent.futures import ThreadPoolExecutor

    return isinstance(executor, ThreadPoolExecutor)


def run(
    jobs: Iterable[_Job],
    work: Callable[[_Job], _Answer],
    executor: Executor,
    ahead: int = AHEAD,
    *,
    places: Callable[[_Job], Iterable[Place]] | None = None,
) -> Iterator[_Answer]:
    """Yield the answer of `work` to each job, in order; a few jobs are under way at a time, the rest is not yet made.

    `places`, a function of a module, gives what a job reads, for workers that share no memory: each of these fetches
    for itself, and nothing is fetched here.

    An error, or a caller that stops to ask, drops what has not begun.
    """
    running: deque[Future[_Answer]] = deque()
    is_apart = not shares_memory(executor)
    try:
        for job in _quietly(jobs) if is_apart else jobs:
            if len(running) >= ahead:
                yield running.popleft().result()
            running.append(executor.submit(_announced, work, job, places) if is_apart else executor.submit(work, job))
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


_END = object()


def _quietly(jobs: Iterable[_Job]) -> Iterator[_Job]:
    """Yield jobs that are made without fetching anything ahead."""
    rest = iter(jobs)
    while True:
        with left_to_workers():
            job: Any = next(rest, _END)
        if job is _END:
            return
        yield job


def _announced(work: Callable[[_Job], _Answer], job: _Job, places: Callable[[_Job], Iterable[Place]] | None) -> _Answer:
    """Work on a job in another process, where nobody has announced what it reads."""
    announce(places(job) if places is not None else ())
    return work(job)


def grouped(items: Iterable[tuple[_Job, int]], most: int = JOB) -> Iterator[list[_Job]]:
    """Group pairs of an item and its bytes into jobs of about `most` bytes."""
    group: list[_Job] = []
    nbytes = 0
    for item, size in items:
        group.append(item)
        nbytes += size + _ITEM
        if nbytes >= most:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def in_file_order(
    items: Iterable[_Job], place: Callable[[_Job], tuple[SourceFile, int] | None], files: Sequence[SourceFile]
) -> list[_Job]:
    """Return items in the order in which their first bytes stand in some files; those without a place come last."""
    numbers = {file: number for number, file in enumerate(files)}

    def key(item: _Job) -> tuple[int, int]:
        found = place(item)
        return (len(numbers), 0) if found is None else (numbers[found[0]], found[1])

    return sorted(items, key=key)


_ITEM = 32 << 10
"""Bytes that could be gone through in the time that an item takes by itself."""


def kept() -> dict[int, Any]:
    """Return what this thread keeps from one chunk of a job to the next, by number."""
    found: dict[int, Any] = _LOCAL.__dict__.setdefault("kept", {})
    return found


def buffer(nbytes: int, which: int = 0) -> memoryview:
    """Return a buffer of `nbytes` bytes, each thread's own."""
    buffers: dict[int, bytearray] = _LOCAL.__dict__.setdefault("buffers", {})
    found = buffers.get(which)
    if found is None or len(found) < nbytes:
        found = buffers[which] = bytearray(nbytes)
    return memoryview(found)[:nbytes]
