"""`set --replace` writes the blocks that have NaN or infinities, and `tie --new` adds a second name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def broken() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(70, 3000).to(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
    tensors["float64"] = torch.randn(7, dtype=torch.float64)
    tensors["float8_e5m2"] = torch.randn(9).to(torch.float8_e5m2)
    for tensor in tensors.values():
        tensor.view(-1)[3], tensor.view(-1)[-1], tensor.view(-1)[1] = float("nan"), float("inf"), float("-inf")
    return {**tensors, "turned": tensors["float32"].T, "fine": torch.ones(5), "ints": torch.arange(3)}


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_nan_and_infinities_are_replaced_where_they_are(ckpt: Ckpt, jobs: int, kind: str) -> None:
    before = broken()
    if kind == "legacy":
        del before["float8_e5m2"]  # which torch does not load from there
    torch.save(before, "m.pt", _use_new_zipfile_serialization=kind == "zip")
    values = ["--replace", "nan=0", "--replace", "inf=7", "--replace", "-inf=-7"]
    answer = ckpt("set", "m.pt", "*", *values, "-j", jobs, "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert sorted(report["changed"]) == sorted([*before.keys() - {"fine", "ints"}])
    assert report["patched"]
    assert report["bytes_written"] < 60_000
    assert "1 nan in float16" in report["notes"]
    found = torch.load("m.pt")
    for name, tensor in before.items():
        wanted = tensor
        if tensor.is_floating_point():
            wanted = torch.nan_to_num(tensor.double(), 0, 7, -7).to(tensor.dtype)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), wanted.double())
    assert ckpt("check", "m.pt", "--deep").code == 0
    again = ckpt("set", "m.pt", "*", *values)
    assert again.code == 0
    assert "it was so already" in again.err


def test_only_what_is_named_and_asked_for_is_replaced(ckpt: Ckpt) -> None:
    save_file({name: tensor for name, tensor in broken().items() if name != "turned"}, "m.safetensors")
    before = Path("m.safetensors").read_bytes()
    assert ckpt("set", "m.safetensors", "float16", "--replace", "nan=1", "-n").code == 0
    assert Path("m.safetensors").read_bytes() == before
    report = ckpt_cli.set("m.safetensors", ["float16", "fine"], replace={"nan": 1}, output="o.safetensors")
    assert report["changed"] == ["float16"]
    found = load_file("o.safetensors")
    assert found["float16"].view(-1)[3] == 1
    assert found["float16"].view(-1)[-1] == float("inf")
    assert found["float32"].isnan().sum() == 1
    assert Path("m.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["*", "--replace", "none=0"], "it is nan=VALUE, inf=VALUE or -inf=VALUE"),
        (["*", "--replace", "nan=nan"], "it is nan=VALUE"),
        (["*", "--replace", "nan=0", "--replace", "nan=1"], "each once"),
        (["*", "--replace", "nan=0", "--new"], "--replace goes with none of"),
        (["ints", "--replace", "nan=0"], "'ints' is not a floating tensor"),
        (["float16", "--replace", "nan=1e9"], "float16 cannot hold"),
        (["gaps", "--replace", "nan=0"], "have gaps between them"),
    ],
)
def test_what_cannot_be_replaced_is_refused(ckpt: Ckpt, arguments: list[str], message: str) -> None:
    torch.save({**broken(), "gaps": torch.ones(4, 4)[:, 1]}, "m.pt")
    answer = ckpt("set", "m.pt", *arguments)
    assert answer.code == 2
    assert message in answer.err


# --- second names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pt", "legacy.pt", "m.safetensors", "shards"])
def test_a_second_name_is_the_same_tensor(ckpt: Ckpt, name: str) -> None:
    state = {"model.embed": torch.randn(4, 3), "model.b": torch.ones(2)}
    if name == "shards":
        save_file(state, "one.safetensors")
        assert ckpt("convert", "one.safetensors", "shards", "--max-shard", "40B").code == 0
    elif name.endswith("safetensors"):
        save_file(state, name)
    else:
        torch.save(state, name, _use_new_zipfile_serialization=name == "m.pt")
    answer = ckpt("tie", name, "model.embed", "model.head", "model.third", "--new")
    assert answer.code == 0, answer.err
    assert ckpt("ties", name, "model.embed", "model.head").code == 0
    assert ckpt("ties", name, "model.third", "model.head").code == 0
    assert ckpt("check", name, "--deep").code == 0
    if name.endswith(".pt"):
        found = torch.load(name)
        assert found["model.head"].data_ptr() == found["model.embed"].data_ptr()
        assert torch.equal(found["model.third"], state["model.embed"])
    assert ckpt("tie", name, "model.embed", "model.head").code == 2


def test_a_second_name_needs_new_and_room(ckpt: Ckpt) -> None:
    torch.save({"a": torch.ones(2), "b": {"c": torch.ones(2)}}, "m.pt")
    assert "nothing is called" in ckpt("tie", "m.pt", "a", "z").err
    assert "is an entry itself" in ckpt("tie", "m.pt", "a", "a.z", "--new").err
    assert "nothing is called" in ckpt("tie", "m.pt", "q", "z", "--new").err
    assert ckpt("tie", "m.pt", "b.c", "a", "b.d", "--new").code == 0
    found = torch.load("m.pt")
    assert found["a"].data_ptr() == found["b"]["c"].data_ptr() == found["b"]["d"].data_ptr()
    assert ckpt_cli.tie("m.pt", "a", "b.e", new=True)["changed"] == ["a", "b.e"]
