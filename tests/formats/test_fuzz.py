"""Five hundred damaged versions of each sample, every truncation of two, and the inputs that once broke us."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz import CRASHES, SAMPLES
from in_memory import MEMORY

FUZZ = Path(__file__).parent.parent / "support" / "fuzz.py"
Fuzzer = Callable[..., list[str]]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """An empty folder, in memory where that is possible: thousands of files are written."""
    with tempfile.TemporaryDirectory(prefix="ckpt-fuzz-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    """Ask a process without torch, which answers requests in a fork of itself, for the problems."""
    command = [sys.executable, str(FUZZ), "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        requests, answers = process.stdin, process.stdout

        def ask(*request: object) -> list[str]:
            print(json.dumps(request, default=str), file=requests, flush=True)
            problems: list[str] = json.loads(answers.readline())
            return problems

        yield ask
        requests.close()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("begin", [0, 250])
def test_a_damaged_file_is_refused_in_one_line_or_answered(sample: Path, begin: int, fuzzer: Fuzzer) -> None:
    assert fuzzer("batch", sample, 0, begin, 250) == []


@pytest.mark.parametrize("name", ["mlp.pt", "mlp.safetensors"])
def test_a_file_cut_short_at_any_length_is_refused(name: str, tmp_path: Path, fuzzer: Fuzzer) -> None:
    (sample,) = [sample for sample in SAMPLES if sample.name == name]
    assert fuzzer("cut short", sample, tmp_path) == []


@pytest.mark.parametrize("crash", sorted(CRASHES.iterdir()), ids=lambda crash: crash.name)
def test_what_once_broke_us_does_not_any_more(crash: Path, tmp_path: Path, fuzzer: Fuzzer) -> None:
    assert fuzzer("file", crash, tmp_path) == []


def test_the_fuzzer_reports_what_goes_wrong(tmp_path: Path, fuzzer: Fuzzer) -> None:
    """Or else the tests above would prove nothing."""
    (tmp_path / "left").touch()
    assert "left {'left'}" in fuzzer("file", SAMPLES[0], tmp_path)[0]


def test_a_file_at_which_the_process_ends_is_a_problem_and_the_next_is_tried_all_the_same(fuzzer: Fuzzer) -> None:
    (problem,) = fuzzer("die", 3)
    assert "the process died" in problem
    (problem,) = fuzzer("die", 0)
    assert "the process died" in problem
    assert fuzzer("batch", SAMPLES[0], 0, 0, 1) == []
