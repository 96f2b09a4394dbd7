"""Durable writes: all of the bytes, and a folder's own entries."""

from __future__ import annotations

import os


def sync_folder(folder: str) -> None:
    """Make the folder's own entries durable: a new, renamed or removed file."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of some bytes at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
