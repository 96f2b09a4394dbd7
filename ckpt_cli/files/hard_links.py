"""Edits in place of files with several names (hard links): whoever opens another name finds the journal too.

Before the first patch, an extended attribute of the file gets the path under which it is edited; it goes before the
journal does. An attribute that somebody planted can do no more than a planted journal: it only says where to look.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.sidecars import journal_path
from ckpt_cli.files.source import SourceFile

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
        if not hasattr(os, "setxattr"):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        os.setxattr(file.fd, _NOTE, os.fsencode(os.path.realpath(file.path)))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        raise RefusedError(
            "it has several names (hard links), and the file system cannot note an edit so that each of them finds it",
            path=file.path,
            hint="write the result to a new file with -o OUT",
        ) from error
    os.fsync(file.fd)


def forget_edit(file: SourceFile) -> None:
    """Remove the note of an edit that is done, durably."""
    if _noted(file) is not None:
        os.removexattr(file.fd, _NOTE)
        os.fsync(file.fd)


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
    if hasattr(os, "getxattr"):
        with suppress(OSError):
            return os.fsdecode(os.getxattr(file.fd, _NOTE))
    return None
