"""New files, all or nothing: written beside their target, made durable, then renamed over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckpt_cli.errors import BusyError, CkptError
from ckpt_cli.files.durable import sync_folder
from ckpt_cli.files.hidden import staging_path, temporary_path
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.locks import try_lock
from ckpt_cli.files.owners import take_after, warn_of_lost


@contextmanager
def replacing(target: str, *, mode_of: str | None = None) -> Iterator[LocalFile]:
    """An empty file to write, which becomes `target` when the block ends well and vanishes when it does not.

    It gets the owner, group and permissions of `target` where that exists, else the permissions of `mode_of`. A
    temporary file that a killed process left is replaced; one that a living process is writing raises BusyError.
    """
    real = os.path.realpath(target)
    path = temporary_path(target)
    file = locked_temporary(target)
    lost = None
    try:
        if os.path.exists(real):
            lost = take_after(file.fd, os.stat(real))
        elif mode_of is not None and os.path.exists(mode_of):
            os.fchmod(file.fd, os.stat(mode_of).st_mode & 0o777)
        yield file
        os.fsync(file.fd)
        os.replace(path, real)
        sync_folder(os.path.dirname(real))
        warn_of_lost(target, lost)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(path)
        raise
    finally:
        file.close()


def locked_temporary(target: str) -> LocalFile:
    """Create the temporary file of a target and lock it, so that a leftover can be told from a write under way."""
    path = temporary_path(target)
    with _gone_when_interrupted(path):
        while True:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))
            with suppress(FileNotFoundError):
                file = LocalFile(path, write=True, follow=False)
                try:
                    if _locked_in_place(file, target):
                        os.ftruncate(file.fd, 0)
                        return file
                except BaseException:
                    file.close()
                    raise
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
    """Remove a temporary file, or an empty folder, unless a living process is writing it."""
    with suppress(OSError, CkptError):
        if not os.path.isdir(path):
            with LocalFile(path, write=True, follow=False) as file:
                if try_lock(file.fd):
                    os.unlink(path)
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_lock(fd):
                os.rmdir(path)
        finally:
            os.close(fd)


def _locked_in_place(file: LocalFile, target: str) -> bool:
    """Lock the file; False when another process has renamed or removed it before we had the lock."""
    if not try_lock(file.fd):
        raise BusyError("another process is writing it; try again when it is done", path=target)
    try:
        return os.path.samestat(os.lstat(file.path), os.fstat(file.fd))
    except FileNotFoundError:
        return False


@contextmanager
def creating(path: str, *, mode_of: str) -> Iterator[LocalFile]:
    """A new file within a folder that is not in place yet, durable when the block ends."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    with LocalFile(path, write=True, follow=False) as file:
        os.fchmod(file.fd, os.stat(mode_of).st_mode & 0o777)
        yield file
        os.fsync(file.fd)


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
    except BaseException:
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
        yield path
    finally:
        _remove_folder(path)
        os.close(fd)


def _create_folder(path: str, target: str) -> int:
    """Create the temporary folder and lock it; returns its open descriptor."""
    with _gone_when_interrupted(path):
        while True:
            with suppress(FileExistsError):
                os.mkdir(path)
            with suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if not try_lock(fd):
                        raise BusyError("another process is writing it; try again when it is done", path=target)
                    if os.path.samestat(os.lstat(path), os.fstat(fd)):
                        for name in os.listdir(path):
                            os.unlink(os.path.join(path, name))
                        return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)


def _remove_folder(path: str) -> None:
    """Remove a folder of files."""
    with suppress(FileNotFoundError):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
