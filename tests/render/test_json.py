"""The shapes that `--json` promises: keys may be added, none may go or change its meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt

TENSOR_KEYS = {
    "name", "type", "kind", "dtype", "shape", "numel", "nbytes", "stride", "storage", "storage_offset",
    "requires_grad", "device", "tied_with",
}  # fmt: skip


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def answered(ckpt: Ckpt, *args: object, code: int = 0) -> Any:
    """The answer of a command with `--json`, which is strict JSON and ASCII."""
    answer = ckpt(*args, "--json")
    assert (answer.code, answer.err) == (code, "")
    assert answer.out.isascii()
    assert answer.out.endswith("\n")
    return json.loads(answer.out, parse_constant=refuse)


def test_ls_tells_every_tensor_with_all_its_keys(work: Path, ckpt: Ckpt) -> None:
    found = answered(ckpt, "ls", "tied.pt")
    assert {key: found[key] for key in found if key != "entries"} == {
        "path": "tied.pt", "format": "zip", "tensors": 10, "parameters": 193, "nbytes": 772,
    }  # fmt: skip
    assert all(entry.keys() >= TENSOR_KEYS for entry in found["entries"])
    weight = next(entry for entry in found["entries"] if entry["name"] == "4.weight")
    assert {key: weight[key] for key in TENSOR_KEYS} == {
        "name": "4.weight", "type": "tensor", "kind": "tensor", "dtype": "float32", "shape": [8, 8], "numel": 64,
        "nbytes": 256, "stride": [8, 1], "storage": "2", "storage_offset": 0, "requires_grad": False,
        "device": "cpu", "tied_with": ["2.weight"],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_tensor_without_bytes_or_shape_has_all_keys_too(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "lazy": torch.nn.UninitializedParameter(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8),
    }
    torch.save(state, tmp_path / "a.pt")
    entries = {entry["name"]: entry for entry in answered(ckpt, "ls", tmp_path / "a.pt")["entries"]}
    assert all(entry.keys() >= TENSOR_KEYS for entry in entries.values())
    assert entries["lazy"]["shape"] is None
    assert entries["meta"]["storage"] is None
    assert entries["meta"]["device"] == "meta"
    assert entries["quantized"]["dtype"] == "qint8"


def test_ls_all_tells_values_as_json_where_they_are_that(tmp_path: Path, ckpt: Ckpt) -> None:
    values = {
        "int": 3, "float": 0.5, "text": "ü\x1b", "none": None, "yes": True, "list": [1, 2.5, "x"], "tuple": (1, 2),
        "nan": float("nan"), "inf": float("inf"), "nans": [float("-inf")], "huge": 10**5000, "empty": {},
        "dtype": torch.float16,
    }  # fmt: skip
    torch.save(values, tmp_path / "a.pt")
    found = answered(ckpt, "ls", "-a", tmp_path / "a.pt")
    assert all(entry.keys() == {"name", "type", "value"} for entry in found["entries"])
    assert {entry["name"]: entry["value"] for entry in found["entries"]} == {
        "int": 3, "float": 0.5, "text": "ü\x1b", "none": None, "yes": True, "list": [1, 2.5, "x"], "tuple": [1, 2],
        "nan": "NaN", "inf": "Infinity", "nans": ["-Infinity"], "huge": "<an integer of thousands of digits>",
        "empty": {}, "dtype": "torch.float16",
    }  # fmt: skip


def test_show_tells_nan_and_infinities_as_strings_and_complex_numbers_as_pairs(tmp_path: Path, ckpt: Ckpt) -> None:
    inf, nan = float("inf"), float("nan")
    state = {
        "f": torch.tensor([[1.5, nan], [inf, -inf]]),
        "h": torch.tensor([65504, nan], dtype=torch.float16),
        "c": torch.tensor([1 + 2j, complex(nan, -inf)], dtype=torch.complex128),
        "b": torch.tensor([True, False]),
        "i": torch.tensor([-(2**63), 2**63 - 1]),
        "u": torch.tensor([2**64 - 1], dtype=torch.uint64),
        "s": torch.tensor(2.0, dtype=torch.bfloat16),
        "e": torch.empty(2, 0),
    }
    torch.save(state, tmp_path / "a.pt")
    found = answered(ckpt, "show", tmp_path / "a.pt")
    assert all(item.keys() == {"name", "dtype", "shape", "values"} for item in found)
    assert {item["name"]: item["values"] for item in found} == {
        "f": [[1.5, "NaN"], ["Infinity", "-Infinity"]], "h": [65504.0, "NaN"],
        "c": [[1.0, 2.0], ["NaN", "-Infinity"]], "b": [True, False], "i": [-(2**63), 2**63 - 1], "u": [2**64 - 1],
        "s": 2.0, "e": [[], []],
    }  # fmt: skip
    assert [item["shape"] for item in found] == [list(tensor.shape) for tensor in state.values()]


@pytest.mark.parametrize("shape", [(200_000,), (3, 70_000), (70_000, 3), (2, 2, 40_000), (1, 65_536), (65_537, 1)])
def test_show_of_a_large_tensor_is_the_same_nested_list(tmp_path: Path, ckpt: Ckpt, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    torch.save({"x": tensor}, tmp_path / "a.pt")
    (item,) = answered(ckpt, "show", tmp_path / "a.pt", "x")
    assert item["values"] == tensor.tolist()


def test_show_names_a_part_with_its_index(work: Path, ckpt: Ckpt) -> None:
    (item,) = answered(ckpt, "show", "mlp.pt", "0.weight[ 0 , :2 ]")
    assert (item["name"], item["shape"]) == ("0.weight[0,:2]", [2])


def test_show_tells_that_a_tensor_has_no_plain_values(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"s": torch.eye(2).to_sparse(), "epoch": 3}, tmp_path / "a.pt")
    sparse, epoch = answered(ckpt, "show", tmp_path / "a.pt")
    assert sparse == {
        "name": "s",
        "dtype": "float32",
        "shape": [2, 2],
        "layout": "sparse_coo",
        "python_type": None,
        "details": {"nnz": 2, "coalesced": True},
        "values": None,
        "parts": [
            {"name": "indices", "dtype": "int64", "shape": [2, 2], "values": [[0, 1], [0, 1]]},
            {"name": "values", "dtype": "float32", "shape": [2], "values": [1.0, 1.0]},
        ],
    }
    assert epoch == {"name": "epoch", "type": "value", "value": 3}


def test_ties_tells_every_way_to_share(tmp_path: Path, ckpt: Ckpt) -> None:
    flat, equal = torch.arange(12.0), torch.ones(3)
    state = {"a": flat[:4], "b": flat[:4], "c": flat[2:6], "d": flat[8:], "e": equal, "f": equal.clone()}
    torch.save(state, tmp_path / "a.pt")
    found = answered(ckpt, "ties", "--equal", tmp_path / "a.pt")
    assert found["tied"] == [
        {"names": ["a", "b"], "storage": "0", "nbytes": 16, "dtype": "float32", "shape": [4], "saved": 16}
    ]
    assert found["overlapping"] == [{"names": ["a", "c"], "storage": "0", "nbytes": 24}]
    assert found["co_stored"] == [{"names": ["a", "d"], "storage": "0", "nbytes": 32}]
    assert found["equal"] == [{"names": ["e", "f"], "nbytes": 12}]
    assert found["aliases"] == {}


def test_ties_tells_the_aliases_of_safetensors(work: Path, ckpt: Ckpt) -> None:
    assert answered(ckpt, "ties", "tied.safetensors")["aliases"] == {"4.bias": "2.bias", "4.weight": "2.weight"}


def test_a_verdict_on_two_names_goes_with_its_exit_code(work: Path, ckpt: Ckpt) -> None:
    assert answered(ckpt, "ties", "tied.pt", "2", "4") == {
        "a": "2", "b": "4", "tied": True, "reason": "tied: the same tensors",
    }  # fmt: skip
    assert answered(ckpt, "ties", "tied.pt", "2.bias", "6.bias", code=1)["tied"] is False


def test_an_edit_tells_what_it_did(work: Path, ckpt: Ckpt) -> None:
    facts = {"path": "tied.pt", "changed": ["2.weight"], "also_changed": ["4.weight"]}
    size = Path("tied.pt").stat().st_size
    assert answered(ckpt, "set", "tied.pt", "2.weight=0", "-o", "new.pt") == {
        **facts, "output": "new.pt", "bytes_written": size, "in_place": False, "dry_run": False, "backup": None,
        "backups": [], "verb": "set", "patched": False, "renamed": {}, "removed": [], "left": [],
        "placed": {}, "beside": None, "other_names": 0, "remaining": [],
    }  # fmt: skip
    assert answered(ckpt, "set", "tied.pt", "2.weight=0", "--backup") == {
        **facts, "output": "tied.pt", "bytes_written": 264, "in_place": True, "dry_run": False, "backup": "tied.pt.bak",
        "backups": ["tied.pt.bak"], "verb": "set", "patched": True, "renamed": {}, "removed": [], "left": [],
        "placed": {}, "beside": None, "other_names": 0, "remaining": [],
    }  # fmt: skip
    assert answered(ckpt, "set", "tied.pt", "2.weight=1", "-n")["dry_run"] is True


def test_info_tells_the_facts_as_numbers(work: Path, ckpt: Ckpt) -> None:
    found = answered(ckpt, "info", "tied.pt")
    size = Path("tied.pt").stat().st_size
    assert {key: found[key] for key in ("file_nbytes", "shards", "tensors", "parameters", "nbytes", "ties")} == {
        "file_nbytes": size, "shards": 1, "tensors": 10, "parameters": 193, "nbytes": 772, "ties": 2,
    }  # fmt: skip
    assert found["dtypes"] == {"float32": {"tensors": 10, "numel": 193}}


def test_waste_tells_bytes_used_and_not(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"part": torch.zeros(100)[:10], "whole": torch.zeros(5)}, tmp_path / "a.pt")
    assert answered(ckpt, "ls", "--waste", tmp_path / "a.pt")["waste"] == [
        {"storage": "0", "nbytes": 400, "used": 40, "names": ["part"], "waste": 360}
    ]


def test_long_names_that_are_all_tied_are_not_each_listed_with_all_others(tmp_path: Path, ckpt: Ckpt) -> None:
    names = [f"{'block.' * 500}{number}" for number in range(300)]
    one = torch.ones(2)
    torch.save(dict.fromkeys(names, one), tmp_path / "m.pt")
    answer = ckpt("ls", "--json", tmp_path / "m.pt")
    assert (answer.code, answer.out) == (2, "")
    assert "too many names are tied to list each with all the others" in answer.err
    few = json.loads(ckpt("ls", "--json", tmp_path / "m.pt", names[0], names[7]).out)
    assert [len(entry["tied_with"]) for entry in few["entries"]] == [299, 299]
