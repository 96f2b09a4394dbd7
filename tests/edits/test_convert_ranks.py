"""`convert` writes the model of a run of several ranks, as zero_to_fp32 does, and says what stayed behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "fsdp1", "fsdp2", "hsdp"])
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out"])
def test_the_model_is_written_under_its_own_names(name: str, output: str, ckpt: Ckpt, tmp_path: Path) -> None:
    answer = ckpt("convert", str(SAMPLES / name), str(tmp_path / output), "--dtype", "float32")
    assert answer.code == 0, answer.err
    if output == "out.pt":
        found = torch.load(tmp_path / output)
    else:
        found = load_file(tmp_path / output / "model.safetensors" if output == "out" else tmp_path / output)
    wanted = load_file(SAMPLES / f"{name}.safetensors")
    tied = {"head.weight", "emb.weight"}
    assert wanted.keys() - found.keys() <= tied
    for key in found.keys() & wanted.keys():
        assert torch.equal(found[key], wanted[key].float() if found[key].is_floating_point() else wanted[key]), key
    said = "entries of the run left out, which --all takes"
    assert (said in answer.err) == (name != "fsdp1")


def test_all_entries_are_written_on_demand(ckpt: Ckpt, tmp_path: Path) -> None:
    answer = ckpt("convert", str(SAMPLES / "zero2"), str(tmp_path / "out.pt"), "--all", "--tensors-only")
    assert answer.code == 0, answer.err
    found = torch.load(tmp_path / "out.pt")
    assert {"model.l1.weight", "optimizer.state.l1.weight.exp_avg"} <= set(found)


def test_the_same_dtype_as_in_the_run_stays_without_one(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("convert", str(SAMPLES / "zero3"), str(tmp_path / "out.pt")).code == 0
    found = torch.load(tmp_path / "out.pt")
    wanted = load_file(SAMPLES / "zero3.safetensors")
    assert {key: each.dtype for key, each in found.items()} == {key: each.dtype for key, each in wanted.items()}
    assert found["frozen.weight"].dtype == torch.bfloat16
    assert found["emb.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_ls_lists_the_model_and_with_all_the_rest(ckpt: Ckpt) -> None:
    path = str(SAMPLES / "zero2")
    model = ckpt("ls", path).out.splitlines()
    assert model
    assert all(line.startswith("model.") for line in model)
    every = ckpt("ls", "-a", path).out
    assert "optimizer.state.l1.weight.exp_avg\t" in every
    assert "epoch\t" in every
    assert "optimizer.state.l1.bias.exp_avg\t" in ckpt("ls", path, "optimizer").out
    files = ckpt("ls", "--files", path)
    assert "optim_states.optimizer_state_dict." in files.out
    assert "listed as they are" in files.err


@pytest.mark.parametrize("name", ["zero2", "zero3", "universal3"])
def test_the_states_of_the_optimizer_are_listed_with_the_group_of_each_parameter(name: str, ckpt: Ckpt) -> None:
    rows = [line.split("\t") for line in ckpt("ls", "--optimizer", str(SAMPLES / name)).out.splitlines()]
    groups = {row[0]: (row[5], row[7], row[8]) for row in rows if "exp_avg" in row[3]}
    assert groups["model.l1.weight"] == ("0", "0.1", "named")
    assert groups["model.l1.bias"] == ("1", "0.0", "named")
    assert len(groups) == 7


def test_the_written_model_hashes_as_the_joined_one(ckpt: Ckpt, tmp_path: Path) -> None:
    path = str(SAMPLES / "zero3")
    assert ckpt("convert", path, str(tmp_path / "out.pt")).code == 0
    joined = [line.split("\t") for line in ckpt("hash", path, "model").out.splitlines()]
    alone = [line.split("\t") for line in ckpt("hash", str(tmp_path / "out.pt")).out.splitlines()]
    by_name = {name: digest for digest, name in alone if name}
    assert len(by_name) > 10
    assert {name.removeprefix("model."): digest for digest, name in joined if name.startswith("model.")} == {
        name: digest for name, digest in by_name.items() if not name.startswith("(")
    }


def test_it_is_not_edited(ckpt: Ckpt, tmp_path: Path) -> None:
    for output in ((), ("-o", str(tmp_path / "out"))):
        answer = ckpt("set", str(SAMPLES / "fsdp2"), "model.scale[0]=1", *output)
        assert answer.code == 2
        assert "joined from the files of several ranks" in answer.err
