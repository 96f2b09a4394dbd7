"""New checkpoints of old ones with new, renamed, dropped and added tensors: the same in every format, and for torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_cli
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.edits.derive import DeriveOptions, derive
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.changes import Changes, Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, contiguous_stride

STATE = {f"{part}.{name}": torch.arange(6.0).reshape(2, 3) + number for number, (part, name) in enumerate(
    [("a", "weight"), ("a", "scale"), ("b", "weight")])}  # fmt: skip


class Made:
    """Bytes of a storage that are in no file."""

    composed = True

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)

    def view(self, begin: int, nbytes: int) -> memoryview:
        return self.data[begin : begin + nbytes]

    def extents(self, begin: int, nbytes: int) -> Any:
        raise UnsupportedError("its bytes are in no file")


def new_tensor(name: str, values: torch.Tensor) -> tuple[Tensor, Content]:
    shape = tuple(values.shape)
    storage = Storage(f"new {name}", values.numel() * 4, "cpu", Made(values.contiguous().numpy().tobytes()))
    return Tensor(name, BY_NAME["float32"], shape, contiguous_stride(shape), storage), content_of(storage)


def planned(inside: str) -> Any:
    """A plan that drops one tensor, renames one and gives it other values, and adds one beside it."""

    def plan(checkpoint: Checkpoint) -> EditPlan:
        changed, one = new_tensor(f"{inside}a.weight", torch.full((4, 1), 7.0))
        added, other = new_tensor(f"{inside}a.bias", torch.tensor([1.0, 2.0]))
        assert changed.storage is not None
        assert added.storage is not None
        changes = Changes(
            names={changed.name: f"{inside}a.kernel"},
            dropped=frozenset({f"{inside}a.scale"}),
            tensors={changed.name: changed},
            added={added.name: added},
            contents={changed.storage: one, added.storage: other},
        )
        return EditPlan(Verb("made", "make"), (changed.name,), changes=changes)

    return plan


WANTED = {"a.kernel": torch.full((4, 1), 7.0), "b.weight": STATE["b.weight"], "a.bias": torch.tensor([1.0, 2.0])}


def values_of(path: Path) -> dict[str, torch.Tensor]:
    with ckpt_cli.open(path) as checkpoint:
        return {tensor.name: tensor.torch() for tensor in checkpoint.tensors}


SOURCES = [("m.safetensors", False), ("shards", False), *itertools.product(["m.pt", "legacy.pt", "dcp"], [False, True])]


@pytest.mark.parametrize(("source", "nested"), SOURCES)
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors", "out.npz", "out-hf", "out-dcp"])
def test_tensors_are_changed_renamed_dropped_and_added_into_every_format(
    tmp_path: Path, source: str, output: str, nested: bool
) -> None:
    state: Any = {"model": dict(STATE), "step": 3} if nested else dict(STATE)
    path = tmp_path / source
    if source == "m.safetensors":
        save_file(state, path)
    elif source == "shards":
        save_file(state, tmp_path / "m.safetensors")
        ckpt_cli.convert(tmp_path / "m.safetensors", path, to="hf", max_shard=40)
    else:
        torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=source != "legacy.pt")
        if source == "legacy.pt":
            (tmp_path / "m.pt").rename(path)
        if source == "dcp":
            ckpt_cli.convert(tmp_path / "m.pt", path, to="dcp")
    inside = "model." if nested else ""
    to = {"out-hf": "hf", "out-dcp": "dcp"}.get(output)
    keeps = output in ("out.pt", "out-dcp")
    only = "model" if nested and not keeps else None
    derive(str(path), str(tmp_path / output), planned(inside), DeriveOptions(to=to, only=only))
    found = values_of(tmp_path / output)
    names = {f"{inside}{name}" if nested and keeps else name: value for name, value in WANTED.items()}
    assert found.keys() == names.keys()
    assert all(torch.equal(found[name], value) for name, value in names.items())
    if output == "out.pt":
        loaded = torch.load(tmp_path / output)
        if nested:
            assert loaded["step"] == 3
            assert loaded["model"].keys() == WANTED.keys()
        else:
            assert loaded.keys() == WANTED.keys()
    if output == "out.safetensors":
        assert load_file(tmp_path / output).keys() == WANTED.keys()
