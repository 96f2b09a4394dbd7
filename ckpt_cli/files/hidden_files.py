"""Hidden files of ckpt's own: created exclusively, and recognized if somebody else put something in their place."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ckpt_cli.errors import BusyError, FormatError, RefusedError
from ckpt_cli.files.lock import try_lock
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import open_file, user


def open_journal(path: str) -> LocalFile:
    """Open a journal or a pointer; raises RefusedError for what is not a regular file."""
    try:
        return LocalFile(path, follow=False)
    except (FormatError, IsADirectoryError) as error:
        raise _foreign(path, "a journal") from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _foreign(path, "a journal") from error


def require_trusted(journal: LocalFile, owner: int, path: str) -> None:
    """Refuse a journal of a file, or of a folder, that somebody wrote who is neither its owner, nor we, nor root."""
    author = os.fstat(journal.fd).st_uid
    if author not in (owner, user(), 0):
        raise RefusedError(
            f"a journal that another user (id {author}) wrote lies beside it",
            path=path,
            hint=f"if you do not trust that user, remove it: rm {journal.path!r}",
        )


def remove_left_over(path: str, target: str) -> None:
    """Remove the temporary file of a killed process, so that it can be created again.

    Raises BusyError where a living process writes it, RefusedError where it is not a file of ours.
    """
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or not _is_ours(found, target):
            raise _foreign(path, "a temporary file", found)
        if not unlink_unlocked(path):
            raise BusyError("another process is writing it; try again when it is done", path=target)


def _is_ours(found: os.stat_result, target: str) -> bool:
    """True for a file of ours; what root writes belongs to the owner of the target (`files/owner.py`)."""
    if found.st_uid == user():
        return True
    with suppress(FileNotFoundError):
        return user() == 0 and found.st_uid == os.stat(target).st_uid
    return False


def unlink_unlocked(path: str) -> bool:
    """Remove a temporary file unless a living process has locked it; False where one has."""
    fd = open_to_lock(path)
    try:
        found = os.fstat(fd)
        # Of several names of one file only this one goes: the lock may be that of a file which is being edited.
        if found.st_nlink == 1 and not try_lock(fd):
            return False
        if os.path.samestat(os.lstat(path), found):
            os.unlink(path)
        return True
    finally:
        os.close(fd)


def require_own_folder(path: str) -> None:
    """Raise RefusedError where what lies in the place of a temporary folder is not a folder of ours."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user():
        raise _foreign(path, "a temporary folder", found)


def open_to_lock(path: str) -> int:
    """Open a file to lock it: for writing where that is allowed, as NFS asks for it."""
    try:
        return open_file(path, write=True, follow=False)
    except PermissionError:
        return open_file(path, follow=False)


def _foreign(path: str, kind: str, found: os.stat_result | None = None) -> RefusedError:
    """The error of something that lies where a hidden file of ours goes."""
    whose = "something that ckpt did not write"
    if found is not None and found.st_uid != user():
        whose = f"something of another user's (id {found.st_uid})"
    return RefusedError(
        f"{whose} has the name of {kind}",
        path=path,
        hint=f"look at it, then remove it: rm {'-r ' if os.path.isdir(path) else ''}{path!r}",
    )
