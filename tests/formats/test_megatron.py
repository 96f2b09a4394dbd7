"""What Megatron-core writes in its format torch_dist: a distributed checkpoint with objects in shards."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from set_elements import edit
from torch.distributed.checkpoint import save

import ckpt_cli
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Value

SAMPLES = Path(__file__).parents[1] / "samples"
STATE = "decoder.layers.mlp.linear_fc1._extra_state"


def test_layers_that_it_stacks_are_one_tensor_and_objects_in_shards_are_values() -> None:
    with ckpt_cli.open(SAMPLES / "megatron") as checkpoint:
        layers = checkpoint["decoder.layers.mlp.linear_fc1.weight"].torch()
    assert torch.equal(layers, torch.stack([torch.arange(12.0).view(3, 4) + 100 * layer for layer in range(2)]))
    checkpoint = open_checkpoint(str(SAMPLES / "megatron"))
    shards = [entry for entry in checkpoint.entries if isinstance(entry, Value) and entry.name.startswith(STATE)]
    assert [entry.name for entry in shards] == [f"{STATE}/shard_{number}_12" for number in range(12)]
    assert getattr(shards[11].value, "text", "") == "[{'layer': 11}]"
    checkpoint.close()


def test_shards_of_objects_that_ranks_noted_apart_stand_together_by_their_places(tmp_path: Path) -> None:
    order = ["b/shard_10_12", "a/shard_0_1", "b/shard_9_12", "w", "b/shard_0.1_12.2", "x/y"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict.fromkeys(order, 1), checkpoint_id=tmp_path / "d", no_dist=True)
    checkpoint = open_checkpoint(str(tmp_path / "d"))
    assert [entry.name for entry in checkpoint.entries] == [
        "b/shard_0.1_12.2", "b/shard_9_12", "b/shard_10_12", "a/shard_0_1", "w", "x/y",
    ]  # fmt: skip
    checkpoint.close()


def test_what_is_not_distributed_stands_beside_it_under_common(tmp_path: Path, ckpt: Ckpt) -> None:
    checkpoint = open_checkpoint(str(SAMPLES / "megatron"))
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert (values["common.iteration"], values["common.args.hidden_size"]) == (7, 4)
    assert checkpoint.version.startswith("Megatron-core, 4 files; torch.distributed.checkpoint 1.0.0")
    assert list(checkpoint.objects) == ["types.SimpleNamespace"]  # and none of the plans in its metadata
    checkpoint.close()
    path = Path(shutil.copytree(SAMPLES / "megatron", tmp_path / "run"))
    edit(path, "common.iteration=8")
    edit(path, "decoder.final_layernorm.weight[1]=5")
    assert torch.load(path / "common.pt", weights_only=False)["iteration"] == 8
    with ckpt_cli.open(path) as changed:
        assert changed["decoder.final_layernorm.weight"].torch().tolist() == [1, 5, 1, 1]
    scanned = ckpt("scan", str(SAMPLES / "megatron"))
    assert (scanned.code, scanned.out) == (0, "")


@pytest.mark.parametrize("output", ["out.pt", "out"])
def test_the_distributed_state_alone_is_converted_as_a_whole(output: str, tmp_path: Path, ckpt: Ckpt) -> None:
    bare = Path(shutil.copytree(SAMPLES / "megatron", tmp_path / "bare", ignore=shutil.ignore_patterns("common.pt")))
    options = ("--to", "dcp") if output == "out" else ()
    for source, place in ((SAMPLES / "megatron", "a"), (bare, "b")):
        (tmp_path / place).mkdir()
        answer = ckpt("convert", str(source), str(tmp_path / place / output), *options)
        assert answer.code == 0, answer.err
        assert ("7 entries of the run left out, which --all takes" in answer.err) == (place == "a")
    assert ckpt("ls", "-a", str(tmp_path / "a" / output)).out == ckpt("ls", "-a", str(tmp_path / "b" / output)).out
    if output == "out.pt":
        assert (tmp_path / "a" / output).read_bytes() == (tmp_path / "b" / output).read_bytes()
