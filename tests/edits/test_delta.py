"""`delta create` and `delta apply`: the tuned checkpoint comes back bit for bit, on its own base only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_cli

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(state: Any, path: str) -> str:
    save_file(state, path) if path.endswith(".safetensors") else torch.save(state, path)
    return path


def base_and_tuned() -> tuple[State, State]:
    """Two states that have tensors of every fate in common: equal, changed here and there, or wholly, gone, new."""
    torch.manual_seed(0)
    base = {
        "same": torch.randn(50),
        "few": torch.randn(700, 800),
        "all": torch.randn(40, 30).bfloat16(),
        "ints": torch.arange(100),
        "gone": torch.ones(3),
        "shape": torch.zeros(4, 2),
        "dtype": torch.zeros(4),
        "nan": torch.full((500,), float("nan")),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }
    tuned = {name: value.clone() for name, value in base.items() if name != "gone"}
    tuned["few"][3, 5] += 1
    tuned["few"][-1, -1] = -0.0
    tuned["few"][400] *= 2
    tuned["all"] += 1
    tuned["ints"][99] = -1
    tuned["shape"] = torch.zeros(2, 4)
    tuned["dtype"] = torch.zeros(4).half()
    tuned["nan"].view(torch.int32)[7] += 1
    tuned["new"] = torch.randn(5, 2)
    return base, tuned


def same(found: State, wanted: State) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return found.keys() == wanted.keys() and all(
        (found[name].dtype, found[name].shape) == (value.dtype, value.shape) and bits(found[name]).equal(bits(value))
        for name, value in wanted.items()
    )


def load(path: str) -> State:
    return load_file(path) if path.endswith(".safetensors") else torch.load(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("jobs", [1, 4])
def test_the_tuned_checkpoint_comes_back_bit_for_bit(ckpt: Ckpt, suffix: str, jobs: int) -> None:
    base, tuned = base_and_tuned()
    save(base, f"base.{suffix}")
    save(tuned, f"tuned.{suffix}")
    answer = ckpt("delta", "create", f"base.{suffix}", f"tuned.{suffix}", "-o", "d.safetensors", "-j", jobs, "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    changed = {"few": "sparse", "all": "whole", "ints": "sparse", "shape": "whole", "dtype": "whole", "nan": "sparse"}
    assert report["changed"] == {**changed, "new": "whole"}
    assert (report["equal"], report["removed"]) == (3, ["gone"])
    assert Path("d.safetensors").stat().st_size == report["bytes_written"] < 30_000
    answer = ckpt("delta", "apply", f"base.{suffix}", "d.safetensors", "-o", f"out.{suffix}", "-j", jobs)
    assert answer.code == 0, answer.err
    assert same(load(f"out.{suffix}"), tuned)


def test_base_and_output_may_have_other_formats(ckpt: Ckpt) -> None:
    base, tuned = base_and_tuned()
    save(base, "base.pt")
    save(tuned, "tuned.safetensors")
    assert ckpt("delta", "create", "base.pt", "tuned.safetensors", "-o", "d.safetensors").code == 0
    assert ckpt("convert", "base.pt", "shards", "--to", "hf", "--max-shard", "1MB").code == 0
    assert ckpt("delta", "apply", "shards", "d.safetensors", "-o", "out.safetensors").code == 0
    assert same(load("out.safetensors"), tuned)
    assert ckpt("delta", "apply", "shards", "d.safetensors", "-o", "out").code == 0
    with ckpt_cli.open("out") as checkpoint:
        assert same({tensor.name: tensor.torch() for tensor in checkpoint.tensors}, tuned)


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64, torch.complex64]),
    st.lists(st.integers(0, 299), max_size=60),
    st.booleans(),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_elements_of_any_dtype(dtype: torch.dtype, places: list[int], strided: bool) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    stored = torch.arange(300 * size, dtype=torch.int32).to(torch.uint8).view(dtype).reshape(20, 15)
    changed = stored.clone()
    for place in places:
        changed.view(torch.uint8).reshape(-1)[place * size] += 1
    if strided:
        changed = changed.t().contiguous().t()
    torch.save({"w": stored, "v": stored[:2].clone()}, "base.pt")
    torch.save({"w": changed, "v": stored[:2].clone()}, "tuned.pt")
    ckpt_cli.delta_create("base.pt", "tuned.pt", "d.safetensors", force=True)
    ckpt_cli.delta_apply("base.pt", "d.safetensors", "out.pt", force=True)
    assert same(torch.load("out.pt"), {"w": changed, "v": stored[:2]})


def test_ties_and_values_come_along(ckpt: Ckpt) -> None:
    weight, changed = torch.randn(30), torch.randn(30)
    torch.save({"m": {"a": weight, "b": weight}, "epoch": 1, "lr": 0.5, "when": torch.device("cpu")}, "base.pt")
    torch.save({"m": {"a": changed, "b": changed}, "epoch": 2, "lr": 0.5, "when": torch.device("cuda")}, "tuned.pt")
    report = json.loads(ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors", "--json").out)
    assert report["changed"] == {"m.a": "whole", "m.b": "tied"}
    assert report["left_out"] == ["when"]
    assert ckpt("delta", "apply", "base.pt", "d.safetensors", "-o", "out.pt").code == 0
    out = torch.load("out.pt")
    assert out["m"]["a"].data_ptr() == out["m"]["b"].data_ptr()
    assert torch.equal(out["m"]["a"], changed)
    assert (out["epoch"], out["lr"], out["when"]) == (2, 0.5, torch.device("cpu"))


def test_another_base_is_refused_by_name(ckpt: Ckpt) -> None:
    base, tuned = base_and_tuned()
    save(base, "base.pt")
    save(tuned, "tuned.pt")
    assert ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors").code == 0
    answer = ckpt("delta", "apply", "tuned.pt", "d.safetensors", "-o", "out.pt")
    assert (answer.code, "another base" in answer.err, "few" in answer.err) == (2, True, True)
    assert not Path("out.pt").exists()
    answer = ckpt("delta", "apply", "base.pt", "base.pt", "-o", "out.pt")
    assert (answer.code, "not a delta" in answer.err) == (2, True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda facts, tensors: facts.update(version=2),
        lambda facts, tensors: facts.update(changed=[]),
        lambda facts, tensors: facts["changed"].update(few={"how": "sparse"}),
        lambda facts, tensors: facts["changed"].update(few={"how": "sparse", "at": "none", "shape": [700, 800]}),
        lambda facts, tensors: facts["changed"].update(few={"how": "tied", "to": "none"}),
        lambda facts, tensors: facts["changed"]["few"].update(shape=[1 << 61, 1 << 61]),
        lambda facts, tensors: facts.update(removed=[1]),
        lambda facts, tensors: tensors.update({"few.changed_at": tensors["few.changed_at"].flip(0)}),
        lambda facts, tensors: tensors.update({"few.changed_at": tensors["few.changed_at"] + 1_000_000}),
        lambda facts, tensors: tensors.update({"few.changed_at": tensors["few.changed_at"] * 0}),
        lambda facts, tensors: tensors.update({"few.changed_at": tensors["few.changed_at"] - 5_000_000}),
        lambda facts, tensors: tensors.update({"few": tensors["few"].double()}),
    ],
)
def test_a_delta_that_does_not_fit_is_one_line(ckpt: Ckpt, spoil: Any) -> None:
    base, tuned = base_and_tuned()
    save(base, "base.pt")
    save(tuned, "tuned.pt")
    assert ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors").code == 0
    tensors = load_file("d.safetensors")
    with ckpt_cli.open("d.safetensors") as checkpoint:
        facts = json.loads(checkpoint.metadata["ckpt_delta"])
    spoil(facts, tensors)
    save_file(tensors, "d.safetensors", {"ckpt_delta": json.dumps(facts)})
    answer = ckpt("delta", "apply", "base.pt", "d.safetensors", "-o", "out.pt")
    assert answer.code == 2
    assert answer.err.startswith("ckpt: d.safetensors: ")
    assert not Path("out.pt").exists()


def test_an_output_that_is_there_is_refused_and_a_dry_run_writes_nothing(ckpt: Ckpt) -> None:
    base, tuned = base_and_tuned()
    save(base, "base.pt")
    save(tuned, "tuned.pt")
    report = json.loads(ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors", "-n", "--json").out)
    assert not Path("d.safetensors").exists()
    assert ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors").code == 0
    assert Path("d.safetensors").stat().st_size == report["bytes_written"]
    assert "--force" in ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "d.safetensors").err
    assert ckpt("delta", "create", "base.pt", "tuned.pt", "-o", "base.pt", "--force").code == 2
