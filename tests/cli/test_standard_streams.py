"""Standard streams that fail: closed, full, on a device that answers with an error, a pipe that nobody reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_forks import forks
from safetensors.torch import save_file

BIN = Path(sys.executable).parent

COMMANDS = (
    "--help", "--version", "ls --help", "ls mlp.pt", "ls --json mlp.pt", "info mlp.pt", "tree mlp.pt", "show mlp.pt",
    "ties tied.pt", "stats mlp.pt", "diff mlp.pt tied.pt", "check mlp.pt --json", "hash mlp.pt", "scan mlp.pt --json",
    "meta st.st", "--show-completion bash",
)  # fmt: skip
"""Each prints an answer."""


IN_BASH = {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash that calls this project's ckpt."""
    line = line.replace("ckpt ", f"{sys.executable} -m ckpt_cli ")
    environment = {**os.environ, **IN_BASH}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def with_metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file with metadata."""
    file = tmp_path_factory.mktemp("streams") / "st.st"
    save_file({"a": torch.zeros(2)}, file, {"a": "b"})
    return file


@pytest.fixture
def files(work: Path, with_metadata: Path) -> Path:
    """The samples, and a file with metadata."""
    shutil.copy(with_metadata, work)
    return work


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_that_goes_nowhere_is_one_line_and_no_success(files: Path, command: str) -> None:
    closed = bash(f"ckpt {command} >&-", files)
    with open("/dev/full", "wb") as full:
        filled = forks().answer(*command.split(), stdout=full.fileno(), **IN_BASH)
    for code, said, problem in (
        (closed.returncode, closed.stderr, "standard output is closed"),
        (filled.returncode, filled.stderr.decode(), "standard output: No space left"),
    ):
        assert code == 2
        assert said.splitlines()[-1].startswith(f"ckpt: {problem}"), said
        assert "Traceback" not in said
    assert closed.stdout == ""


@pytest.mark.parametrize("target", ["2>&-", "2>/dev/full"])
def test_an_edit_whose_words_go_nowhere_is_done_all_the_same(files: Path, target: str) -> None:
    done = bash(f"ckpt set mlp.pt 2.bias=7 {target}", files)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert torch.load(files / "mlp.pt")["2.bias"].eq(7).all()


@pytest.mark.parametrize("target", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_an_error_whose_words_go_nowhere_still_has_its_exit_code(files: Path, target: str) -> None:
    assert bash(f"ckpt ls none.pt {target}", files).returncode == 2
    assert bash(f"ckpt no-such-command {target}", files).returncode == 2


def test_an_edit_whose_report_cannot_be_printed_says_that_it_was_carried_out(files: Path) -> None:
    for command in ("set mlp.pt 2.bias=7", "rename mlp.pt 2 3", "convert mlp.pt out.npz"):
        done = bash(f"ckpt {command} --json >&-", files)
        assert done.returncode == 2
        assert done.stderr.startswith("ckpt: standard output is closed"), done.stderr
        assert done.stderr.endswith("; the command itself was carried out\n"), done.stderr
    assert torch.load(files / "mlp.pt")["3.bias"].eq(7).all()
    assert (files / "out.npz").exists()


def test_an_answer_is_not_changed_by_a_closed_stderr_or_stdin(files: Path) -> None:
    whole = bash("ckpt ls mlp.pt", files)
    assert bash("ckpt ls mlp.pt 2>&- <&-", files).stdout == whole.stdout


def test_a_terminal_that_is_gone_is_no_traceback(files: Path) -> None:
    ours, theirs = os.openpty()
    os.close(ours)  # writes to the other end fail with EIO
    try:
        call = [sys.executable, "-m", "ckpt_cli"]
        gone = subprocess.run([*call, "ls", "mlp.pt"], cwd=files, stdout=theirs, stderr=subprocess.PIPE, check=False)
        assert gone.returncode == 2
        assert gone.stderr == b"ckpt: standard output: Input/output error\n"
        code = subprocess.run([*call, "set", "mlp.pt", "2.bias=8"], cwd=files, stderr=theirs, check=False).returncode
        assert code == 0
        code = subprocess.run([*call, "hash", "mlp.pt"], cwd=files, stdout=-3, stderr=theirs, check=False).returncode
        assert code == 0
    finally:
        os.close(theirs)
    assert torch.load(files / "mlp.pt")["2.bias"].eq(8).all()
