"""Signals and timers that interrupt work, each with a fallback for systems without it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def interrupt_numbers() -> tuple[int, ...]:
    """Return the signals that interrupt a command: the user's, and that of `interrupt_after`."""
    return (signal.SIGINT, signal.SIGALRM) if hasattr(signal, "SIGALRM") else (signal.SIGINT,)


def interrupt_after(seconds: float) -> Callable[[], object]:
    """Raise KeyboardInterrupt on the main thread after some seconds; returns a function that calls it off."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return lambda: signal.setitimer(signal.ITIMER_REAL, 0)
    import _thread
    import threading

    timer = threading.Timer(seconds, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    return timer.cancel


@contextmanager
def limited_work(seconds: float, error: Callable[[], Exception]) -> Iterator[None]:
    """Raise an error within the block once it has taken some seconds of the processor.

    A regular expression that backtracks can be stopped in no other way. On another thread than the main one, and where
    the system has no such timer, there is no limit.
    """
    import threading

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise error()

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
