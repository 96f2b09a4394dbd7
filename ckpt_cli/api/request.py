"""Requests: the calls of the Python API, each with a budget of its own, and what they know of files elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckpt_cli.budget import Budget
from ckpt_cli.files.elsewhere import admitted, elsewhere

if TYPE_CHECKING:
    from ckpt_cli.files.elsewhere import Elsewhere

Path = str | os.PathLike[str]
"""Where a checkpoint is."""


@contextmanager
def request(known: Elsewhere | None = None) -> Iterator[Elsewhere]:
    """Context manager: begin a request; what is `known` of files elsewhere comes from an open checkpoint."""
    Budget().begun()
    with elsewhere(known) as found:
        yield found


def path_of(given: Path) -> str:
    """Return a path as text; that of a URL shows no password and no query, which the request remembers."""
    return admitted(os.fspath(given))
