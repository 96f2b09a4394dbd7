"""Commands on a pseudo-terminal of any size, and what stands there then."""

from __future__ import annotations

import fcntl
import json
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


_ALL = """
import json, sys
from ckpt_cli.cli.main import run
for arguments in json.loads(sys.argv[1]):
    code = run(arguments)
    sys.stdout.flush()
    print(f"{chr(30)}{code}{chr(30)}", flush=True)
"""
"""Several commands in a process, each followed by its exit code between record separators."""


def on_terminal(
    folder: Path, *arguments: str, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None
) -> Seen:
    """Run ckpt with a terminal for all three streams; the environment has no word of colours, pagers or sizes."""
    code, text = _run(["-m", "ckpt_cli", *arguments], folder, (lines, columns), env or {})
    return Seen(code, WRITTEN_OVER.sub("", text))


def all_on_terminal(folder: Path, commands: list[list[str]], columns: int, env: dict[str, str]) -> list[Seen]:
    """Run several commands in one process with a terminal."""
    code, text = _run(["-c", _ALL, json.dumps(commands)], folder, (24, columns), env)
    assert code == 0, text
    parts = WRITTEN_OVER.sub("", text).split("\x1e")[:-1]
    return [Seen(int(code), said.lstrip("\r\n")) for said, code in zip(parts[::2], parts[1::2], strict=True)]


def seen_on_terminal(call: list[str], folder: Path) -> Seen:
    """Run Python with a terminal for stdin and stderr, and no stdout."""
    return Seen(*_run(call, folder, (24, 80), {}, stdout=subprocess.DEVNULL))


def _run(
    call: list[str], folder: Path, size: tuple[int, int], env: dict[str, str], stdout: int | None = None
) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    spoken = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PAGER", "CKPT_PAGER", "LESS")
    clean = {name: value for name, value in os.environ.items() if name not in spoken}
    process = subprocess.Popen(
        [sys.executable, *call],
        cwd=folder,
        env={**clean, "TERM": "xterm", "LANG": "C.UTF-8", "PAGER": "cat", **env},
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # what Linux says when nobody has the other end any more
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    return process.wait(60), seen.decode()
