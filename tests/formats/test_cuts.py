"""Tensors that up to eight ranks have parts of, in any cut: ShardedTensors, and chunks of distributed checkpoints."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dcp_files import Cut, Writer, values
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rank_files import values_of
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckpt_cli

Shape = tuple[int, ...]


@st.composite
def grids(draw: st.DrawFn, most: int, least: int = 0) -> tuple[Shape, list[Cut]]:
    """A shape of odd sizes, and boxes that it is cut into along some of its dimensions, some of them empty or whole."""
    shape = tuple(draw(st.lists(st.integers(least, 7), min_size=least, max_size=3)))
    edges: list[list[int]] = []
    left = most
    for size in shape:
        cuts = draw(st.lists(st.integers(0, size), max_size=min(left - 1, 3), unique=True).map(sorted))
        inner = [cut for cut in cuts if 0 < cut < size]
        left //= len(inner) + 1
        edges.append([0, *inner, size])
    boxes = itertools.product(*(itertools.pairwise(each) for each in edges))
    return shape, [(tuple(b for b, _ in box), tuple(e - b for b, e in box)) for box in boxes]


def part(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The elements of one box."""
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(*cut, strict=True))].clone()


@st.composite
def shards(draw: st.DrawFn) -> tuple[int, list[tuple[Shape, list[Cut], list[int]]]]:
    """A number of ranks, and tensors in shards, each with the rank that has it; a rank may have none, or several."""
    world = draw(st.integers(1, 8))
    tensors = []
    for shape, cuts in draw(st.lists(grids(8, least=1), min_size=1, max_size=3)):
        owners = draw(st.lists(st.integers(0, world - 1), min_size=len(cuts), max_size=len(cuts)))
        tensors.append((shape, cuts, owners))
    return world, tensors


@pytest.mark.filterwarnings("ignore:Please use DTensor")
@settings(deadline=None, max_examples=20)
@given(shards())
def test_shards_of_any_ranks_are_put_together(case: tuple[int, list[tuple[Shape, list[Cut], list[int]]]]) -> None:
    world, tensors = case
    whole = {f"t{at}": torch.randn(shape) for at, (shape, _, _) in enumerate(tensors)}
    with TemporaryDirectory() as folder:
        for rank in range(world):
            save(Path(folder) / f"model_world_size_{world}_rank_{rank}.pt", rank, world, whole, tensors)
        found = values_of(Path(folder))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def save(path: Path, rank: int, world: int, whole: dict[str, torch.Tensor], tensors: Any) -> None:
    """Save the ShardedTensors of one rank; no other process is there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        found = {}
        for (name, tensor), (shape, cuts, owners) in zip(whole.items(), tensors, strict=True):
            listed = [
                ShardMetadata(list(offsets), list(sizes), f"rank:{owner}/cpu")
                for (offsets, sizes), owner in zip(cuts, owners, strict=True)
            ]
            mine = [
                Shard(part(tensor, cut), metadata)
                for cut, metadata, owner in zip(cuts, listed, owners, strict=True)
                if owner == rank
            ]
            properties = TensorProperties(dtype=tensor.dtype)
            about = ShardedTensorMetadata(listed, torch.Size(shape), properties)
            found[name] = ShardedTensor._init_from_local_shards_and_global_metadata(mine, about)
        torch.save(found, path)
    finally:
        dist.destroy_process_group()


@settings(deadline=None, max_examples=40)
@given(case=grids(16), data=st.data())
def test_chunks_of_any_boxes_are_put_together_and_set(case: tuple[Shape, list[Cut]], data: st.DataObject) -> None:
    shape, cuts = case
    whole = torch.arange(prod(shape), dtype=torch.float64).reshape(shape)
    with TemporaryDirectory() as folder:
        path = Writer(Path(folder) / "dcp").tensor("w", whole, data.draw(st.permutations(cuts))).write()
        assert torch.equal(values(path), whole)
        if whole.numel():
            at = [data.draw(st.integers(0, size - 1)) for size in shape]
            ckpt_cli.set(path, {f"w[{','.join(map(str, at))}]" if at else "w": 99})
            whole[tuple(at)] = 99
            assert torch.equal(values(path), whole)
