"""What the reference libraries read of each format that `ckpt convert` writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from contract import State, bits
from safetensors import safe_open
from safetensors.torch import load_file


def read_pt(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What torch loads without trusting the file."""
    found: State = torch.load(path)
    return found


def read_safetensors(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What the library loads, and the aliases that `save_model` would have noted."""
    with safe_open(path, "pt") as file:
        noted = file.metadata()
    assert noted["format"] == "pt"
    stored = load_file(path)
    return stored | {name: stored[kept] for name, kept in noted.items() if kept in stored and name not in stored}


def read_npz(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What numpy loads."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def read_hf(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """Every shard, and the aliases in the index."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in set(index["weight_map"].values()):
        part = load_file(path / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        stored |= part
    assert stored.keys() == index["weight_map"].keys()
    noted = index["metadata"]
    return stored | {name: stored[kept] for name, kept in noted.items() if kept in stored and name not in stored}


def read_bin(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """Every shard."""
    index = json.loads((path / "pytorch_model.bin.index.json").read_text())
    found = {}
    for shard in set(index["weight_map"].values()):
        found |= torch.load(path / shard)
    assert found.keys() == index["weight_map"].keys()
    return found


def read_dcp(path: Path, like: Mapping[str, torch.Tensor]) -> State:
    """What torch.distributed.checkpoint loads into tensors of these shapes."""
    found = {name: torch.full_like(tensor.contiguous(), 0) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


TARGETS: dict[str, tuple[str, list[str], Callable[[Path, Mapping[str, torch.Tensor]], State]]] = {
    "pt": ("out.pt", [], read_pt),
    "safetensors": ("out.safetensors", [], read_safetensors),
    "npz": ("out.npz", ["--tensors-only"], read_npz),
    "hf": ("out", ["--max-shard", "60B"], read_hf),
    "hf-bin": ("out", ["--max-shard", "120", "--to", "hf-bin"], read_bin),
    "dcp": ("out", ["--to", "dcp"], read_dcp),
}


def assert_same_state(found: State, wanted: State) -> None:
    """Equal in names, order, dtypes, shapes, values and ties."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
    pairs = [
        [[one.data_ptr() == other.data_ptr() for one in state.values() if one.numel()]
         for other in state.values() if other.numel()]
        for state in (found, wanted)
    ]  # fmt: skip
    assert pairs[0] == pairs[1]
