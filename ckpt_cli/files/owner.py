"""Owner, group and permissions of a file that takes the place of another one."""

from __future__ import annotations

import os
from contextlib import suppress

from ckpt_cli.files.system import set_mode, set_owner


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
