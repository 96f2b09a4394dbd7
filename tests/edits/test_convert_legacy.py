"""`convert --to pt-legacy`: the stream of torch.save from before 1.6, as torch reads it and as torch writes it."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import dcp_formats
import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import bits
from torch import nn

from ckpt_cli.formats import open_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*quantize.*deprecated"),
]


def training() -> dict[str, Any]:
    """Ties, views, several layouts and values."""
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    model = OrderedDict({f"layers.{n}": torch.randn(2, 3) for n in range(30)})
    model |= {"a": shared, "b": shared, "view": shared[1:3, ::2], "columns": torch.arange(6).reshape(2, 3).t()}
    quantized = torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8)
    more = {
        "p": nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor(True),
    }
    return {"model": model, **more, "sparse": torch.eye(3).to_sparse(), "q": quantized, "epoch": 3, "lr": [0.5, None]}


def converted(ckpt: Ckpt, path: Path, *more: object) -> Path:
    """The stream that a checkpoint becomes; `check` finds nothing wrong."""
    out = path.with_name("out.pt")
    answer = ckpt("convert", path, out, "--to", "pt-legacy", *more)
    assert (answer.code, answer.out) == (0, ""), answer.err
    assert not out.read_bytes().startswith(b"PK")
    assert open_checkpoint(str(out)).format == "legacy"
    assert ckpt("check", "--deep", out).code == 0
    return out


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_training_checkpoint_is_the_same_in_torch(
    tmp_path: Path, ckpt: Ckpt, is_zip: bool, weights_only: bool
) -> None:
    torch.save(training(), tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    found = torch.load(converted(ckpt, tmp_path / "m.pt"), weights_only=weights_only)
    wanted = training()
    assert (found["epoch"], found["lr"], type(found["model"])) == (3, [0.5, None], OrderedDict)
    assert list(found["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        assert (found["model"][name].stride(), bits(found["model"][name])) == (tensor.stride(), bits(tensor))
    model = found["model"]
    assert model["a"].data_ptr() == model["b"].data_ptr()
    assert model["view"].data_ptr() == model["a"][1].data_ptr()
    assert (found["p"].requires_grad, found["empty"].shape, bool(found["bool"])) == (True, (0, 3), True)
    assert torch.equal(found["q"].int_repr(), wanted["q"].int_repr())
    assert torch.equal(found["sparse"].to_dense(), torch.eye(3))


def test_the_stream_is_torchs_own_but_for_the_key_of_the_storage(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"weight": torch.randn(3, 4)}, tmp_path / "m.pt")
    torch.save(torch.load(tmp_path / "m.pt"), tmp_path / "theirs.pt", _use_new_zipfile_serialization=False)
    ours, theirs = converted(ckpt, tmp_path / "m.pt").read_bytes(), (tmp_path / "theirs.pt").read_bytes()
    begin = theirs.index(b"ctorch._utils\n")
    assert ours[: ours.index(b"ctorch._utils\n")] == theirs[:begin]
    assert ours[-8 - 48 :] == theirs[-8 - 48 :]
    assert ours.replace(b"X\1\0\0\0000", b"") == re.sub(rb"X.\0\0\0[0-9]{5,20}", b"", theirs, flags=re.DOTALL)


def test_a_module_is_kept_with_its_objects(tmp_path: Path, ckpt: Ckpt) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 2))
    torch.save({"net": net, "args": {"lr": 0.5}}, tmp_path / "m.pt")
    found = torch.load(converted(ckpt, tmp_path / "m.pt"), weights_only=False)
    assert found["args"] == {"lr": 0.5}
    assert all(torch.equal(each, net.state_dict()[name]) for name, each in found["net"].state_dict().items())


@pytest.mark.parametrize("source", ["safetensors", "npz", "dcp", "shards"])
def test_every_format_becomes_a_stream(tmp_path: Path, ckpt: Ckpt, source: str) -> None:
    from safetensors.torch import save_file

    state = {"a.weight": torch.randn(3, 4), "a.bias": torch.arange(3.0), "n": torch.tensor(7)}
    path = tmp_path / source
    if source == "npz":
        path = tmp_path / "m.npz"
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    elif source == "dcp":
        dcp_formats.save(state, path)
    else:
        path = tmp_path / "m.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        if source == "shards":
            assert ckpt("convert", path, tmp_path / "set", "--max-shard", "50B").code == 0
            path = tmp_path / "set"
    found = torch.load(converted(ckpt, path), weights_only=True)
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(each) for name, each in state.items()}


def test_nested_values_of_a_distributed_checkpoint_are_kept(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"model": {"w": torch.randn(3)}, "losses": [torch.ones(1), torch.zeros(1)], "epoch": 3}
    dcp_formats.save(state, tmp_path / "d")
    found = torch.load(converted(ckpt, tmp_path / "d"), weights_only=True)
    assert (found["epoch"], [each.item() for each in found["losses"]]) == (3, [1, 0])
    assert torch.equal(found["model"]["w"], state["model"]["w"])


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint32, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_torch_cannot_read_back_are_refused(tmp_path: Path, ckpt: Ckpt, dtype: torch.dtype) -> None:
    torch.save({"a": torch.ones(2).to(dtype), "b": torch.ones(1), "n": 3}, tmp_path / "m.pt")
    for dry in ([], ["-n"]):
        answer = ckpt("convert", tmp_path / "m.pt", tmp_path / "o.pt", "--to", "pt-legacy", *dry)
        assert answer.code == 2
        assert answer.err.count("\n") <= 2
        assert not (tmp_path / "o.pt").exists()


def test_a_cast_and_a_selection_go_into_the_stream(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"model": {"w": torch.ones(3), "v": torch.zeros(2)}, "n": 3}, tmp_path / "m.pt")
    found = torch.load(
        converted(ckpt, tmp_path / "m.pt", "--dtype", "float16", "--select", "model", "--exclude", "model.v")
    )
    assert {name: (each.dtype, each.tolist()) for name, each in found.items()} == {"w": (torch.float16, [1, 1, 1])}
    plain = converted(ckpt, tmp_path / "m.pt", "--plain", "--force")
    assert torch.load(plain, weights_only=True)["n"] == 3
