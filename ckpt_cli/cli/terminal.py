"""The terminals behind stdout and stderr: their size and colours, and the pager for what is more than a screen."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, TextIO

from ckpt_cli.render import screen
from ckpt_cli.render.screen import UNBOUNDED, Screen, folded, sensible, wrapped

if TYPE_CHECKING:
    from subprocess import Popen


class Colour(str, Enum):
    """The values of `--color`."""

    auto = "auto"
    always = "always"
    never = "never"


_PAGER = "less -FRX"
_OF_A_SHELL = r"[|&;<>()$`\\\"'*?#~=%\[{]"
"""Characters for which a command needs a shell."""

_WORDS = (("ckpt: ", "error"), ("hint: ", "note"), ("warning: ", "warning"), ("note: ", "note"))
"""How lines on stderr begin, and the colours of these words."""


class Terminal:
    """What a command line asks of the terminal, and the answer that waits for a pager."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the command before."""
        self.colour = Colour.auto
        self.paged = True
        self._waiting: list[str] = []
        self._lines = 0
        self._most = 0
        self._pager: Popen[str] | None = None
        self._said: list[str] = []
        self.is_read = True
        screen.use(None)

    # --- stdout

    def make_for(self, layout: str) -> None:
        """Make the answer for the terminal if stdout is one and the layout is that for people, a `table`."""
        screen.use(None)
        self._most = 0
        if layout != "table":
            return
        colour = self._has_colour(sys.stdout)
        if sys.stdout.isatty():
            columns, lines = _size(sys.stdout)
            screen.use(Screen(columns, colour))
            self._most = lines - 1 if self.paged else 0
        elif colour:
            screen.use(Screen(UNBOUNDED, colour))

    def print(self, pieces: Iterable[str]) -> Iterator[None]:
        """Print an answer, more than a screen of it on a terminal to a pager; yields before each piece is printed."""
        made_for = screen.current()
        for piece in pieces if made_for is None else folded(pieces, made_for.columns):
            yield
            if not self._most:
                sys.stdout.write(piece)
            elif not self._write(piece):
                return

    def _write(self, text: str) -> bool:
        """Keep a piece of an answer until there is more than a screen of it, for a pager; False if nobody reads it."""
        if self._pager is not None:
            return self._to_pager(text)
        self._waiting.append(text)
        self._lines += text.count("\n")
        if self._lines > self._most:
            self._pager = _started_pager()
            if self._pager is None:
                self._most = 0
            return self._flush()
        return True

    def _flush(self) -> bool:
        """Print what waits; False if nobody reads it."""
        text = "".join(self._waiting)
        self._waiting.clear()
        self._lines = 0
        if self._pager is not None:
            return self._to_pager(text)
        sys.stdout.write(text)
        return True

    def _to_pager(self, text: str) -> bool:
        assert self._pager is not None
        assert self._pager.stdin is not None
        if self.is_read:
            try:
                self._pager.stdin.write(text)
            except OSError:  # the reader has ended it
                self.is_read = False
        return self.is_read

    def finish(self) -> None:
        """Print what waits, wait until the pager ends, and print what was said on stderr meanwhile."""
        self._flush()
        pager, self._pager = self._pager, None
        if pager is not None and pager.stdin is not None:
            with suppress(OSError):
                pager.stdin.close()
            while pager.returncode is None:
                with suppress(KeyboardInterrupt):  # which is for the pager
                    pager.wait()
        said = "".join(self._said)
        self._said.clear()
        if said:
            sys.stdout.flush()
            sys.stderr.write(said)

    @property
    def is_paging(self) -> bool:
        """True while a pager has the screen."""
        return self._pager is not None

    # --- stderr

    def say(self, text: str, whole: Sequence[str] = ()) -> None:
        """Print lines on stderr, after an answer that waits; a terminal breaks them to fit, not paths in `whole`."""
        if sys.stderr.isatty():
            colours = Screen(_size(sys.stderr)[0], self._has_colour(sys.stderr))
            text = "".join(_line(line, colours, whole) for line in text.splitlines())
        if self._pager is not None or self._waiting:
            self._said.append(text)
            return
        sys.stderr.write(text)

    def _has_colour(self, stream: TextIO) -> bool:
        if self.colour is not Colour.auto:
            return self.colour is Colour.always
        if os.environ.get("NO_COLOR"):
            return False
        forced = os.environ.get("FORCE_COLOR", "")
        return forced not in ("", "0") or (stream.isatty() and os.environ.get("TERM", "dumb") != "dumb")


def _line(line: str, colours: Screen, whole: Sequence[str]) -> str:
    lines = wrapped(line, colours.columns, whole=whole)
    for word, what in _WORDS:
        if line.startswith(word):
            lines[0] = colours.paint(word.rstrip(), what) + lines[0][len(word) - 1 :]
    return "".join(f"{part}\n" for part in lines)


def _size(stream: TextIO) -> tuple[int, int]:
    """Return the columns and lines of a terminal; COLUMNS and LINES in the environment count more."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        columns, lines = 0, 0
    return sensible(_number("COLUMNS") or columns or 80), _number("LINES") or lines or 24


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _started_pager() -> Popen[str] | None:
    """Start the pager that the environment names, or `less`; None if there is none, or none is wanted."""
    command = next((os.environ[name] for name in ("CKPT_PAGER", "PAGER") if name in os.environ), None)
    if command is None:
        command = "" if os.environ.get("TERM", "dumb") == "dumb" else _PAGER
    if command.strip() in ("", "cat"):
        return None
    import subprocess
    from shutil import which

    words = ["/bin/sh", "-c", command] if re.search(_OF_A_SHELL, command) else command.split()
    program = which(words[0])
    if program is None:
        return None
    sys.stdout.flush()
    try:
        return subprocess.Popen(  # noqa: S603
            [program, *words[1:]], stdin=subprocess.PIPE, encoding=sys.stdout.encoding, errors="backslashreplace"
        )
    except OSError:
        return None


terminal = Terminal()
"""The terminal of this process."""
