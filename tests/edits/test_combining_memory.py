"""Commands that combine checkpoints take the memory of a few pieces, whatever the size of the checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_in_use import memory_of
from test_memory import write_safetensors

SIZE = 280 << 20
MOST = 130 << 20

COMMANDS = [
    "avg a.safetensors b/a.safetensors:0.5 -o out.safetensors",
    "mix a.safetensors b/a.safetensors --method ties --density 0.5 -o out.safetensors",
    "mix a.safetensors b/a.safetensors --method slerp --t 0.5 -o out.safetensors",
    "merge a.safetensors b/a.safetensors --prefix b/a.safetensors=b -o out.safetensors",
    "graft a.safetensors b/a.safetensors -o out.safetensors",
    "delta create a.safetensors b/a.safetensors -o out.safetensors",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(" -o ")[0])
def test_two_large_files_are_combined_in_little_memory(tmp_path: Path, command: str) -> None:
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        write_safetensors(folder, SIZE)
    assert memory_of(tmp_path, *command.split()) < MOST
    (tmp_path / "out.safetensors").unlink()
