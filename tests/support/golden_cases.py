"""The golden cases, replayed: the commands of each on fresh copies of the files that golden_inputs.py writes."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from ckpt_cli.cli.main import run

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.glob("*.txt"))


def replayed(case: Path) -> str:
    """The case as its commands make it today."""
    return "".join(f"{line}\n{answer_to(shlex.split(line)[2:])}" for line in commands_of(case))


def commands_of(case: Path) -> list[str]:
    """The lines of a case that are commands."""
    return [line for line in case.read_text(encoding="utf-8").splitlines() if line.startswith("$ ckpt")]


def answer_to(args: list[str]) -> str:
    """What a command prints: stdout as it is, stderr with `2> ` before each line, and its exit code unless it is 0."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(args)
    said = [*(f"2> {line}\n" for line in _text(err).splitlines()), *([f"[exit {code}]\n"] if code else [])]
    return "".join([_text(out), *said])


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def inside(inputs: Path, folder: Path) -> Iterator[None]:
    """Context manager: stand in a fresh copy of the inputs, before a terminal of 80 columns."""
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    before, columns = Path.cwd(), os.environ.get("COLUMNS")
    os.chdir(folder)
    os.environ["COLUMNS"] = "80"
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
