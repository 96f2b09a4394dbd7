"""One writer at a time, by an advisory lock on the file itself."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

from ckpt_cli.errors import BusyError
from ckpt_cli.files import system
from ckpt_cli.files.source import LocalFile

PATIENCE = 10.0
"""Seconds to wait for another process to finish."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""Error numbers of file systems without advisory locks; there, nothing can be known of other writers."""


def lock(file: LocalFile) -> None:
    """Take the file's exclusive lock, held until it is closed; raises BusyError after `PATIENCE` seconds.

    Its size is then what the writer before left.
    """
    wait_for(file.fd, file.path)
    file.size = os.fstat(file.fd).st_size


def wait_for(fd: int, path: str) -> None:
    """Take the lock of an open file or folder, which is called `path`; raises BusyError after `PATIENCE` seconds."""
    if try_lock(fd) or any(try_lock(fd) for _ in pauses(PATIENCE)):
        return
    raise BusyError("another process is writing it; try again when it is done", path=path)


def pauses(seconds: float) -> Iterator[None]:
    """Sleep before each try, longer from one to the next, until the seconds are over."""
    deadline = time.monotonic() + seconds
    pause = 0.001
    while time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.03)
        yield


def try_lock(fd: int) -> bool:
    """Take the lock of an open file or folder if it is free; where the file system has no locks, it always is."""
    try:
        if not system.lock(fd):
            return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True
    info = os.fstat(fd)
    _own[info.st_dev, info.st_ino] = fd
    return True


def try_share(fd: int) -> bool | None:
    """Take the lock that readers share, if no writer has it; None where the file system has no locks."""
    try:
        return system.lock(fd, shared=True)
    except OSError:  # whatever the trouble is, it is not one of reading
        return None


_own: dict[tuple[int, int], int] = {}
"""The descriptor by which this process locked a file exclusively, by device and inode; it may be closed by now."""


def is_own(fd: int) -> bool:
    """True if this process itself has the file behind a descriptor locked, by another descriptor."""
    info = os.fstat(fd)
    owner = _own.get((info.st_dev, info.st_ino))
    if owner is None or owner == fd:
        return False
    try:
        return os.path.samestat(os.fstat(owner), info)
    except OSError:  # closed
        return False
