"""Pointers to a journal that stands beside another file: whoever opens only one file of several finds it too.

.OTHER.ckpt-journal: magic | name of the file that the journal stands beside
"""

from __future__ import annotations

import os
from contextlib import suppress

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.durable import sync_folder, write_all
from ckpt_cli.files.hidden import journal_path
from ckpt_cli.files.local import LocalFile

_MAGIC = b"ckpt-journal-of\n"


def write_pointer(path: str, first: str) -> None:
    """Note beside a file that the journal which is about it stands beside another one, called `first`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, _MAGIC + os.fsencode(first), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def pointed_to(log: str) -> str | None:
    """The file beside which the journal stands that a pointer points to; None for a journal or a torn pointer."""
    try:
        with LocalFile(log, follow=False) as pointer:
            if pointer.size > len(_MAGIC) + 255 or pointer.read(0, min(len(_MAGIC), pointer.size)) != _MAGIC:
                return None
            name = os.fsdecode(pointer.read(len(_MAGIC), pointer.size - len(_MAGIC)))
    except FileNotFoundError:  # the edit ended just now
        return None
    return os.path.join(os.path.dirname(log), os.path.basename(name)) if name else None


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
