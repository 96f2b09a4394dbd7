"""What the README's generated blocks are made of: commands run for real, on copies of the sample checkpoints.

Used by cog (`make readme` writes the blocks, `make lint` checks them); the copies live as long as one run of it, so
that a later example sees what an earlier one changed.
"""

from __future__ import annotations

import atexit
import os
import pty
import shutil
import subprocess
import tempfile
from pathlib import Path

SAMPLES = Path(__file__).parent.parent.parent / "sample_checkpoints"
_ENVIRONMENT = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}


def _workspace() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ckpt-readme-"))
    atexit.register(shutil.rmtree, folder)
    for sample in SAMPLES.iterdir():
        if sample.suffix in (".pt", ".safetensors"):
            shutil.copy(sample, folder)
    return folder


WORKSPACE = _workspace()


def run(*commands: str) -> None:
    """Print shell commands with what they print on a terminal."""
    print("```console")
    for command in commands:
        print(f"$ {command}")
        print(_on_terminal(command), end="")
    print("```")


def python(code: str) -> None:
    """Print Python code after having run it, so that an example that fails is seen."""
    subprocess.run(["python", "-c", code], cwd=WORKSPACE, check=True, stdout=subprocess.DEVNULL)
    print(f"```python\n{code.strip()}\n```")


def command_help(command: str) -> None:
    """Print a command's help."""
    answer = subprocess.run(["ckpt", command, "--help"], env=_ENVIRONMENT, capture_output=True, text=True, check=True)
    print(f"```text\n{answer.stdout.strip()}\n```")


def _on_terminal(command: str) -> str:
    """The output of a command whose stdout and stderr are one terminal."""
    ours, theirs = pty.openpty()
    try:
        with subprocess.Popen(["bash", "-c", command], cwd=WORKSPACE, env=_ENVIRONMENT, stdout=theirs, stderr=theirs):
            os.close(theirs)
            pieces = []
            while piece := _read(ours):
                pieces.append(piece)
    finally:
        os.close(ours)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux says that nobody writes to a terminal any more
        return b""
