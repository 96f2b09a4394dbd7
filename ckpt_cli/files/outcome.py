"""The state in which an error or an interrupt leaves the files that a command was to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from ckpt_cli.facts import dataclass
from ckpt_cli.files.interrupts import interrupt_numbers


class Outcome(Enum):
    """The state, with the words that a message has for it."""

    UNCHANGED = "no checkpoint was changed"
    DONE = "the change itself is complete"
    REPLACING = "the checkpoint that was there is not complete any more"
    UNFINISHED = "the change is incomplete until the next ckpt command on it completes or undoes it"


@dataclass(slots=True)
class Stage:
    """The stage that a write has reached."""

    outcome: Outcome = Outcome.UNCHANGED


def state(error: BaseException, outcome: Outcome, path: str) -> None:
    """Note with an error how it leaves the file `path`, and which file it is about where it does not say so itself."""
    error.__dict__["ckpt_outcome"] = outcome
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = path


def state_hint(error: BaseException, hint: str) -> None:
    """Note with an error of the system what helps."""
    error.__dict__["ckpt_hint"] = hint


def hint_of(error: BaseException) -> str | None:
    """The hint that was noted with an error, or None."""
    return error.__dict__.get("ckpt_hint")


def outcome_of(error: BaseException) -> Outcome | None:
    """The outcome that was noted with an error, or None."""
    return error.__dict__.get("ckpt_outcome")


@contextmanager
def stating(path: str) -> Iterator[Stage]:
    """Note with every error within the block how far the write of `path` had come, as the block records it."""
    stage = Stage()
    try:
        yield stage
    except BaseException as error:
        state(error, stage.outcome, path)
        raise


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let an interrupt wait until the end of the block: for short steps that are best done to the end."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():  # interrupts go to the main thread only
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in interrupt_numbers()}  # see cli/boundary.py
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, lambda which, _: came.append(which))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    for which in came[:1]:
        replaced[signal.Signals(which)](which, None)
