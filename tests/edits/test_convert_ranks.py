"""`convert` writes the model of a run of several ranks, as zero_to_fp32 does, and says what stayed behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_edit import Ckpt
from safetensors.torch import load_file

from ckpt_cli.formats import open_checkpoint

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
        assert torch.equal(found[key], wanted[key]), key
        assert found[key].dtype == wanted[key].dtype
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
    assert found["frozen.weight"].dtype == torch.bfloat16
    assert found["emb.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_ls_lists_the_model_and_with_all_the_rest(ckpt: Ckpt) -> None:
    path = str(SAMPLES / "zero2")
    model = ckpt("ls", path).out.splitlines()
    assert model and all(line.startswith("model.") for line in model)
    every = ckpt("ls", "-a", path).out
    assert "optimizer.state.l1.weight.exp_avg\t" in every
    assert "epoch\t" in every
    assert "optimizer.state.l1.bias.exp_avg\t" in ckpt("ls", path, "optimizer").out
    files = ckpt("ls", "--files", path)
    assert "optim_states.optimizer_state_dict." in files.out
    assert "listed as they are" in files.err


def test_other_commands_read_the_joined_values(ckpt: Ckpt, tmp_path: Path) -> None:
    path = str(SAMPLES / "zero3")
    assert ckpt("convert", path, str(tmp_path / "out.pt")).code == 0
    with_prefix = {line.split("\t")[-1].removeprefix("model."): line.split("\t")[0] for line in ckpt("hash", path).out.splitlines()}
    alone = {line.split("\t")[-1]: line.split("\t")[0] for line in ckpt("hash", str(tmp_path / "out.pt")).out.splitlines()}
    assert alone.keys() - with_prefix.keys() <= {"", "all", "(all)", "total"}
    same = [name for name in alone if name in with_prefix]
    assert "l1.weight" in same
    assert all(with_prefix[name] == alone[name] for name in same if name in load_file(SAMPLES / "zero3.safetensors"))
    shown = ckpt("show", path, "model.l1.bias[1:3]")
    assert shown.code == 0
    with open_checkpoint_of(path) as checkpoint:
        assert checkpoint.fixed


def open_checkpoint_of(path: str):  # noqa: ANN201
    from contextlib import closing

    return closing(open_checkpoint(path))
