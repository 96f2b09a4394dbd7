"""Work that waits for servers, done at once for several files instead of for one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ckpt_cli.files.source import SourceFile

_MOST = 16
"""Requests that are under way at a time."""

DOCUMENT = 256 << 10
"""Bytes at the begin, and at the end, of a file that are fetched together: most documents are no longer."""

Ranges = Sequence[tuple[int, int]]
"""Pairs of the first byte of a range and its bytes."""

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def is_elsewhere(file: SourceFile) -> bool:
    """True if reading a file may mean to wait for a server."""
    return file.fd < 0 and not file.in_memory


def at_once(work: Callable[[_Item], _Answer], items: Sequence[_Item]) -> list[_Answer]:
    """Return the answer to each item, in order; raises the first error once all that began has ended.

    What is answered beside an error is closed.
    """
    if len(items) < 2:
        return [work(item) for item in items]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(items), _MOST)) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled() and future.exception() is None:
                    close = getattr(future.result(), "close", None)
                    if close is not None:
                        close()
            raise


def fetch(wanted: Mapping[SourceFile, Ranges]) -> None:
    """Fetch short ranges of several files that will be read, all at once; nothing of what lies on the disk."""

    def fetch_of(item: tuple[SourceFile, Ranges]) -> None:
        item[0].expect_all(item[1])

    at_once(fetch_of, [(file, ranges) for file, ranges in wanted.items() if ranges and is_elsewhere(file)])
