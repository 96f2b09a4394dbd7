"""The memory that a command takes in a process of its own: anonymous pages, and mapped ones that it touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEASURED = """
import os, sys
import ckpt_cli.cli.main
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
code = ckpt_cli.cli.main.run(sys.argv[1:])
print(peak() - before)
os._exit(code)
"""
"""ru_maxrss would be that of pytest, if that is more: a process takes it over from the one that begins it."""


def memory_of(folder: Path, *arguments: str) -> int:
    """Bytes that a command took at its most, beyond what its imports take."""
    call = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024
