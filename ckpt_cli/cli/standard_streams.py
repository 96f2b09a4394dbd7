"""The standard streams of a process: closed ones are filled, and their errors end no command with a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from ckpt_cli.errors import OutputError


class _Stdout(io.FileIO):
    """Standard output: a failed write raises OutputError, but for a pipe that nobody reads."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if _is_broken_pipe(error):
                raise BrokenPipeError(*error.args) from error
            if error.errno == errno.EBADF:
                raise OutputError("standard output is closed, so the answer cannot be printed") from error
            raise OutputError(f"standard output: {error.strerror}") from error


class _Stderr(io.FileIO):
    """Standard error: what cannot be written is dropped, as there is nowhere else to report it."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        with suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def prepare() -> None:
    """Replace stdout and stderr by streams that are never None and fail as described.

    Each closed descriptor gets /dev/null, so that no checkpoint is opened as file 0, 1 or 2 and printed into.
    """
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:  # opened to be read, so that a write to it fails
        pass
    os.close(fd)
    sys.stdout = _over(_Stdout(1, "w", closefd=False), sys.stdout)
    sys.stderr = _over(_Stderr(2, "w", closefd=False), sys.stderr)


def finish() -> None:
    """Write what is still buffered; a failure was reported when the command ended."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, OutputError, ValueError):
            stream.flush()


def _over(raw: io.FileIO, old: TextIO | None) -> TextIO:
    """A text stream over `raw` with the settings of the one that Python made."""
    line_buffering = raw.fileno() == 2 or raw.isatty()
    encoding = old.encoding if old is not None else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=line_buffering)


def _is_broken_pipe(error: OSError) -> bool:
    """True if a write failed because nobody reads the other end of a pipe; Windows calls that an invalid argument."""
    return isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL)
