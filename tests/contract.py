"""The formats that the contract suite runs over: how each is written and read by the library it belongs to.

A new format is one entry in FORMATS with its two functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """One format, as its own library writes and reads it."""

    name: str
    """What `ckpt` calls it."""
    suffix: str
    """Of the file; empty where `write` makes a folder."""
    write: Callable[[State, Path], None]
    read: Callable[[Path], State]
    """The oracle: every name with its tensor, aliases included."""
    keeps_views: bool = True
    """Whether strides and storage offsets survive; where not, tensors are stored contiguously."""
    keeps_ties: bool = True
    """Whether two names of one tensor are still one, be it as an alias."""
    without: tuple[str, ...] = ()
    """Names of the sample that it cannot hold."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """The kinds of those tensors that are told to be parameters or buffers."""
    variant: str = ""
    """What tells two that `ckpt` calls the same apart."""

    @property
    def label(self) -> str:
        """What the tests call it."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def sample(self) -> State:
        """The sample state, as far as the format can hold it."""
        return {name: tensor for name, tensor in sample().items() if name not in self.without}


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of every file of a folder, by name."""
    return {each.name: each.read_bytes() for each in (sorted(path.iterdir()) if path.is_dir() else [path])}


def sample() -> State:
    """A state of several dtypes and layouts, with a tie, and with an equal tensor stored apart."""
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    return {
        "0.weight": shared,
        "0.bias": torch.randn(4).to(torch.bfloat16),
        "2.weight": shared,
        "2.copy": shared.clone(),
        "3.running_mean": torch.randn(5, 2).to(torch.float16),
        "3.scale": torch.randn(4),
        "3.steps": torch.tensor(7),
        "3.mask": torch.tensor([True, False, True]),
        "4.empty": torch.empty(0, 3),
        "4.columns": torch.arange(12).reshape(3, 4).t(),
    }


def _write_zip(state: State, path: Path) -> None:
    torch.save(state, path)


def _read_zip(path: Path) -> State:
    found: State = torch.load(path)
    return found


def _write_safetensors(state: State, path: Path) -> None:
    """Tied names are recorded as `save_model` records them; views are made contiguous."""
    kept: dict[int, str] = {}
    aliases: dict[str, str] = {}
    unique: State = {}
    for name, tensor in state.items():
        first = kept.setdefault(id(tensor), name)
        if first == name:
            unique[name] = tensor.contiguous()
        else:
            aliases[name] = first
    save_file(unique, path, metadata={"format": "pt", **aliases})


def _read_safetensors(path: Path) -> State:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = load_file(path)
    found.update({alias: found[name] for alias, name in metadata.items() if name in found})
    return found


def _sharded(write: Callable[[State, Path], None], stem: str, suffix: str) -> Callable[[State, Path], None]:
    """A writer of two shards and their index; tied tensors stay in one shard, as the hub's writers keep them."""

    def write_set(state: State, folder: Path) -> None:
        folder.mkdir()
        names = list(state)
        halves = [names[:4], names[4:]]
        weight_map = {}
        for number, half in enumerate(halves, start=1):
            shard = f"{stem}-{number:05}-of-00002{suffix}"
            write({name: state[name] for name in half}, folder / shard)
            weight_map.update(dict.fromkeys(half, shard))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))

    return write_set


def _read_shards(read: Callable[[Path], State], suffix: str) -> Callable[[Path], State]:
    def read_set(folder: Path) -> State:
        found: State = {}
        for shard in sorted(folder.glob(f"*{suffix}")):
            found.update(read(shard))
        return found

    return read_set


write_shards = _sharded(_write_zip, "pytorch_model", ".bin")

FORMATS = [
    Format("zip", ".pt", _write_zip, _read_zip),
    Format("safetensors", ".safetensors", _write_safetensors, _read_safetensors, keeps_views=False),
    Format(
        "shards",
        "",
        write_shards,
        _read_shards(_read_zip, ".bin"),
        variant="zip",
    ),
    Format(
        "shards",
        "",
        _sharded(_write_safetensors, "model", ".safetensors"),
        _read_shards(_read_safetensors, ".safetensors"),
        keeps_views=False,
        variant="safetensors",
    ),
]
