"""The names of the hidden files that a write keeps beside its target."""

from __future__ import annotations

import os

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.system import name_limit

UNDO_RECORD = "ckpt-undo"
"""The suffix of an edit's record."""

_EVERYWHERE = 143
"""Bytes of a name that every file system takes: eCryptfs has the lowest limit."""

_MOST = 255
"""Bytes of a hidden name at most, whatever the file system says: some count characters instead."""

_DIGEST = "name-sha256-"
"""Begins a hidden name that has a digest in place of a target's name which is too long to be a part of it."""

_JOURNAL = "ckpt-journal"
_TEMPORARY = "ckpt-tmp"


def journal_path(path: str) -> str:
    """The journal of an edit of `path` in place, in the folder of the real file."""
    return _beside(path, _JOURNAL)


def temporary_path(path: str) -> str:
    """The file that is written before it is renamed to `path`, in the folder of the real file."""
    return _beside(path, _TEMPORARY)


def undo_record_path(backup: str) -> str:
    """The record of the edit that kept a backup (`files/undo_record.py`)."""
    return _beside(backup, UNDO_RECORD)


def staging_path(folder: str) -> str:
    """The folder within a folder in which files wait that are to be moved into it."""
    return os.path.join(os.path.realpath(folder), ".new.ckpt-tmp")


def is_journal(name: str) -> bool:
    """True if the name is that of a journal, or of a pointer to one."""
    return name.startswith(".") and name.endswith(f".{_JOURNAL}")


def is_temporary(name: str) -> bool:
    """True if the name is that of a temporary file."""
    return name.startswith(".") and name.endswith(f".{_TEMPORARY}")


def target_of_journal(name: str) -> str | None:
    """The name of the file whose journal has this name; None for a digest, where only the journal itself has it."""
    target = name[1 : -len(f".{_JOURNAL}")]
    return None if target.startswith(_DIGEST) else target


def require_fitting(path: str, hint: str = "choose a shorter name") -> None:
    """Raise RefusedError for a name that is longer than the file system allows."""
    folder, name = os.path.split(path)
    nbytes = len(os.fsencode(name))
    if nbytes > _EVERYWHERE and nbytes > _limit(folder):
        raise RefusedError(
            f"the name has {nbytes} bytes, and the file system allows {_limit(folder)}", path=path, hint=hint
        )


def _beside(path: str, suffix: str) -> str:
    folder, name = os.path.split(os.path.realpath(path))
    hidden = f".{name}.{suffix}"
    nbytes = len(os.fsencode(hidden))
    if nbytes > _EVERYWHERE and nbytes > min(_limit(folder), _MOST):
        import hashlib

        hidden = f".{_DIGEST}{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{suffix}"
    return os.path.join(folder, hidden)


def _limit(folder: str) -> int:
    """Bytes of a name in a folder at most."""
    return name_limit(folder or ".") or _MOST
