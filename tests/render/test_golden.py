"""What commands print, to the letter: one file a case in `golden/`.

A case is a file of lines `$ ckpt …`, each followed by what that command prints: stdout as it is, then stderr with
`2> ` before each line, then `[exit N]` unless it is 0. Commands of one case run one after another on the same copies
of the sample checkpoints and of what golden_inputs.py writes.

To add a case, add a file with the `$ ckpt …` lines; to write what all cases print now:

    python tests/render/test_golden.py --write

and read the difference before you commit it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import golden_inputs

from ckpt_cli.cli.app import COMMANDS
from ckpt_cli.cli.main import run

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.glob("*.txt"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input file, written once and copied for each case."""
    folder = tmp_path_factory.mktemp("golden-inputs")
    golden_inputs.build(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_a_command_prints_what_its_golden_file_says(case: Path, inputs: Path, tmp_path: Path) -> None:
    with _inside(inputs, tmp_path):
        assert replayed(case) == case.read_text(encoding="utf-8")


def test_the_folder_has_cases_of_every_command() -> None:
    used = {line.split()[2] for case in CASES for line in _commands(case) if len(line.split()) > 2}
    assert set(COMMANDS) <= used


def replayed(case: Path) -> str:
    """The case as its commands make it today."""
    return "".join(_answer(line) for line in _commands(case))


def _commands(case: Path) -> list[str]:
    return [line for line in case.read_text(encoding="utf-8").splitlines() if line.startswith("$ ckpt")]


def _answer(line: str) -> str:
    """One command line and what it prints."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(shlex.split(line)[2:])
    pieces = [f"{line}\n", _text(out), *(f"2> {said}\n" for said in _text(err).splitlines())]
    return "".join([*pieces, f"[exit {code}]\n"] if code else pieces)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


@contextlib.contextmanager
def _inside(inputs: Path, folder: Path) -> Iterator[None]:
    """Stand in a fresh copy of the inputs, before a terminal of 80 columns."""
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


def _write_all() -> None:
    with tempfile.TemporaryDirectory() as inputs:
        golden_inputs.build(Path(inputs))
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder, _inside(Path(inputs), Path(folder)):
                text = replayed(case)
            if text != case.read_text(encoding="utf-8"):
                case.write_text(text, encoding="utf-8")
                print(f"written: {case.name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    _write_all()
