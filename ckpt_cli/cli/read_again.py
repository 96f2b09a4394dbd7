"""Run a command again if its file changed while it was read and nothing has been printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ckpt_cli.errors import ChangedError

_SHORT = 2.0
"""Seconds of work up to which an attempt is tried again, with the files locked: a writer waits about that long."""

said: set[str] = set()
"""Lines on stderr that are not printed again."""

named: list[str] = []
"""The checkpoint on the command line, for commands in hints; empty before it is known."""

printed = False
"""True once a part of the answer was printed."""


def steadily(command: Callable[[], Any]) -> Any:
    """Run a command, once more where a file changed while it was read; raises ChangedError where that cannot help."""
    global printed
    printed = False
    said.clear()
    named.clear()
    begin = time.process_time()
    try:
        return command()
    except ChangedError:
        if printed or time.process_time() - begin > _SHORT:
            raise
    from ckpt_cli.files.unchanged import holding

    with holding():
        return command()
