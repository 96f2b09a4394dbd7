"""Standard input as the file `-`, kept in a temporary file that has no name, as checkpoints are not read in order."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.files.places import STANDARD_INPUT, mounted
from ckpt_cli.files.source import Identity, LocalFile

_PIECE = 1 << 20
"""Bytes that are copied at a time."""


@contextmanager
def standard_input() -> Iterator[None]:
    """Context manager: the path `-` is standard input within the block, read when it is first opened."""
    folder = _Folder()
    try:
        with mounted(STANDARD_INPUT, folder):
            yield
    finally:
        folder.close()


class _Folder:
    """A folder of one file, whose path is `-`; nothing lies beside it."""

    is_local = False

    def __init__(self) -> None:
        self._close: Callable[[], None] | None = None
        self._fd = -1

    def close(self) -> None:
        """Remove the temporary file; files that are open stay so."""
        if self._close is not None:
            self._close()
            self._close = None
            self._fd = -1

    def is_folder(self, path: str) -> bool:  # noqa: ARG002
        """Return False."""
        return False

    def is_file(self, path: str) -> bool:
        """True for `-`."""
        return path == STANDARD_INPUT

    def exists(self, path: str) -> bool:
        """True for `-`."""
        return path == STANDARD_INPUT

    def is_link(self, path: str) -> bool:  # noqa: ARG002
        """Return False."""
        return False

    def is_taken(self, path: str) -> bool:
        """True for `-`."""
        return path == STANDARD_INPUT

    def size_of(self, path: str) -> int:
        """Return the number of bytes."""
        return os.fstat(self._spooled(path)).st_size

    def names_in(self, path: str, most: int | None = None) -> list[str]:  # noqa: ARG002
        """Raise NotADirectoryError."""
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def leading_names(self, path: str) -> list[str]:
        """Return the names in a folder."""
        return self.names_in(path)

    def is_listed(self, path: str) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def present(self, path: str, names: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return an empty list."""
        return []

    def files_below(self, path: str) -> Iterator[tuple[str, str]]:  # noqa: ARG002
        """Yield nothing."""
        return iter(())

    def open(self, path: str) -> LocalFile:
        """Open it to be read."""
        return LocalFile(path, fd=os.dup(self._spooled(path)))

    def begin_all(self, paths: Sequence[str]) -> None:
        """Do nothing: it is there."""

    def head_of(self, path: str, nbytes: int) -> bytes:
        """Return at most the first `nbytes` bytes."""
        with closing(self.open(path)) as file:
            return file.read(0, min(nbytes, file.size))

    def can_write(self, path: str) -> bool:  # noqa: ARG002
        """Return False."""
        return False

    def identity_of(self, path: str) -> Identity | None:
        """Return the identity and state; None for any path but `-`."""
        return LocalFile.identity(os.fstat(self._spooled(path))) if path == STANDARD_INPUT else None

    def links_of(self, path: str) -> int:
        """Return 1: it has this name only."""
        self._spooled(path)
        return 1

    def is_same(self, path: str, other: str) -> bool:
        """True if both are `-`."""
        return path == other == STANDARD_INPUT

    def canonical(self, path: str) -> str:
        """Return the path."""
        return path

    def _spooled(self, path: str) -> int:
        """Return a descriptor of the whole of standard input: its own where it is a file, else that of a copy.

        Raises LimitError if it is too long, OSError if it cannot be read or copied.
        """
        if path != STANDARD_INPUT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if self._fd < 0:
            if stat.S_ISREG(os.fstat(0).st_mode) and not os.lseek(0, 0, os.SEEK_CUR):
                fd = os.dup(0)
                self._fd, self._close = fd, lambda: os.close(fd)
            else:
                self._copy()
        return self._fd

    def _copy(self) -> None:
        from tempfile import TemporaryFile

        spool = TemporaryFile()  # noqa: SIM115 - open for as long as the folder is
        try:
            while piece := os.read(0, _PIECE):
                if spool.tell() + len(piece) > limits.STANDARD_INPUT:
                    raise LimitError(f"standard input is longer than {limits.STANDARD_INPUT:,} bytes", path="-")
                spool.write(piece)
            spool.flush()
        except BaseException:
            spool.close()
            raise
        self._fd, self._close = spool.fileno(), spool.close
