"""What commands print, to the letter: one file a case in `golden/`.

A case is a file of lines `$ ckpt …`, each followed by what that command prints: stdout as it is, then stderr with
`2> ` before each line, then `[exit N]` unless it is 0. Commands of one case run one after another on the same copies
of the sample checkpoints and of what golden_inputs.py writes.

To add a case, add a file with the `$ ckpt …` lines; to write what all cases print now:

    python tests/render/test_golden.py --write

and read the difference before you commit it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
import golden_inputs
from golden_cases import CASES, commands_of, inside, replayed

from ckpt_cli.cli.app import COMMANDS


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input file, written once and copied for each case."""
    folder = tmp_path_factory.mktemp("golden-inputs")
    golden_inputs.build(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_a_command_prints_what_its_golden_file_says(case: Path, inputs: Path, tmp_path: Path) -> None:
    with inside(inputs, tmp_path):
        assert replayed(case) == case.read_text(encoding="utf-8")


def test_the_folder_has_cases_of_every_command() -> None:
    used = {line.split()[2] for case in CASES for line in commands_of(case) if len(line.split()) > 2}
    assert set(COMMANDS) <= used


def _write_all() -> None:
    with tempfile.TemporaryDirectory() as inputs:
        golden_inputs.build(Path(inputs))
        for case in CASES:
            with tempfile.TemporaryDirectory() as folder, inside(Path(inputs), Path(folder)):
                text = replayed(case)
            if text != case.read_text(encoding="utf-8"):
                case.write_text(text, encoding="utf-8")
                print(f"written: {case.name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    _write_all()
