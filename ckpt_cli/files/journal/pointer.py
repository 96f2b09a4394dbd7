"""The ways to a journal from a file that it does not stand beside: another file of the edit, or another name of it.

Beside another file of the edit stands a pointer:

    .OTHER.ckpt-journal: magic | name of the file that the journal stands beside | 0 | OTHER

The other file may lie in a folder in that of the journal, as parts of a run do: then the name begins with `../`.

A file with several names (hard links) gets the path under which it is edited as an extended attribute. It is set before
the first patch and removed before the journal. One that somebody planted can do no more than a planted journal: it
only says where to look.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.hidden_files import journal_path, open_journal, several_folders
from ckpt_cli.files.places import is_plain_name
from ckpt_cli.files.source import SourceFile
from ckpt_cli.files.system import (
    create_private,
    get_attribute,
    remove_attribute,
    set_attribute,
    sync,
    sync_folder,
    write_all,
)

_MAGIC = b"ckpt-journal-of\n"
_LIMIT = 8192


_ABOVE = "../"
"""Begins the name of a file in the folder above, beside which the journal stands."""


def write_pointer(path: str, first: str) -> None:
    """Note beside the file `path` that the journal which is about it stands beside the file `first`.

    That one is in the same folder, or in the folder above.
    """
    named = os.path.basename(first)
    if os.path.dirname(first) != os.path.dirname(path):
        named = _ABOVE + named
    fd = create_private(journal_path(path))
    try:
        write_all(fd, _MAGIC + os.fsencode(named) + b"\0" + os.fsencode(os.path.basename(path)), 0)
        sync(fd)
    finally:
        os.close(fd)


def pointed_to(log: str) -> str | None:
    """The file beside which the journal stands that a pointer points to; None for a journal or a torn pointer."""
    names = names_in(log)
    if not names:
        return None
    folder = os.path.dirname(log)
    return os.path.join(os.path.dirname(folder) if names[0].startswith(_ABOVE) else folder, os.path.basename(names[0]))


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
    """The path of another file that a journal may patch: one beside or below it, with a pointer back to the journal."""
    folder = os.path.dirname(log)
    path = os.path.join(folder, name if is_name_below(name, folder) else os.path.basename(name))
    if not os.path.lexists(journal_path(path)) or journal_path(pointed_to(journal_path(path)) or path) != log:
        raise RefusedError(
            f"a journal would patch {name!r}, which does not point back to it", path=log, hint=f"remove it: rm {log!r}"
        )
    return path


def remove_journal(path: str, *pointers: str) -> None:
    """Remove a journal, and only when that is durable the pointers to it."""
    for paths in ([path], pointers):
        removed: dict[str, None] = {}
        for each in paths:
            with suppress(FileNotFoundError):
                os.unlink(each)
                removed[os.path.dirname(each)] = None
        for folder in removed:
            sync_folder(folder)


# --- files in folders in that of the journal


def top_folder(paths: Iterable[str], named: str) -> str:
    """The folder of files that are changed as one, some of which may lie in folders in it.

    Raises RefusedError about `named` where they lie further apart.
    """
    folders = {os.path.dirname(path) for path in paths}
    above = {os.path.dirname(folder) for folder in folders}
    for top in (*folders, *above):
        if all(top in (folder, os.path.dirname(folder)) for folder in folders):
            return top
    raise several_folders(named)


def name_below(path: str, folder: str) -> str:
    """The name of a file in a folder, or in a folder in it, by which journals know it."""
    own, name = os.path.split(path)
    return name if own == folder else f"{os.path.basename(own)}/{name}"


def is_name_below(name: str, folder: str) -> bool:
    """True if a name in a journal is that of a file in its folder, or in a folder in it that is not a link."""
    first, slash, rest = name.partition("/")
    if not slash:
        return is_plain_name(name)
    if not (is_plain_name(first) and is_plain_name(rest)):
        return False
    with suppress(OSError):
        return stat.S_ISDIR(os.lstat(os.path.join(folder, first)).st_mode)
    return False


# --- other names of one file ------------------------------------------------------------------------------------------

_NOTE = "user.ckpt.journal"

_UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.E2BIG, errno.ERANGE)
"""Error numbers of a file system that cannot keep the attribute."""


def note_edit(file: SourceFile) -> None:
    """Note with a file that has several names, durably, under which of them it is edited.

    Raises RefusedError where the file system has no extended attributes.
    """
    if os.fstat(file.fd).st_nlink < 2:
        return
    try:
        set_attribute(file.fd, _NOTE, os.fsencode(spelled(file.path)))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise RefusedError(
            "it has several names (hard links), and the file system cannot note an edit so that each of them finds it",
            path=file.path,
            hint="write the result to a new file with -o OUT",
        ) from error
    sync(file.fd)


def forget_edit(file: SourceFile) -> None:
    """Remove the note of an edit that is done, durably."""
    if _noted(file) is not None:
        remove_attribute(file.fd, _NOTE)
        sync(file.fd)


def edited_elsewhere(file: SourceFile) -> str | None:
    """The other name of an open file under which an edit was begun that is not finished; None as a rule.

    Raises RefusedError where that name is not there any more, so that the edit cannot be finished.
    """
    other = _noted(file)
    if other is None:
        return None
    there = False
    with suppress(OSError, ValueError):
        there = os.path.isabs(other) and os.path.samestat(os.stat(other), os.fstat(file.fd))
    if not there:
        raise RefusedError(
            f"an edit of it under another name was interrupted, and that name is not there: {other}",
            path=file.path,
            hint=f"ckpt ls on that name finishes the edit; if this file is whole: setfattr -x {_NOTE} {file.path!r}",
        )
    return other if os.path.lexists(journal_path(other)) else None  # a journal that was removed was so on purpose


def _noted(file: SourceFile) -> str | None:
    """The name that is noted with a file, or None."""
    note = get_attribute(file.fd, _NOTE)
    return None if note is None else os.fsdecode(note)
