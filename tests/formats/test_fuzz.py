"""A thousand damaged versions of each sample, every truncation of two, and the inputs that once broke us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import CRASHES, SAMPLES

FUZZ = Path(__file__).parent.parent / "support" / "fuzz.py"


def run_apart(code: str) -> list[str]:
    """Run code of the fuzzer in a process without torch; the problems that it prints."""
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(FUZZ.parent)!r}); from fuzz import *; {code}",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("begin", [0, 500])
def test_a_damaged_file_is_refused_in_one_line_or_answered(sample: Path, begin: int) -> None:
    batch = f"Batch(Path({str(sample)!r}), 0, {begin}, 500, every=False)"
    assert run_apart(f"print(*run_batch({batch}), sep=chr(10), end='')") == []


@pytest.mark.parametrize("name", ["mlp.pt", "mlp.safetensors"])
def test_a_file_cut_short_at_any_length_is_refused(name: str) -> None:
    (sample,) = [sample for sample in SAMPLES if sample.name == name]
    code = (
        f"data = open({str(sample)!r}, 'rb').read()\n"
        "folder = Path(tempfile.mkdtemp())\n"
        "for length in range(len(data)):\n"
        "    print(*try_file(data[:length], folder, COMMANDS[length % 2:][:1]), sep=chr(10), end='')\n"
    )
    assert run_apart(code.replace("data = ", "\ndata = ", 1)) == []


@pytest.mark.parametrize("crash", sorted(CRASHES.iterdir()), ids=lambda crash: crash.name)
def test_what_once_broke_us_does_not_any_more(crash: Path, tmp_path: Path) -> None:
    code = f"print(*try_file(open({str(crash)!r}, 'rb').read(), Path({str(tmp_path)!r})), sep=chr(10), end='')"
    assert run_apart(code) == []
