"""How far long edits are: reported on a terminal, and nowhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from on_terminal import seen_on_terminal

from ckpt_cli.files import copy as copying

SLOW = """
import os, sys, time
from ckpt_cli.cli.main import run
slowly = {slowly}
real = os.copy_file_range
def copy(*args):
    time.sleep(slowly)
    return real(*args)
os.copy_file_range = copy
sys.exit(run(sys.argv[1:]))
"""
"""A ckpt on a disk that takes its time for each piece."""

COMMANDS = {
    "rename": ["rename", "a.pt", "--add", "a.long.prefix." * 20, "-o", "out.pt"],
    "convert": ["convert", "a.pt", "out.safetensors"],
    "set": ["set", "a.pt", "0[0]=1", "-o", "out.pt"],
    "rm": ["rm", "a.pt", "0"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint of many storages, each too long to be gathered with others."""
    torch.save({str(number): torch.ones(2000) for number in range(8)}, tmp_path / "a.pt")
    return tmp_path


def on_a_terminal(folder: Path, slowly: float, *arguments: str) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; its exit code and what stood there."""
    seen = seen_on_terminal(["-c", SLOW.format(slowly=slowly), *arguments], folder)
    return seen.code, seen.text


@pytest.mark.parametrize("command", COMMANDS)
def test_bytes_and_time_are_told_after_a_second_and_wiped_out_in_the_end(folder: Path, command: str) -> None:
    slowly = 1.5 if command == "set" else 0.25
    code, said = on_a_terminal(folder, slowly, *COMMANDS[command])
    assert code == 0, said
    reported = re.findall(r"\r([\d.,]+ \w+) of ([\d.,]+ \w+), (\d+) s left", said)
    assert reported, said
    assert len({total for _, total, _ in reported}) == 1
    assert re.search(r"\r +\r", said[said.rindex("s left") :])
    assert "\x1b" not in said
    assert "Traceback" not in said


def test_what_takes_less_than_a_second_tells_nothing(folder: Path) -> None:
    code, said = on_a_terminal(folder, 0, *COMMANDS["rename"])
    assert code == 0
    assert "left" not in said


def test_nobody_is_told_where_stderr_is_no_terminal(folder: Path) -> None:
    call = [sys.executable, "-c", SLOW.format(slowly=0.25), *COMMANDS["rename"]]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "left" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_leaves_nothing_half_written(folder: Path, command: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    call = [sys.executable, "-c", SLOW.format(slowly=3), *COMMANDS[command]]
    process = subprocess.Popen(call, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not any("ckpt-tmp" in name for name in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


DROPPED = """
import os, signal, sys, weakref
from ckpt_cli.cli.main import run
class Held: pass
real, times = os.copy_file_range, [1, 2, 3]
def copy(*args):
    if times:
        times.pop()
        held = Held()
        watched = weakref.ref(held, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del held
    return real(*args)
os.copy_file_range = copy
end = run(sys.argv[1:])
sys.exit(end)
"""
"""A ckpt that is interrupted within a finalizer, such as importlib has one for each module."""


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_within_a_finalizer_is_one_all_the_same(folder: Path, command: str) -> None:
    torch.save({str(number): torch.ones(1100) for number in range(4000)}, folder / "a.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    call = [sys.executable, "-c", DROPPED, *COMMANDS[command]]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_all_bytes_are_counted_whoever_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[tuple[int, int]] = []
    monkeypatch.setattr(copying, "_SOON", -1.0)
    progress = copying.counting(lambda done, total: reported.append((done, total)), lambda: 10)
    for nbytes in (3, 0, 4, 5):
        progress(nbytes)
    assert reported == [(3, 10), (7, 10), (10, 10)]  # no more than there is, though an estimate may be too low
    silent = copying.counting(None, lambda: pytest.fail("nobody asked"))
    silent(5)
