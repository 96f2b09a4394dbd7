"""Files as full as can be, of every container: opening one costs no more calls and memory than its size allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.crowded_kinds import KINDS

SCALE = 0.1
"""The size of these files beside those that `every_command.py` tries."""

CALLS = 150_000
"""Functions that opening one may call: those of 1 MB take ten times as many."""

MANY_CALLS = {
    "parameters_many": 520_000,
    "untyped_many": 440_000,
    "msgpack_many": 330_000,
    "msgpack_nested": 600_000,
    "onnx_many": 600_000,
    "onnx_of_nodes": 600_000,
}
"""Those that call more: of few bytes each they have 2,500 tensors, or 40,000 items."""

MEBIBYTES = 40
"""Memory of a process that opened one."""


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).parent.parent / "support" / "hostile_server.py")]
    cwd = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd, env={**os.environ}
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


@pytest.mark.parametrize("name", KINDS)
def test_a_crowded_file_opens_or_is_refused_at_a_cost_of_its_size(
    name: str, tmp_path: Path, opener: subprocess.Popen[str]
) -> None:
    path = KINDS[name](tmp_path, SCALE)
    assert opener.stdin
    assert opener.stdout
    opener.stdin.write(f"{path}\n")
    opener.stdin.flush()
    facts: dict[str, Any] = json.loads(opener.stdout.readline())
    assert "died" not in facts
    assert facts["error"] is None or facts["error"].isprintable()
    assert facts["calls"] <= MANY_CALLS.get(name, CALLS)
    assert facts["peak"] <= MEBIBYTES


@pytest.mark.parametrize("name", KINDS)
def test_a_crowded_file_is_below_1_mb(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path, 1.0)
    assert 50_000 < sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 1_000_000
