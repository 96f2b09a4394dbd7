"""`info` where no terminal is: nothing is cut."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file


@pytest.mark.parametrize("style", ["tsv", "csv", "auto"])
def test_info_that_is_piped_has_every_name_and_all_metadata(here: Path, ckpt: Ckpt, style: str) -> None:
    names = [f"block_{number}" for number in range(300)]
    notes = {"recipe": "x" * 3000, **{f"key{number}": "v" for number in range(1100)}}
    save_file({f"{name}.w": torch.ones(1) for name in names}, here / "m.safetensors", metadata=notes)
    out = ckpt("info", "m.safetensors", "-f", style).out
    rows = dict(csv.reader(io.StringIO(out), delimiter="," if style == "csv" else "\t"))
    assert set(rows["top level"].split()) == set(names)
    assert rows["metadata recipe"] == notes["recipe"]
    assert sum(label.startswith("metadata ") for label in rows) == len(notes)


def test_info_on_a_terminal_is_cut_to_its_lines(here: Path, ckpt: Ckpt) -> None:
    save_file({f"b{n}.w": torch.ones(1) for n in range(300)}, here / "m.safetensors", metadata={"a": "x" * 3000})
    assert max(map(len, ckpt("info", "m.safetensors", "-f", "table").lines)) < 500
