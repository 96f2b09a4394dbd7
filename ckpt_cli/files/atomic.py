"""New files, all or nothing: written beside their target, made durable, then renamed over it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt_cli.errors import BusyError, CkptError, RefusedError
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.hidden_files import (
    remove_left_over,
    require_fitting,
    require_own_folder,
    staging_path,
    temporary_path,
    unlink_unlocked,
)
from ckpt_cli.files.lock import try_lock
from ckpt_cli.files.outcome import Outcome, outcome_of, state, stating
from ckpt_cli.files.places import slashed
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import open_folder, set_mode, set_owner, stat_of, sync, sync_folder, user


@contextmanager
def replacing(target: str, *, mode_of: str | None = None) -> Iterator[LocalFile]:
    """An empty file to write, which becomes `target` when the block ends well and vanishes when it does not.

    It gets the owner, group and permissions of `target` where that exists, else the permissions of `mode_of`. A
    temporary file that a killed process left is replaced; one that a living process is writing raises BusyError. An
    error has the outcome.
    """
    real = spelled(target)
    path = temporary_path(target)
    file = locked_temporary(target)
    lost = None
    try:
        if os.path.exists(real):
            lost = take_after(file.fd, os.stat(real))
        elif mode_of is not None and os.path.exists(mode_of):
            set_mode(file.fd, os.stat(mode_of).st_mode)
        yield file
        sync(file.fd)
        os.replace(path, real)
        sync_folder(os.path.dirname(real))
        warn_of_lost(target, lost)
    except BaseException as error:
        state(error, Outcome.DONE if is_at(real, file.fd) else Outcome.UNCHANGED, target)
        with suppress(OSError):
            if is_at(path, file.fd):  # once it was renamed, the name may be that of another process's file
                os.unlink(path)
        raise
    finally:
        file.close()


def is_at(path: str, fd: int) -> bool:
    """True if an open file or folder is the one that a path names."""
    try:
        return os.path.samestat(os.lstat(path), stat_of(fd))
    except OSError:
        return False


def locked_temporary(target: str) -> LocalFile:
    """Create the temporary file of a target and lock it, so that a leftover differs from a write under way.

    Raises RefusedError where something that is not a leftover of ours has its name, or the target's name is too long.
    """
    require_fitting(target)
    path = temporary_path(target)
    with _gone_when_interrupted(path):
        while True:
            try:
                file = LocalFile(path, write=True, create=True)
            except FileExistsError:
                remove_left_over(path, target)
                continue
            try:
                if try_lock(file.fd) and is_at(path, file.fd):  # else another process took it for a leftover
                    return file
            except BaseException:
                file.close()
                raise
            file.close()


@contextmanager
def temporary_of(target: str) -> Iterator[LocalFile]:
    """A locked temporary file of a target that the block gives another name; where it does not, the file goes."""
    file = locked_temporary(target)
    try:
        yield file
    finally:
        with suppress(OSError):
            if is_at(file.path, file.fd):
                os.unlink(file.path)
        file.close()


@contextmanager
def _gone_when_interrupted(path: str) -> Iterator[None]:
    """Remove what may have been created when an interrupt comes, before anybody else knows of it."""
    try:
        yield
    except KeyboardInterrupt:
        remove_unlocked(path)
        raise


def remove_unlocked(path: str) -> None:
    """Remove a temporary file or folder of ours, unless a living process is writing it."""
    with suppress(OSError, CkptError):
        if os.lstat(path).st_uid != user():
            return
        if not os.path.isdir(path):
            unlink_unlocked(path)
            return
        fd = open_folder(path)
        try:
            if try_lock(fd):
                _remove_folder(path)
        finally:
            os.close(fd)


@contextmanager
def creating(path: str, *, mode_of: str) -> Iterator[LocalFile]:
    """A new file within a folder that is not in place yet, durable when the block ends."""
    with LocalFile(path, write=True, create=True) as file:
        if os.path.exists(mode_of):  # it may lie elsewhere than on the disk
            set_mode(file.fd, os.stat(mode_of).st_mode)
        yield file
        sync(file.fd)


@contextmanager
def replacing_folder(target: str) -> Iterator[str]:
    """An empty folder to fill, which becomes `target` when the block ends well and vanishes when it does not.

    `target` must not be there, or be an empty folder. What a killed process left is removed; a folder that a living
    one fills raises BusyError.
    """
    path = temporary_path(target)
    fd = _create_folder(path, target)
    try:
        yield path
        sync_folder(path)
        os.rename(path, os.path.realpath(target))  # onto an empty folder at the most
        sync_folder(os.path.dirname(os.path.realpath(target)))
    except BaseException as error:
        real = os.path.realpath(target)
        state(error, Outcome.DONE if is_at(real, fd) else Outcome.UNCHANGED, target)
        with suppress(OSError):
            if is_at(path, fd):
                _remove_folder(path)
        raise
    finally:
        os.close(fd)


@contextmanager
def staging_folder(target: str) -> Iterator[str]:
    """An empty folder within `target`, for files that are to be moved into it; it goes when the block ends."""
    path = staging_path(target)
    fd = _create_folder(path, target)
    try:
        with stating(target) as stage:
            try:
                yield path
            except BaseException as error:
                stage.outcome = outcome_of(error) or Outcome.UNCHANGED
                with suppress(OSError):
                    _remove_folder(path)
                raise
            stage.outcome = Outcome.DONE
            _remove_folder(path)
    finally:
        os.close(fd)


def _create_folder(path: str, target: str) -> int:
    """Create the temporary folder and lock it; returns its open descriptor."""
    require_fitting(target)
    with _gone_when_interrupted(path):
        while True:
            created = False
            with suppress(FileExistsError):
                os.mkdir(path)
                created = True
            with suppress(FileNotFoundError):
                require_own_folder(path)
                fd = open_folder(path)
                try:
                    is_ours = try_lock(fd) and is_at(path, fd)
                    if created and is_ours:
                        return fd
                    if not created and not is_ours:
                        raise BusyError("another process is writing it; try again when it is done", path=target)
                    if is_ours:
                        _remove_folder(path)  # what a killed process left is created again
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)


def _remove_folder(path: str) -> None:
    """Remove a folder of files, and of folders of files."""
    with suppress(FileNotFoundError):
        for folder, folders, names in os.walk(path, topdown=False):  # which does not follow links
            for name in names:
                os.unlink(os.path.join(folder, name))
            for name in folders:
                below = os.path.join(folder, name)
                (os.unlink if os.path.islink(below) else os.rmdir)(below)
        os.rmdir(path)


# --- owner, group and permissions of what is replaced -----------------------------------------------------------------


def take_after(fd: int, old: os.stat_result) -> str | None:
    """Give an open file the owner, group and permissions of an old one.

    The group is kept where only the owner cannot be. Returns what could not be kept, in words; None where all was.
    """
    wanted = (old.st_uid, old.st_gid)
    if _ids(fd) != wanted:
        try:
            set_owner(fd, *wanted)
        except OSError:
            with suppress(OSError):
                set_owner(fd, -1, old.st_gid)
    set_mode(fd, old.st_mode)  # after the owner, whose change clears bits
    uid, gid = _ids(fd)
    lost = [f"user {old.st_uid}"] * (uid != old.st_uid) + [f"group {old.st_gid}"] * (gid != old.st_gid)
    return f"it belonged to {' and '.join(lost)}, which this user may not keep" if lost else None


def warn_of_lost(path: str, lost: str | None) -> None:
    """Print a warning, through Python's logging, where a file that took its place could not keep its owner."""
    if lost is not None:
        import logging

        logging.getLogger("ckpt_cli").warning("warning: %s: %s", ascii(path)[1:-1], lost)


def _ids(fd: int) -> tuple[int, int]:
    now = os.fstat(fd)
    return now.st_uid, now.st_gid


# --- what must not be replaced ---------------------------------------------------------------------------------------

_CACHES = (
    ("the Hugging Face hub's cache", r"/blobs/[0-9a-f]{40,64}$"),
    ("git-annex", r"/\.git/annex/objects/"),
    ("DVC's cache", r"/\.dvc/cache/|/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$"),
    ("git LFS's store", r"/\.git/lfs/objects/"),
)
"""Stores in which the name of a file is the hash of its content, with the paths of files in them."""


def refuse_cached(path: str) -> str:
    """Return the real path to write to; raises RefusedError where it lies in a content-addressed cache."""
    real = os.path.realpath(path)
    for owner, pattern in _CACHES:
        if re.search(pattern, slashed(real)):
            raise RefusedError(
                f"lies in {owner}, where a file's name is the hash of its content: an edit there would corrupt it",
                path=path,
                hint="write the result elsewhere with -o OUT",
            )
    return real
