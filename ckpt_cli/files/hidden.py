"""The names of the hidden files that a write keeps beside its target."""

from __future__ import annotations

import os

UNDO_RECORD = "ckpt-undo"
"""What the name of an edit's record ends in."""


def journal_path(path: str) -> str:
    """The journal of an edit of `path` in place, in the folder of the real file."""
    return _beside(path, "ckpt-journal")


def temporary_path(path: str) -> str:
    """The file that is written before it is renamed to `path`, in the folder of the real file."""
    return _beside(path, "ckpt-tmp")


def undo_record_path(backup: str) -> str:
    """The record of the edit that kept a backup (`files/undo_record.py`)."""
    return _beside(backup, UNDO_RECORD)


def staging_path(folder: str) -> str:
    """The folder within a folder in which files wait that are to be moved into it."""
    return os.path.join(os.path.realpath(folder), ".new.ckpt-tmp")


def target_of_journal(name: str) -> str | None:
    """The name of the file whose journal is called so; None for what is no journal."""
    begin, end = ".", ".ckpt-journal"
    return name[len(begin) : -len(end)] if name.startswith(begin) and name.endswith(end) else None


def _beside(path: str, suffix: str) -> str:
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.{suffix}")
