"""All errors that ckpt raises on purpose, as one tree.

CkptError                      exit 2; the base class
├── UsageError                 the command line or a call is wrong, whatever the file holds
├── FormatError                the file cannot be understood as a checkpoint
│   ├── UnknownFormatError     no format recognizes it
│   ├── MalformedError         it breaks its own format's rules
│   │   └── ShortStorageError  a storage has fewer bytes than its tensors need
│   ├── TruncatedError         it ends before something that it promises
│   └── LimitError             reading it would pass a limit meant for hostile files
├── NameNotFoundError          no entry has that name
├── UnsupportedError           the file is valid, but this operation cannot handle it
│   └── RefusedError           possible, but it would lose or break something
├── ValueRefusedError          a value that the tensor cannot hold
├── OutputError                standard output cannot be written
├── ChangedError               a file changed while it was read
├── NetworkError               a server cannot be reached, refuses, or does not do what it should
└── BusyError                  another process is writing the file
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


class CkptError(Exception):
    """The base of every error raised on purpose; `path`, `hint` and `details` travel as data."""

    exit_code = 2

    def __init__(
        self, problem: str, *, path: str | None = None, hint: str | None = None, details: Sequence[str] = ()
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path
        self.hint = hint
        """A command or an action that helps; in a command, `FILE` stands for the file on the command line."""
        self.details = details
        """The items that the problem is about, a line each."""

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


def listed(items: Collection[Item], most: int, text: Callable[[Item], str] = str) -> str:
    """List items in a message; of more than `most`, the first ones and a count: `a, b and 3 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(text, islice(items, most))) + more


def some_of(lines: Sequence[str], most: int = 20) -> list[str]:
    """Return lines of a message; of more than `most`, the first ones and a line with a count: `and 3 more`."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def quoted(word: str) -> str:
    """Return a word as a shell takes it, for commands in hints."""
    from shlex import quote

    return quote(word)


@contextmanager
def about(path: str) -> Iterator[None]:
    """Give the errors raised inside that do not say which file they are about its path."""
    try:
        yield
    except CkptError as error:
        error.path = error.path or path
        raise


class UsageError(CkptError):
    """The command line or a call is wrong, whatever the file holds."""


class FormatError(CkptError):
    """The file cannot be understood as a checkpoint."""


class UnknownFormatError(FormatError):
    """No format recognises the file's content."""


class MalformedError(FormatError):
    """The file breaks the rules of the format that it is in."""


class ShortStorageError(MalformedError):
    """A storage has fewer bytes than its tensors were saved with, or none at all."""


class RanksError(MalformedError):
    """The files of ranks in a folder are not all there, are of several saves, or do not add up to a model."""


class TruncatedError(FormatError):
    """The file ends before bytes that it promises."""


class LimitError(FormatError):
    """Reading on would take more memory or time than an honest file of this size needs."""

    def __init__(self, problem: str, *, path: str | None = None, fixed: bool = False) -> None:
        """Of a limit that is one of `limits.FIXED` the hint says that nothing raises it."""
        raising = "if you trust the file, raise every limit tenfold: CKPT_LIMITS=10 ckpt ..."
        super().__init__(problem, path=path, hint="CKPT_LIMITS does not raise this limit" if fixed else raising)


class NameNotFoundError(CkptError):
    """No entry has the name, prefix or pattern that was asked for."""

    def __init__(self, name: str, close: Sequence[str] = (), *, path: str | None = None) -> None:
        where = quoted(path) if path else "FILE"
        hint = f"did you mean {' or '.join(close)}?" if close else f"ckpt ls {where} lists the names"
        super().__init__(f"nothing is called {name!r}", path=path, hint=hint)
        self.name = name
        self.close = tuple(close)


class UnsupportedError(CkptError):
    """The checkpoint is sound, but this operation cannot be done on it."""


class RefusedError(UnsupportedError):
    """The operation is possible, but it would break or lose something that the user did not name."""


class UnfittingError(RefusedError):
    """Tensors that mean something only together, such as a quantized weight and its scales, do not fit each other."""


class ValueRefusedError(CkptError):
    """A value does not fit the tensor's dtype or shape."""


class BusyError(CkptError):
    """Another process holds the file's lock."""


class OutputError(CkptError):
    """Standard output cannot be written."""


class ChangedError(CkptError):
    """Another process changed a file while it was read, so that an answer would mix two states of it."""

    def __init__(self, path: str, problem: str = "changed while it was read; try again") -> None:
        super().__init__(problem, path=path)


class NetworkError(CkptError):
    """A server cannot be reached, refuses, or gives something else than what was asked for."""

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        hint: str | None = None,
        status: int | None = None,
        code: str = "",
    ) -> None:
        super().__init__(problem, path=path, hint=hint)
        self.status = status
        """The status of the reply, such as 403; None where there was none, or its status was not at fault."""
        self.code = code
        """The name that the server itself gives a refusal, as the hub does; empty where it gives none."""
