"""Run a command again if its file changed while it was read and nothing has been printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from ckpt_cli.errors import ChangedError
from ckpt_cli.files.elsewhere import elsewhere

T = TypeVar("T")

_SHORT = 2.0
"""Seconds of work up to which an attempt is tried again, with the files locked: a writer waits about that long."""

said: set[str] = set()
"""Lines on stderr that are not printed again."""

named: list[str] = []
"""The checkpoint on the command line, for commands in hints; empty before it is known."""

printed = False
"""True once a part of the answer was printed."""

kept = ExitStack()
"""What is open until the command has ended, however often it runs."""


def steadily(command: Callable[[], Any]) -> Any:
    """Run a command, once more where a file changed while it was read; raises ChangedError where that cannot help."""
    global printed
    printed = False
    said.clear()
    named.clear()
    return retried(command, lambda: not printed)


def retried(command: Callable[[], T], may: Callable[[], bool] = lambda: True) -> T:
    """Return the result of what prints no answer, tried once more where a file changed soon and `may` allows it."""
    begin = time.process_time()
    try:
        return command()
    except ChangedError:
        if not may() or time.process_time() - begin > _SHORT:
            raise
    from ckpt_cli.files.unchanged import holding

    with holding(), elsewhere(again=True):
        return command()
