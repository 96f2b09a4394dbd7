"""Where every error of a command becomes one line on stderr, a hint, and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from ckpt_cli.errors import CkptError
from ckpt_cli.render.text import escaped

TROUBLE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports of a process that SIGPIPE ended."""

_UsageError: Any = typer.BadParameter.__mro__[1]
"""Typer's own copy of click's UsageError, which it does not export."""


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; returns its exit code, whatever happens."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that is not UTF-8
    try:
        code = command()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("CKPT_DEBUG"):
            import traceback

            traceback.print_exc()
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Say what went wrong in one line; returns the exit code."""
    problem, hint = _words(error)
    sys.stderr.write(f"ckpt: {escaped(problem)}\n")
    if hint:
        sys.stderr.write(f"hint: {escaped(hint)}\n")
    return error.exit_code if isinstance(error, CkptError) else TROUBLE


def _words(error: Exception) -> tuple[str, str | None]:
    """The problem and the hint."""
    if isinstance(error, CkptError):
        return str(error), error.hint
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        return error.format_message(), f"{context.command_path} --help" if context else None
    if isinstance(error, OSError):
        return _os_words(error)
    if isinstance(error, MemoryError):
        return "there is not enough memory", None
    if isinstance(error, typer.Abort):
        return "stopped", None
    return (
        f"this is a bug of ckpt, not of the file: {type(error).__name__}: {error}",
        "CKPT_DEBUG=1 shows where; please report it",
    )


def _os_words(error: OSError) -> tuple[str, str | None]:
    """What the operating system says, with the file that it says it of."""
    problem = error.strerror or str(error)
    name = error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    hint = "the file is as it was; free some space, or write elsewhere with -o OUT" if _is_full(error) else None
    return (f"{name}: {problem}" if isinstance(name, str) else problem), hint


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
