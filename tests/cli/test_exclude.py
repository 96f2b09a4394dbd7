"""`--exclude`, and NAMEs, in every command that selects entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt

from ckpt_cli.formats import open_checkpoint

STATE = {"enc.0.w": torch.ones(2), "enc.0.b": torch.ones(2), "enc.1.w": torch.zeros(2), "head.w": torch.ones(3)}


@pytest.fixture
def model(here: Path) -> Path:
    """A plain state_dict, and one inside a training checkpoint."""
    torch.save(STATE, "m.pt")
    torch.save({"model": dict(STATE), "optimizer": {"lr": 0.1, "m": torch.ones(1)}, "epoch": 3}, "train.pt")
    return here


def names(path: str) -> list[str]:
    """The names of all entries of a file."""
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    return [entry.name for entry in checkpoint.entries]


@pytest.mark.parametrize("command", ["ls", "stats", "hash"])
def test_looking_leaves_out_what_is_excluded(model: Path, ckpt: Ckpt, command: str) -> None:
    column = 1 if command == "hash" else 0

    def listed(*args: str) -> list[str]:
        found = [line.split("\t")[column] for line in ckpt(command, "m.pt", *args).lines]
        return [name for name in found if name != "(checkpoint)"]

    assert listed("--exclude", "*.b") == ["enc.0.w", "enc.1.w", "head.w"]
    assert listed("enc", "--exclude", "enc.0") == ["enc.1.w"]
    assert listed("*.w", "--exclude", "head", "--exclude", "enc.1.w") == ["enc.0.w"]


def test_the_hash_of_a_selection_is_that_of_a_checkpoint_of_it_alone(model: Path, ckpt: Ckpt) -> None:
    torch.save({"enc.1.w": STATE["enc.1.w"]}, "one.pt")
    assert ckpt("hash", "m.pt", "enc.1").out == ckpt("hash", "one.pt").out
    assert ckpt("hash", "m.pt", "enc", "--exclude", "enc.0").out == ckpt("hash", "one.pt").out
    assert ckpt("hash", "m.pt", "enc.1.w[0]").code == 2


@pytest.mark.parametrize("command", ["ls", "stats", "hash", "rm enc", "keep", "cast bfloat16", "convert out.pt"])
@pytest.mark.parametrize("pattern", ["none", "enc.2.*"])
def test_an_exclusion_of_nothing_is_an_error_and_nothing_is_written(
    model: Path, ckpt: Ckpt, command: str, pattern: str
) -> None:
    before = Path("m.pt").read_bytes()
    word, *rest = command.split()
    answer = ckpt(word, "m.pt", *rest, "--exclude", pattern)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"ckpt: m.pt: nothing is called '{pattern}'\n")
    assert Path("m.pt").read_bytes() == before
    assert not Path("out.pt").exists()


def test_diff_leaves_out_what_either_has(model: Path, ckpt: Ckpt) -> None:
    torch.save({**STATE, "head.w": torch.zeros(3), "new": torch.ones(1)}, "b.pt")
    assert ckpt("diff", "m.pt", "b.pt").code == 1
    assert ckpt("diff", "m.pt", "b.pt", "--exclude", "head", "--exclude", "new").code == 0
    found = json.loads(ckpt("diff", "--json", "m.pt", "b.pt", "--exclude", "head").out)
    assert (found["only_b"], found["changed"]) == (["new"], [])
    assert ckpt("diff", "m.pt", "b.pt", "--exclude", "none").code == 2


def test_rm_keeps_what_is_excluded_below_a_prefix(model: Path, ckpt: Ckpt) -> None:
    assert ckpt("rm", "train.pt", "model", "--exclude", "*.w").code == 0
    assert list(torch.load("train.pt")["model"]) == ["enc.0.w", "enc.1.w", "head.w"]
    assert ckpt("rm", "train.pt", "model", "optimizer", "--exclude", "model").code == 0
    loaded = torch.load("train.pt")
    assert list(loaded) == ["model", "epoch"]
    assert list(loaded["model"]) == ["enc.0.w", "enc.1.w", "head.w"]


def test_keep_drops_what_is_excluded_also_alone(model: Path, ckpt: Ckpt) -> None:
    assert ckpt("keep", "m.pt", "enc", "--exclude", "enc.0.b", "-o", "a.pt").code == 0
    assert list(torch.load("a.pt")) == ["enc.0.w", "enc.1.w"]
    assert ckpt("keep", "train.pt", "--exclude", "optimizer", "-o", "b.pt").code == 0
    assert list(torch.load("b.pt")) == ["model", "epoch"]
    assert ckpt("keep", "m.pt", "enc.0", "--exclude", "enc").code == 2


def test_cast_leaves_what_is_excluded_as_it_is(model: Path, ckpt: Ckpt) -> None:
    assert ckpt("cast", "m.pt", "bfloat16", "--exclude", "head").code == 0
    assert {name: tensor.dtype for name, tensor in torch.load("m.pt").items()} == {
        **dict.fromkeys(("enc.0.w", "enc.0.b", "enc.1.w"), torch.bfloat16),
        "head.w": torch.float32,
    }


def test_cast_refuses_to_exclude_half_of_a_tie(here: Path, ckpt: Ckpt) -> None:
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared, "c": torch.ones(1)}, "tied.pt")
    answer = ckpt("cast", "tied.pt", "bfloat16", "--exclude", "b")
    assert (answer.code, "share their bytes" in answer.err) == (2, True)
    assert ckpt("cast", "tied.pt", "bfloat16", "--exclude", "a", "--exclude", "b").code == 0
    assert torch.load("tied.pt")["c"].dtype == torch.bfloat16


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out.npz", "hf"])
def test_convert_writes_what_is_selected(model: Path, ckpt: Ckpt, output: str) -> None:
    assert ckpt("convert", "m.pt", output, "enc", "--exclude", "*.b").code == 0
    assert sorted(names(output)) == ["enc.0.w", "enc.1.w"]


@pytest.mark.parametrize("to", ["pt", "dcp"])
def test_convert_of_a_part_keeps_nesting_and_values(model: Path, ckpt: Ckpt, to: str) -> None:
    answer = ckpt("convert", "train.pt", "out", "--to", to, "--exclude", "optimizer", "--exclude", "model.enc.0")
    assert answer.code == 0
    assert sorted(names("out")) == ["epoch", "model.enc.1.w", "model.head.w"]


def test_convert_of_a_part_of_the_selected_prefix(model: Path, ckpt: Ckpt) -> None:
    assert ckpt("convert", "train.pt", "out.pt", "--select", "model", "--exclude", "*.b").code == 0
    assert list(torch.load("out.pt")) == ["enc.0.w", "enc.1.w", "head.w"]
    assert ckpt("convert", "train.pt", "out.safetensors", "model.enc", "--select", "model").code == 0
    assert sorted(names("out.safetensors")) == ["enc.0.b", "enc.0.w", "enc.1.w"]
