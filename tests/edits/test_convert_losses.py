"""What does not come along in a conversion is listed, refused, cast or cloned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import tensor as viewed
from builders.pt import archive, torch_records
from conftest import Ckpt
from contract import bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def test_what_cannot_come_along_is_listed_and_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "a.pt", tmp_path / "b.safetensors"
    state: dict[str, Any] = {
        "state_dict": {"w": torch.ones(2)}, "epoch": 3, "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"), "twice": torch.ones(2, dtype=torch.complex128),
    }  # fmt: skip
    torch.save(state, path)
    answer = ckpt("convert", path, out)
    assert answer.code == 2
    assert not out.exists()
    assert answer.err.splitlines() == [
        f"ckpt: {path}: 4 of its entries cannot be written to a safetensors file",
        "  epoch: not a tensor",
        "  sparse: sparse_coo tensor",
        "  meta: meta tensor",
        "  twice: complex128, which a safetensors file cannot hold",
        "hint: --select state_dict takes the tensors below it as the whole; --tensors-only takes all tensors",
    ]
    answer = ckpt("convert", path, out, "--tensors-only", "--json")
    told = json.loads(answer.out)
    assert [item["name"] for item in told["left_out"]] == ["epoch", "sparse", "meta", "twice"]
    assert (told["tensors"], told["format"], told["bytes_written"]) == (1, "safetensors", out.stat().st_size)
    assert list(load_file(out)) == ["state_dict.w"]
    assert ckpt("convert", path, out, "--select", "state_dict", "--force").code == 0
    assert list(load_file(out)) == ["w"]


@pytest.mark.parametrize("target", ["out.safetensors", "out.npz", "out.pt", "dcp"])
def test_what_a_format_does_not_say_of_a_tensor_is_told(tmp_path: Path, ckpt: Ckpt, target: str) -> None:
    state = nn.Linear(2, 3).state_dict()
    state["scale"] = nn.Parameter(torch.ones(2))
    torch.save({"module": state}, tmp_path / "a.pt")
    to = ["--to", "dcp"] if target == "dcp" else []
    done = ckpt("convert", tmp_path / "a.pt", tmp_path / target, *to, "--json")
    assert done.code == 0, done.err
    grad, notes = "requires_grad of 1 tensor", "the _metadata of a state_dict (versions of its modules)"
    told = {"out.pt": [], "dcp": [notes]}.get(target, [grad, notes])
    assert json.loads(done.out)["not_kept"] == told
    if told:
        spoken = ckpt("convert", tmp_path / "a.pt", tmp_path / target, *to, "--force").err
        assert f"not kept: {', '.join(told)}\n" in spoken


def test_metadata_that_has_no_place_is_listed_and_kept_where_it_has_one(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"licence": "MIT", "format": "tf"})
    answer = ckpt("convert", path, tmp_path / "a.pt")
    assert (answer.code, "licence: metadata" in answer.err) == (2, True)
    assert ckpt("convert", path, tmp_path / "a.pt", "--tensors-only").code == 0
    assert ckpt("convert", path, tmp_path / "b.safetensors").code == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"licence": "MIT", "format": "tf"}


def test_numpy_gets_what_it_has_no_dtype_for_by_a_cast_only(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "a.pt", tmp_path / "a.npz"
    torch.save({"w": torch.tensor([1.5, 2.0], dtype=torch.bfloat16), "n": torch.tensor([3])}, path)
    answer = ckpt("convert", path, out)
    assert (answer.code, "hint: --dtype float32 casts them" in answer.err) == (2, True)
    assert ckpt("convert", path, out, "--dtype", "float32").code == 0
    with np.load(out) as arrays:
        assert (arrays["w"].tolist(), arrays["w"].dtype, arrays["n"].dtype) == ([1.5, 2.0], "float32", "int64")


def test_ties_are_kept_cloned_or_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    path, weight = tmp_path / "a.pt", torch.ones(3)
    torch.save({"a": weight, "b": weight}, path)
    refused = ckpt("convert", path, tmp_path / "b.safetensors", "--shared", "error")
    assert (refused.code, "  a, b" in refused.err) == (2, True)
    for name in ("c.safetensors", "c.pt"):
        answer = ckpt("convert", path, tmp_path / name, "--shared", "clone")
        assert (answer.code, "a, b: shared bytes, each has its own now" in answer.err) == (0, True)
        assert ckpt("ties", tmp_path / name, "a", "b").code == 1
    assert sorted(load_file(tmp_path / "c.safetensors")) == ["a", "b"]


def test_views_of_one_storage_are_written_apart_and_said_to_be(tmp_path: Path, ckpt: Ckpt) -> None:
    path, whole = tmp_path / "a.pt", torch.arange(6.0)
    torch.save({"whole": whole, "part": whole[2:4], "apart": whole.reshape(2, 3)[:, ::2]}, path)
    answer = ckpt("convert", path, tmp_path / "b.safetensors")
    assert "whole, part, apart: shared bytes, each has its own now" in answer.err
    assert load_file(tmp_path / "b.safetensors")["apart"].tolist() == [[0, 2], [3, 5]]


def test_a_big_endian_file_is_swapped(tmp_path: Path, ckpt: Ckpt) -> None:
    numbers, complexes = np.array([1.5, -2.0, 3.0]), np.array([1 + 2j, -0.5j])
    storages = {"0": numbers.astype(">f4").tobytes(), "1": complexes.astype(">c8").tobytes()}
    root = {"numbers": viewed("0", (3,)), "back": viewed("0", (2, 1), numel=3, stride=(1, 2), offset=1),
            "complexes": viewed("1", (2,), "ComplexFloat")}  # fmt: skip
    path = tmp_path / "big.pt"
    path.write_bytes(archive(torch_records(root, storages, byteorder=b"big")))
    for name in ("a.safetensors", "a.npz", "b.pt"):
        assert ckpt("convert", path, tmp_path / name, "--tensors-only").code == 0
    with np.load(tmp_path / "a.npz") as arrays:
        states = [load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "b.pt"), arrays]
        for state in states:
            assert state["numbers"].tolist() == numbers.tolist()
            assert state["back"].tolist() == [[-2.0], [3.0]]
            assert state["complexes"].tolist() == complexes.tolist()


def test_a_cast_that_loses_values_is_refused_and_leaves_nothing(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([1.0, 1e6, 1e-9])}, path)
    for name, more in (("b.safetensors", []), ("b.pt", []), ("b", ["--to", "hf"]), ("c", ["--to", "dcp"])):
        answer = ckpt("convert", path, tmp_path / name, "--dtype", "float16", *more)
        assert (answer.code, "1 value would become infinite, 1 value would become zero in" in answer.err) == (
            2,
            True,
        ), name
        assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
    assert ckpt("convert", path, tmp_path / "b.safetensors", "--dtype", "float16", "--lossy").code == 0
    assert load_file(tmp_path / "b.safetensors")["w"].tolist() == [1.0, float("inf"), 0.0]


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float8_e5m2", "float16"])
def test_a_cast_is_what_torch_casts(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    path = tmp_path / "a.pt"
    state = {"w": torch.randn(700, 900), "t": torch.randn(40, 30).t(), "n": torch.arange(3), "v": torch.randn(9)[2:5]}
    torch.save(state, path)
    for out in ("b.safetensors", "b.pt"):
        assert ckpt("convert", path, tmp_path / out, "--dtype", name, "--lossy").code == 0
        found = load_file(tmp_path / out) if out.endswith("s") else torch.load(tmp_path / out)
        for key, tensor in state.items():
            wanted = tensor.to(getattr(torch, name)) if tensor.is_floating_point() else tensor
            assert bits(found[key]) == bits(wanted), key


def test_many_entries_that_cannot_be_written_are_folded_by_their_containers(tmp_path: Path, ckpt: Ckpt) -> None:
    moments = {number: {"step": number, "exp_avg": torch.ones(2)} for number in range(40)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(40))} for _ in range(9)]
    state = {"w": torch.ones(2), "optimizer": {"state": moments, "param_groups": groups}, "epoch": 3}
    torch.save(state, tmp_path / "m.pt")
    done = ckpt("convert", tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert done.err.splitlines()[:-1] == [
        f"ckpt: {tmp_path / 'm.pt'}: 68 of its entries cannot be written to a safetensors file",
        "  optimizer.state.[N].step (40 entries): not a tensor",
        "  optimizer.param_groups.[N].lr (9 entries): not a tensor",
        "  optimizer.param_groups.[N].betas (9 entries): not a tensor",
        "  optimizer.param_groups.[N].params (9 entries): not a tensor",
        "  epoch: not a tensor",
    ]
