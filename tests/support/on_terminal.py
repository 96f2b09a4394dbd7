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
from pathlib import Path

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


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
    wide = sum(unicodedata.east_asian_width(char) in ("W", "F") for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me") for char in text)


def on_terminal(
    folder: Path,
    *arguments: str,
    columns: int = 80,
    lines: int = 24,
    env: dict[str, str] | None = None,
) -> Seen:
    """Run ckpt with a terminal for all three streams; the environment has no word of colours, pagers or sizes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    spoken = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PAGER", "CKPT_PAGER", "LESS")
    clean = {name: value for name, value in os.environ.items() if name not in spoken}
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_cli", *arguments],
        cwd=folder,
        env={**clean, "TERM": "xterm", "LANG": "C.UTF-8", **(env or {})},
        stdin=theirs,
        stdout=theirs,
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
    return Seen(process.wait(60), seen.decode())
