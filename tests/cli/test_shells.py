"""Completion in real shells: Tab is pressed in bash, zsh and fish on a terminal, as soon as each has started."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest
from conftest import Ckpt

SECONDS = 60
"""The longest wait for a shell on a busy machine."""

ON_ITS_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "-i", "-C", "function fish_prompt; echo 'READY> '; end"],
}

INSTALLED = {"bash": "ckpt.sh", "zsh": "zfunc/_ckpt", "fish": "config/fish/completions/ckpt.fish"}
"""The places of the scripts below the home folder, as --install-completion chooses them for zsh and fish."""

SETUP = {
    "bash": "source ~/ckpt.sh",
    "zsh": "fpath+=~/zfunc; autoload -Uz compinit; compinit -u -D",
    "fish": "",
}


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        call = [sys.executable, "-c", ON_ITS_TERMINAL, *command]
        self._shell = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.text = ""

    def type(self, keys: str) -> None:
        """Press keys, and forget what was printed before."""
        self.text = ""
        os.write(self._ours, keys.encode())

    def wait_for(self, expected: str) -> None:
        """Read until the terminal has shown a text; fail after some time."""
        end = time.monotonic() + SECONDS
        while expected not in self.text:
            assert time.monotonic() < end, f"no {expected!r} in {self.text!r}"
            if select([self._ours], [], [], 1)[0]:
                self._read()

    def _read(self) -> None:
        data = os.read(self._ours, 1 << 16)
        if b"\x1b[c" in data or b"\x1b[0c" in data:  # fish asks what terminal it is on, and waits
            os.write(self._ours, b"\x1b[?62;c")
        if b"\x1b[6n" in data:
            os.write(self._ours, b"\x1b[1;1R")
        text = data.decode(errors="replace")
        self.text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[(\]][^\x07]?[^\x07\x1b]*\x07|\x1b\(B|\r", "", text)

    def close(self) -> None:
        """End the shell."""
        self._shell.kill()
        os.close(self._ours)  # before the wait, as a shell may be waiting for its output to be read
        self._shell.wait()


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, work: Path, shell: Ckpt) -> Iterator[Terminal]:
    """Each shell, with completion installed."""
    kind: str = request.param
    if shutil.which(kind) is None:
        if os.environ.get("EVERY_SHELL"):
            pytest.fail(f"{kind} is not there: make system installs it")
        pytest.skip(f"completion was not tried in {kind}, which is not there: make system installs it")
    program = work / "bin" / "ckpt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckpt_cli "$@"\n')
    program.chmod(0o755)
    script = work / INSTALLED[kind]
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(shell(_CKPT_COMPLETE=f"source_{kind}").out)
    environment = {**os.environ, "HOME": str(work), "XDG_CONFIG_HOME": str(work / "config"), "TERM": "xterm"}
    environment |= {"PATH": f"{program.parent}:{os.environ['PATH']}", "PS1": "READY> ", "COLUMNS": "100"}
    environment |= {"XDG_DATA_HOME": str(work / "data"), "XDG_CACHE_HOME": str(work / "cache")}
    # Without that folder, fish starts a process that reads every manual page of the system, and that outlives the test.
    (work / "data" / "fish" / "generated_completions").mkdir(parents=True)
    opened = Terminal(SHELLS[kind], environment)
    try:
        opened.wait_for("READY> ")
        if SETUP[kind]:
            opened.type(f"{SETUP[kind]}; echo DO''NE\n")
            opened.wait_for("DONE")
            opened.wait_for("READY> ")
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("ckpt show mlp.pt 2.w", "2.weight"),
        ("ckpt cast mlp.pt bfl", "bfloat16"),
        ("ckpt convert mlp.pt x --to safe", "safetensors"),
        ("ckpt met", "meta"),
        ("ckpt info mlp.p", "mlp.pt"),
    ],
)
def test_the_first_tab_completes(terminal: Terminal, typed: str, completed: str) -> None:
    terminal.type(f"{typed}\t")
    terminal.wait_for(completed)
