"""Commands on a pseudo-terminal of any size, and what stands there then."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from command_forks import forks

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

WRITTEN_OVER = re.compile(r"[^\r\n]*\r(?!\n)")
"""What a terminal does not show any more: the lines of progress of a command that takes longer than a second."""


@dataclass(frozen=True)
class Seen:
    """What a command wrote on a terminal, and its exit code."""

    code: int
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines without control sequences."""
        return SEQUENCE.sub("", self.text.replace("\r\n", "\n")).splitlines()

    @property
    def widest(self) -> int:
        return max(map(columns_of, self.lines), default=0)


def columns_of(text: str) -> int:
    """Return the columns that a terminal takes for a text."""
    return len(text) if text.isascii() else sum(map(_columns_of_one, text))


@cache
def _columns_of_one(char: str) -> int:
    wide = unicodedata.east_asian_width(char) in ("W", "F")
    return 1 + wide - (unicodedata.category(char) in ("Mn", "Me"))


def on_terminal(
    folder: Path, *arguments: str, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None
) -> Seen:
    """Run ckpt with a terminal for all three streams; the environment has no word of colours, pagers or sizes."""
    code, text = _run([list(arguments)], folder, (lines, columns), env or {})
    return Seen(code, WRITTEN_OVER.sub("", text))


def all_on_terminal(folder: Path, commands: list[list[str]], columns: int, env: dict[str, str]) -> list[Seen]:
    """Run several commands in one process with a terminal."""
    code, text = _run(commands, folder, (24, columns), env)
    assert code == 0, text
    parts = WRITTEN_OVER.sub("", text).split("\x1e")[:-1]
    return [Seen(int(code), said.lstrip("\r\n")) for said, code in zip(parts[::2], parts[1::2], strict=True)]


def seen_on_terminal(call: list[str], folder: Path) -> Seen:
    """Run Python with a terminal for stdin and stderr, and no stdout."""
    ours, theirs = _opened((24, 80))
    process = subprocess.Popen(
        [sys.executable, *call],
        cwd=folder,
        env=_environment({}),
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    text = _read_to_the_end(ours)
    return Seen(process.wait(60), text)


def _run(commands: list[list[str]], folder: Path, size: tuple[int, int], env: dict[str, str]) -> tuple[int, str]:
    ours, theirs = _opened(size)
    forks().start(commands, folder, _environment(env), (theirs, theirs, theirs))
    os.close(theirs)
    text = _read_to_the_end(ours)
    return forks().code(), text


def _opened(size: tuple[int, int]) -> tuple[int, int]:
    """A terminal of some lines and columns: our end, and that of the process."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    return ours, theirs


def _environment(env: dict[str, str]) -> dict[str, str]:
    spoken = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PAGER", "CKPT_PAGER", "LESS")
    clean = {name: value for name, value in os.environ.items() if name not in spoken}
    return {**clean, "TERM": "xterm", "LANG": "C.UTF-8", "PAGER": "cat", **env}


def _read_to_the_end(terminal: int) -> str:
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # what Linux says when nobody has the other end any more
            break
        if not piece:
            break
        seen += piece
    os.close(terminal)
    return seen.decode()
