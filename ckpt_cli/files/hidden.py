"""The names of the hidden files that a write keeps beside its target."""

from __future__ import annotations

import os


def journal_path(path: str) -> str:
    """The journal of an edit of `path` in place, in the folder of the real file."""
    return _beside(path, "ckpt-journal")


def temporary_path(path: str) -> str:
    """The file that is written before it is renamed to `path`, in the folder of the real file."""
    return _beside(path, "ckpt-tmp")


def _beside(path: str, suffix: str) -> str:
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.{suffix}")
