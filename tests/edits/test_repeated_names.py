"""Names that two entries have, and parts of tensors: shown both, edited neither; an index is never ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from run_edit import assert_refused

TWICE: dict[str, dict[Any, Any]] = {
    "keys of two types": {0: torch.zeros(2), "0": torch.ones(2), "z": torch.ones(1)},
    "a dotted key": {"a": {"0": torch.zeros(2)}, "a.0": torch.ones(2), "z": torch.ones(1)},
    "values": {0: 1, "0": 2, "z": torch.ones(1)},
    "a tensor and a value": {0: torch.zeros(2), "0": 2, "z": torch.ones(1)},
    "sparse": {0: torch.ones(2).to_sparse(), "0": torch.ones(2).to_sparse(), "z": torch.ones(1)},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", TWICE)
def test_no_edit_guesses_which_of_two_entries_is_meant(tmp_path: Path, ckpt: Ckpt, kind: str, is_zip: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(TWICE[kind], path, _use_new_zipfile_serialization=is_zip)
    name = "a.0" if kind == "a dotted key" else "0"
    told = f"several entries are called '{name}'"
    edits: list[tuple[str, ...]] = [("set", f"{name}=100"), ("set", "*=1"), ("rm", name), ("keep", name)]
    edits += [("keep", "*0"), ("cast", "half", "*"), ("tie", "z", name), ("tie", name, "z")]
    edits += [("untie", name), ("untie", "*")]
    edits += [("set", f"{name}+=1"), ("set", f"{name}=1", "x=2", "--new")]
    if kind == "sparse":
        edits += [("set", "0.values[0]=1"), ("set", "0[0]=1")]
    for command, *words in edits:
        assert_refused(ckpt, path, told, command, *words)
    assert ckpt("ls", "-a", path).out.count(f"{name}\t") == 2
    assert ckpt("show", path, name).code == 0


def test_one_of_them_is_told_by_more_than_its_name(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({0: {"x": torch.zeros(1), "y": torch.zeros(1)}, "0": {"x": torch.ones(1)}}, path)
    assert ckpt("set", path, "0.y=5").code == 0
    assert torch.load(path, weights_only=True)[0]["y"] == 5
    assert_refused(ckpt, path, "several entries are called '0.x'", "set", "0=5")


@pytest.mark.parametrize("words", [("ls",), ("ls", "-a"), ("ls", "--waste"), ("ls", "--json"), ("ls", "--fold")])
@pytest.mark.parametrize("index", ["[100,0]", "[0]", "[...]", "[x]"])
def test_what_lists_whole_tensors_refuses_an_index(
    tmp_path: Path, ckpt: Ckpt, words: tuple[str, ...], index: str
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(8, 8), "epoch": 1}, path)
    for name in ("w", "epoch", "*"):
        answer = ckpt(words[0], path, f"{name}{index}", *words[1:])
        assert (answer.code, answer.out) == (2, "")


def test_no_command_ignores_an_index(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(8, 8), "v": torch.ones(8, 8), "epoch": 1}, path)
    for words in (
        ("tree", path, "w[100]"),
        ("ties", path, "w[0]", "v"),
        ("diff", path, path, "w[0]"),
        ("stats", path, "w[100,0]"),
        ("stats", path, "epoch[0]"),
        ("show", path, "epoch[0]"),
        ("show", path, "w[100,0]"),
    ):
        answer = ckpt(*words)
        assert (answer.code, answer.out) == (2, ""), words


def test_stats_names_the_parts_that_it_sums_up(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.arange(12.0), "s": torch.arange(3.0).to_sparse()}, path)
    answer = ckpt("stats", path, "w[0:3]", "w[ -2 :]", "w", "w[...]", "w[3]")
    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[0] for row in rows] == ["w[0:3]", "w[-2:]", "w", "w[...]", "w[3]"]
    assert [row[4] for row in rows] == ["2.0", "11.0", "11.0", "11.0", "3.0"]
    told = json.loads(ckpt("stats", path, "w[0:3]", "--json").out)
    assert told["tensors"][0]["name"] == "w[0:3]"
    assert ckpt("stats", path, "s").out.split("\t")[0] == "s.indices"
