"""One writer at a time, by an advisory lock on the file itself."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from ckpt_cli.errors import BusyError
from ckpt_cli.files.local import LocalFile

PATIENCE = 10.0
"""Seconds to wait for another process to finish."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
"""What file systems without advisory locks answer; there, nothing can be known of other writers."""


def lock(file: LocalFile) -> None:
    """Take the file's exclusive lock, held until it is closed; raises BusyError after `PATIENCE` seconds.

    Its size is then what the writer before left.
    """
    wait_for(file.fd, file.path)
    file.size = os.fstat(file.fd).st_size


def wait_for(fd: int, path: str) -> None:
    """Take the lock of an open file or folder, which is called `path`; raises BusyError after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not try_lock(fd):
        if time.monotonic() >= deadline:
            raise BusyError("another process is writing it; try again when it is done", path=path)
        time.sleep(0.05)


def try_lock(fd: int) -> bool:
    """Take the lock of an open file or folder if it is free; where the file system has no locks, it always is."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
