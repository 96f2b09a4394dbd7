"""`graft`: tensors of one checkpoint in the places of another's, held against torch; in place where that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

import ckpt_cli


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"enc.0.weight": (4, 3), "enc.0.bias": (4,), "head.weight": (2, 4)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def part(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name[4:]: tensor for name, tensor in model(seed, dtype).items() if name.startswith("enc.")}


def load(path: str) -> dict[str, Any]:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path)


def save(state: Any, path: str) -> str:
    if path.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in path)
    return path


FILES = ["m.pt", "m-legacy.pt", "m.safetensors"]


@pytest.mark.parametrize("source", ["p.pt", "p-legacy.pt", "p.safetensors"])
@pytest.mark.parametrize("target", FILES)
def test_a_part_takes_its_place_in_place(ckpt: Ckpt, target: str, source: str) -> None:
    save(model(0), target)
    save(part(1), source)
    before = Path(target).stat()
    answer = ckpt("graft", target, source, "--at", "enc", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert (sorted(report["changed"]), report["in_place"]) == (["enc.0.bias", "enc.0.weight"], True)
    assert Path(target).stat().st_ino == before.st_ino
    found, wanted = load(target), {**model(0), **{f"enc.{name}": value for name, value in part(1).items()}}
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert ckpt("check", target).code == 0


@pytest.mark.parametrize("target", FILES)
def test_another_dtype_is_that_of_the_other(ckpt: Ckpt, target: str) -> None:
    save(model(0), target)
    save(part(1, torch.bfloat16), "p.safetensors")
    assert ckpt("graft", target, "p.safetensors", "--at", "enc").code == 0
    found = load(target)
    assert found["enc.0.weight"].dtype == torch.bfloat16
    assert torch.equal(found["enc.0.weight"], part(1, torch.bfloat16)["0.weight"])
    assert torch.equal(found["head.weight"], model(0)["head.weight"])


def test_a_prefix_of_the_other_is_a_part_of_it_and_the_same_place_here(ckpt: Ckpt) -> None:
    save(model(0), "m.pt")
    save({"state_dict": model(1), "epoch": 3}, "other.pt")
    assert ckpt("graft", "m.pt", "other.pt:state_dict", "--at", "").code == 0
    assert all(torch.equal(value, model(1)[name]) for name, value in torch.load("m.pt").items())
    save(model(2), "third.pt")
    assert ckpt("graft", "m.pt", "third.pt:enc").code == 0
    found = torch.load("m.pt")
    assert torch.equal(found["enc.0.weight"], model(2)["enc.0.weight"])
    assert torch.equal(found["head.weight"], model(1)["head.weight"])
    assert ckpt("graft", "m.pt", "third.pt:nothing").code == 2


def test_names_and_shapes_must_match(ckpt: Ckpt) -> None:
    before = model(0)
    save(before, "m.pt")
    save({"enc.0.weight": torch.ones(4, 3), "new.weight": torch.ones(2)}, "other.pt")
    answer = ckpt("graft", "m.pt", "other.pt")
    assert (answer.code, "new.weight" in answer.err, "--add" in answer.err) == (2, True, True)
    answer = ckpt("graft", "m.pt", "other.pt", "--add")
    assert (answer.code, "head.weight" in answer.err, "--partial" in answer.err) == (2, True, True)
    assert all(torch.equal(value, before[name]) for name, value in torch.load("m.pt").items())
    assert ckpt("graft", "m.pt", "other.pt", "--add", "--partial").code == 0
    found = torch.load("m.pt")
    assert list(found) == [*before, "new.weight"]
    assert torch.equal(found["enc.0.weight"], torch.ones(4, 3))
    save({"enc.0.weight": torch.ones(3, 4)}, "other.pt")
    answer = ckpt("graft", "m.pt", "other.pt", "--partial")
    assert (answer.code, "enc.0.weight is [4, 3], and [3, 4] in other.pt" in answer.err) == (2, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_names_follow(ckpt: Ckpt, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 2)
    save({"embed": {"w": weight}, "head": {"w": weight}}, "m.pt")
    save({"w": torch.ones(3, 2, dtype=dtype)}, "p.pt")
    report = json.loads(ckpt("graft", "m.pt", "p.pt", "--at", "embed", "--json").out)
    assert report["also_changed"] == ["head.w"]
    found = torch.load("m.pt")
    assert found["head"]["w"].dtype == dtype
    assert torch.equal(found["head"]["w"], torch.ones(3, 2, dtype=dtype))
    assert found["head"]["w"].data_ptr() == found["embed"]["w"].data_ptr()


def test_bytes_in_common_cannot_become_two_things(ckpt: Ckpt) -> None:
    weight = torch.randn(4)
    save({"a": weight, "b": weight}, "tied.pt")
    save({"a": torch.ones(4), "b": torch.zeros(4)}, "p.pt")
    answer = ckpt("graft", "tied.pt", "p.pt")
    assert (answer.code, "a and b are tied, and differ in p.pt" in answer.err) == (2, True)
    save({"a": torch.ones(4), "b": torch.ones(4)}, "p.pt")
    assert ckpt("graft", "tied.pt", "p.pt").code == 0
    save({"a": weight[:3], "b": weight[1:]}, "lap.pt")
    save({"a": torch.ones(3), "b": torch.zeros(3)}, "p.pt")
    answer = ckpt("graft", "lap.pt", "p.pt")
    assert (answer.code, "share some of their bytes" in answer.err) == (2, True)


def test_views_that_are_not_contiguous_are_taken_and_replaced(ckpt: Ckpt) -> None:
    save({"w": torch.randn(4, 3).t()}, "m.pt")
    save({"w": torch.arange(24.0).reshape(6, 4)[::2]}, "p.pt")
    assert ckpt("graft", "m.pt", "p.pt").code == 0
    assert torch.equal(torch.load("m.pt")["w"], torch.arange(24.0).reshape(6, 4)[::2])


def test_an_output_leaves_the_file_as_it_is_and_a_dry_run_both(ckpt: Ckpt) -> None:
    save(model(0), "m.pt")
    save(part(1), "p.pt")
    before = Path("m.pt").read_bytes()
    assert ckpt("graft", "m.pt", "p.pt", "--at", "enc", "-n").code == 0
    assert ckpt("graft", "m.pt", "p.pt", "--at", "enc", "-o", "out.pt").code == 0
    assert Path("m.pt").read_bytes() == before
    assert torch.equal(torch.load("out.pt")["enc.0.bias"], part(1)["0.bias"])


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_shards_and_distributed_checkpoints_are_grafted_too(ckpt: Ckpt, to: str) -> None:
    save(model(0), "m.pt")
    save(part(1), "p.pt")
    assert ckpt("convert", "m.pt", "folder", "--to", to).code == 0
    answer = ckpt("graft", "folder", "p.pt", "--at", "enc")
    assert answer.code == 0, answer.err
    with ckpt_cli.open("folder") as checkpoint:
        assert torch.equal(checkpoint["enc.0.weight"].torch(), part(1)["0.weight"])
        assert torch.equal(checkpoint["head.weight"].torch(), model(0)["head.weight"])


def test_python_grafts_too() -> None:
    save(model(0), "m.pt")
    save(part(1), "p.pt")
    assert ckpt_cli.graft("m.pt", "p.pt", at="enc")["changed"] == ["enc.0.weight", "enc.0.bias"]
    assert torch.equal(torch.load("m.pt")["enc.0.bias"], part(1)["0.bias"])
