"""The boundary at which every error of a command becomes one line on stderr, a hint, and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from ckpt_cli.budget import Budget
from ckpt_cli.cli.read_again import kept, named, steadily
from ckpt_cli.cli.terminal import terminal
from ckpt_cli.cli.typer_parts import UsageError
from ckpt_cli.errors import CkptError, quoted
from ckpt_cli.files.elsewhere import elsewhere
from ckpt_cli.files.interrupts import interrupt_after
from ckpt_cli.files.outcome import Outcome, hint_of, outcome_of
from ckpt_cli.render.text import escaped, name_text

TROUBLE = 2
BROKEN_PIPE = 141
"""The exit code that a shell reports for a process that SIGPIPE ended."""

_LINE = 1_000
"""Characters of a line on stderr, as a hostile file's names have no end; the middle of a longer one is left out."""

_AGAIN = 0.01
"""Seconds after which an interrupt comes again that Python dropped."""


def guarded(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code, whatever happens except an interrupt."""
    _prepare_streams()
    try:
        with _interrupts_kept():
            terminal.begin()
            try:
                code = steadily(lambda: _request(command))
            finally:
                terminal.finish()
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not _is_broken_pipe(error):
            raise  # shell completion ends so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return report_error(error)
    finally:
        kept.close()
    return code if isinstance(code, int) else 0


def _request(command: Callable[[], Any]) -> Any:
    """Run a command as a request with limits of its own, also where it runs again."""
    Budget().begun()
    with elsewhere():
        return command()


def _prepare_streams() -> None:
    """Let a terminal that is not UTF-8 show what it can, and replace a missing stream by /dev/null.

    `cli/standard_streams.py` has prepared those of the process itself.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Context manager: repeat an interrupt that Python drops because it came in a finalizer, as at every import."""
    before = sys.unraisablehook
    call_off: list[Callable[[], object]] = []

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        call_off.append(interrupt_after(_AGAIN))  # not at once: what is raised within this hook is dropped as well

    sys.unraisablehook = hook
    try:
        yield
    finally:
        for stop in call_off:
            stop()
        sys.unraisablehook = before


def _is_broken_pipe(error: BaseException) -> bool:
    """True if nobody reads stdout any more; typer makes exit 1 of it, which would mean that the answer is no."""
    return isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)


def report_error(error: Exception) -> int:
    """Print an error in one line, and where it came from if CKPT_DEBUG is set; return the exit code."""
    if os.environ.get("CKPT_DEBUG"):
        import traceback

        traceback.print_exception(error)
    problem, hint = _problem_and_hint(error)
    hint = hint and _with_file(hint, error)
    details = error.details if isinstance(error, CkptError) else ()
    lines = [("ckpt: ", _with_outcome(problem, error)), *(("  ", detail) for detail in details), ("hint: ", hint)]
    path = getattr(error, "path", None) or getattr(error, "filename", None)
    _write_lines(lines, [path] if isinstance(path, str) else [])
    return error.exit_code if isinstance(error, CkptError) else TROUBLE


_COMMAND = r"(\bckpt [a-z]+(?: --?[a-z-]+)* )FILE\b(?!\.)"
"""The beginning of a command in a hint, with the word that stands for the checkpoint."""


def _with_file(hint: str, error: Exception) -> str:
    """Return a hint whose commands name the checkpoint that the command line has, or that the error is about."""
    if "FILE" not in hint:
        return hint
    path = next(iter(named), None) or getattr(error, "path", None)
    return hint if path is None else re.sub(_COMMAND, lambda found: found[1] + quoted(path), hint)


def report_interrupt(error: KeyboardInterrupt) -> None:
    """Print a line if an interrupt came too late to leave everything as it was."""
    if outcome_of(error) in (Outcome.DONE, Outcome.REPLACING, Outcome.UNFINISHED):
        _write_lines([("ckpt: ", _with_outcome("interrupted", error))])


def _with_outcome(problem: str, error: BaseException) -> str:
    """Return the problem with the state in which it left the files of an edit; a refusal never changes them."""
    outcome = outcome_of(error)
    if outcome is None or (outcome is Outcome.UNCHANGED and isinstance(error, CkptError)):
        return problem
    return f"{problem}; {outcome.value}"


def _write_lines(lines: Sequence[tuple[str, str | None]], paths: Sequence[str] = ()) -> None:
    """Write lines on stderr, the middle of a very long one left out; a terminal breaks none of the paths."""
    whole = [escaped(path) for path in (*paths, *named) if path]
    for word, text in lines:
        if text is not None:
            text = text if len(text) <= _LINE else f"{text[: _LINE // 2]}…{text[-_LINE // 2 :]}"
            terminal.say(f"{word}{escaped(text)}\n", whole)


def problem_of(error: Exception) -> str:
    """Return the line that an error prints, without the hint."""
    return _with_outcome(_problem_and_hint(error)[0], error)


def _problem_and_hint(error: Exception) -> tuple[str, str | None]:
    """Return the problem and the hint."""
    if isinstance(error, CkptError):
        return str(error), error.hint
    if isinstance(error, UsageError):
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
    """Return the operating system's message, with the file that it is about."""
    problem = error.strerror or str(error)
    name = error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    hint = _FREE.get(outcome_of(error)) if _is_full(error) else hint_of(error)
    return (f"{name_text(name)}: {problem}" if isinstance(name, str) else problem), hint


_FREE = {
    None: "free some space and try again",
    Outcome.UNCHANGED: "free some space and try again",
    Outcome.UNFINISHED: "free some space, then run a ckpt command such as ls on it",
}
"""Hints for a full disk, by the state in which the error left the files."""


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
