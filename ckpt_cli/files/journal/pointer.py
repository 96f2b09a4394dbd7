"""Pointers to a journal that stands beside another file: whoever opens only one file of several finds it too.

.OTHER.ckpt-journal: magic | name of the file that the journal stands beside | 0 | OTHER
"""

from __future__ import annotations

import os
from contextlib import suppress

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.hidden_files import open_journal
from ckpt_cli.files.sidecars import journal_path
from ckpt_cli.files.system import create_private, sync, sync_folder, write_all

_MAGIC = b"ckpt-journal-of\n"
_LIMIT = 8192


def write_pointer(path: str, first: str) -> None:
    """Note beside the file `path` that the journal which is about it stands beside another one, called `first`."""
    fd = create_private(journal_path(path))
    try:
        write_all(fd, _MAGIC + os.fsencode(first) + b"\0" + os.fsencode(os.path.basename(path)), 0)
        sync(fd)
    finally:
        os.close(fd)


def pointed_to(log: str) -> str | None:
    """The file beside which the journal stands that a pointer points to; None for a journal or a torn pointer."""
    names = names_in(log)
    return os.path.join(os.path.dirname(log), os.path.basename(names[0])) if names else None


def names_in(log: str) -> list[str]:
    """The names that a pointer holds: where its journal stands, and whose it is; nothing for a journal."""
    try:
        with open_journal(log) as pointer:
            if pointer.size > _LIMIT or pointer.read(0, min(len(_MAGIC), pointer.size)) != _MAGIC:
                return []
            names = pointer.read(len(_MAGIC), pointer.size - len(_MAGIC)).split(b"\0")
    except FileNotFoundError:  # the edit ended just now
        return []
    return [os.fsdecode(name) for name in names if name]


def neighbour(log: str, name: str) -> str:
    """The path of another file that a journal may patch: one beside it, with a pointer back to the journal."""
    path = os.path.join(os.path.dirname(log), os.path.basename(name))
    if not os.path.lexists(journal_path(path)) or journal_path(pointed_to(journal_path(path)) or path) != log:
        raise RefusedError(
            f"a journal would patch {name!r}, which does not point back to it", path=log, hint=f"remove it: rm {log!r}"
        )
    return path


def remove_journal(path: str, *pointers: str) -> None:
    """Remove a journal, and only when that is durable the pointers to it."""
    for paths in ([path], pointers):
        removed = False
        for each in paths:
            with suppress(FileNotFoundError):
                os.unlink(each)
                removed = True
        if removed:
            sync_folder(os.path.dirname(path))
