"""Threads and a progress line for the commands that read every byte."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.terminal import terminal
from ckpt_cli.files.elsewhere import current
from ckpt_cli.parallel.map import workers
from ckpt_cli.render.text import bytes_text

if TYPE_CHECKING:
    from ckpt_cli.edits.expression_tensors import Sources

__all__ = ["Jobs", "expression_sources", "progress", "watched", "workers"]

Jobs = Annotated[int, typer.Option("-j", "--jobs", min=0, max=256, metavar="N", help="Threads; 0 is one a processor.")]

_FIRST = 1.0
"""Seconds before progress is shown."""

_EVERY = 0.1
"""Seconds between two of its lines."""


@contextmanager
def expression_sources(jobs: int) -> Iterator[Sources]:
    """Context manager: the checkpoints that expressions take tensors of, and an executor that makes new ones."""
    from ckpt_cli.edits.expression_tensors import sources

    with workers(jobs) as executor, sources(executor) as of:
        yield of


@contextmanager
def watched() -> Iterator[Callable[[int, int], None] | None]:
    """Context manager: the callback of `progress` where stderr is a terminal, else None, so that nothing is counted."""
    if not sys.stderr.isatty():
        yield None
        return
    with progress() as on_progress:
        yield on_progress


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """Context manager: a callback for bytes done and total bytes, which a terminal shows on one line after a second."""
    begin = time.monotonic()
    shown = 0.0
    wide = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal shown, wide
        now = time.monotonic()
        if now - begin < _FIRST or now - shown < _EVERY or terminal.is_paging:
            return
        if not sys.stderr.isatty():
            return
        shown = now
        left = (now - begin) * (total - done) / max(done, 1)
        line = f"{bytes_text(done)} of {bytes_text(total)}, {left:.0f} s left"
        if fetched := current().nbytes:
            line += f", {bytes_text(fetched)} over the network"
        wide = max(wide, len(line))
        sys.stderr.write(f"\r{line:{wide}}")
        sys.stderr.flush()

    try:
        yield on_progress
    finally:
        if shown:
            sys.stderr.write(f"\r{'':{wide}}\r")
            sys.stderr.flush()
