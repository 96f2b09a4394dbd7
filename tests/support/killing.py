"""Edits that end at one of their system calls as if the process had been killed there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHANGES = ("pwrite", "ftruncate", "fsync", "replace", "rename", "unlink", "link", "rmdir", "mkdir", "setxattr",
           "removexattr", "copy_file_range")  # fmt: skip
"""Calls that change something: none of them has an effect once the process is dead."""


class Killed(BaseException):
    """The end of the process, which no handler of it gets to see: after it no call changes anything."""


@contextmanager
def killed_at(name: str, at: int) -> Iterator[None]:
    """Let the process be dead from the given call of a function of `os` on; the block ends well either way."""
    count = 0
    dead = False

    def watched(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def either(*args: Any, **options: Any) -> Any:
            nonlocal count, dead
            count += call == name
            dead = dead or (call == name and count == at)
            if dead:
                raise Killed
            return real(*args, **options)

        return either

    with pytest.MonkeyPatch.context() as patch:
        for call in CHANGES:
            patch.setattr(os, call, watched(call, getattr(os, call)))
        try:
            yield
        except Killed:
            return
