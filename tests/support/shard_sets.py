"""Sets of shards as huggingface_hub writes them, what each shard holds, and whether index and files agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_torch_model, save_torch_state_dict
from run_edit import State, assert_states
from safetensors.torch import load_file
from torch import nn


def state() -> State:
    """Tensors for three shards: a, then b, c and d, then e."""
    torch.default_generator.manual_seed(0)
    return {
        "m.a": torch.randn(20, 5),
        "m.b": torch.randn(20, 5),
        "m.c": torch.randn(3),
        "n.d": torch.arange(4),
        "n.e": torch.randn(2, dtype=torch.float64),
    }


def tied_state() -> State:
    """The same with three names for one tensor."""
    tensors = state()
    return tensors | {"z.tied": tensors["m.a"], "z.more": tensors["m.a"]}


KINDS = ["safetensors", "bin"]


def save(tensors: State, folder: Path, kind: str) -> Path:
    """Write shards of at most 450 bytes."""
    folder.mkdir(exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=450, safe_serialization=kind == "safetensors")
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    """The index as it stands in the file."""
    (path,) = folder.glob("*.index.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def aliases(folder: Path) -> dict[str, str]:
    """The aliases that the index records."""
    index = index_of(folder)
    return {k: v for k, v in index["metadata"].items() if isinstance(v, str) and v in index["weight_map"]}


def kind_of(folder: Path) -> str:
    """Which kind of set it is."""
    return "safetensors" if list(folder.glob("*.safetensors")) else "bin"


def read_shard(path: Path, suffix: str = "") -> State:
    """What a shard's own library reads from it; the suffix is for a path that has none."""
    found: State = load_file(path) if (path.suffix or suffix) == ".safetensors" else torch.load(path)
    return found


def held(folder: Path) -> dict[str, State]:
    """What each shard has."""
    return {path.name: read_shard(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")}


def whole(folder: Path) -> State:
    """Every tensor of a set, with the aliases of its index; every name is where the index says, and nowhere else."""
    index, shards = index_of(folder), held(folder)
    assert {name: shard for shard, tensors in shards.items() for name in tensors} == index["weight_map"]
    assert set(index["weight_map"].values()) == set(shards)
    stored = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in stored.values()}
    assert index["metadata"]["total_size"] == sum(storages.values())
    assert not aliases(folder).keys() & stored.keys()
    return stored | {name: stored[kept] for name, kept in aliases(folder).items()}


def ties_of(folder: Path) -> list[list[str]]:
    """The names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in sorted(whole(folder).items()):
        names.setdefault(tensor.data_ptr(), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def assert_holds(folder: Path, wanted: State) -> None:
    """These tensors and no others, which its own library loads into a module."""
    assert_states(whole(folder), wanted)
    model = holder({name: wanted[name] for name in index_of(folder)["weight_map"]})
    load_torch_model(model, folder, strict=True, safe=kind_of(folder) == "safetensors")
    assert_states(model.state_dict(), {name: wanted[name] for name in model.state_dict()})


def holder(wanted: State) -> nn.Module:
    """A module whose state_dict has just these names."""
    root = nn.Module()
    for name, tensor in wanted.items():
        *outer, last = name.split(".")
        at = root
        for part in outer:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(last, torch.zeros_like(tensor))
    return root


def renamed(change: Callable[[str], str]) -> State:
    """The tensors under other names."""
    return {change(name): tensor for name, tensor in state().items()}


def without(*names: str, of: State | None = None) -> State:
    """The tensors without some."""
    return {name: tensor for name, tensor in (of or state()).items() if name not in names}
