"""What Megatron-core writes in its format torch_dist: a distributed checkpoint with objects in shards."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
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
