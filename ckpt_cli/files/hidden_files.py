"""The hidden files that a write keeps beside its target: their names, and whose a file is that has such a name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from ckpt_cli.errors import BusyError, FormatError, RefusedError
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.lock import try_lock
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import name_limit, open_file, user

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


def one_folder(paths: Iterable[str], named: str) -> str:
    """The folder of files that are changed as one; raises RefusedError about `named` where they lie in several."""
    folders = {os.path.dirname(path) for path in paths}
    if len(folders) > 1:
        raise several_folders(named)
    return folders.pop()


def several_folders(named: str) -> RefusedError:
    """The error about files that lie too far apart to be changed as one."""
    return RefusedError(
        "its files lie in several folders, so that they cannot be changed as one",
        path=named,
        hint="write the result elsewhere with -o OUT",
    )


def require_fitting(path: str, hint: str = "choose a shorter name") -> None:
    """Raise RefusedError for a name that is longer than the file system allows."""
    folder, name = os.path.split(path)
    nbytes = len(os.fsencode(name))
    if nbytes > _EVERYWHERE and nbytes > _limit(folder):
        raise RefusedError(
            f"the name has {nbytes} bytes, and the file system allows {_limit(folder)}", path=path, hint=hint
        )


def _beside(path: str, suffix: str) -> str:
    folder, name = os.path.split(spelled(path))
    hidden = f".{name}.{suffix}"
    nbytes = len(os.fsencode(hidden))
    if nbytes > _EVERYWHERE and nbytes > min(_limit(folder), _MOST):
        import hashlib

        hidden = f".{_DIGEST}{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.{suffix}"
    return os.path.join(folder, hidden)


def _limit(folder: str) -> int:
    """Bytes of a name in a folder at most."""
    return name_limit(folder or ".") or _MOST


# --- what has such a name --------------------------------------------------------------------------------------------


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
    """True for a file of ours; what root writes belongs to the owner of the target (`files/atomic.py`)."""
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
