"""Nesting and values between distributed checkpoints and torch.save files, as torch's own format_utils has them."""

from __future__ import annotations

import json
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import dcp_formats
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ckpt
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp


class Thing:
    """An object that holds a tensor of its own."""

    def __init__(self) -> None:
        self.tensor = torch.arange(3)
        self.words = ["a", {"b": 1}]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and same(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]  # compared only


def same(one: object, other: object) -> bool:
    """Whether two states are equal, tensors bit by bit, containers and values by type too."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    return bool(one == other)


def state() -> dict[str, Any]:
    """A training checkpoint with all kinds of things in it."""
    torch.manual_seed(0)
    w = torch.randn(4, 3)
    return {
        "model": OrderedDict([("layers.0.weight", w), ("b", torch.randn(3).bfloat16()), ("tied", w)]),
        "step": 7,
        "name": "a" * 100_000,  # longer than what is held of a string
        "none": None,
        "opt": {
            "state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}, 1: {"exp_avg": torch.ones(2)}},
            "groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "betas": (0.9, 0.999), "params": []}],
        },
        "list": [torch.ones(2), [torch.zeros(1), {"x": 1}], "text"],
        "pair": (1, torch.ones(3)),
        "empty list": [],
        "object": Thing(),
        "array": np.arange(3),
        "scalar": torch.tensor(5),
        "dtype": torch.float16,
        "bytes": b"\x00" * 70_000,
    }


def as_torch_has_it(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What torch's own format_utils makes of a distributed checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, tmp_path / "theirs.pt")
    found: dict[str, Any] = torch.load(tmp_path / "theirs.pt", weights_only=False)
    return found


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def done(ckpt: Ckpt, *arguments: object) -> dict[str, Any]:
    answer = ckpt("convert", *arguments, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def refusal(ckpt: Ckpt, *arguments: object) -> str:
    answer = ckpt("convert", *arguments)
    assert answer.code == 2
    assert not Path(str(arguments[1])).exists()
    return answer.err


# --- to one file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 3}])
def test_a_distributed_checkpoint_becomes_what_torch_makes_of_it(
    tmp_path: Path, ckpt: Ckpt, options: dict[str, Any]
) -> None:
    dcp_formats.save(state(), tmp_path / "ck", **options)
    told = done(ckpt, tmp_path / "ck", tmp_path / "ours.pt")
    wanted = as_torch_has_it(tmp_path / "ck", tmp_path)
    found = loaded(tmp_path / "ours.pt")
    assert same(found, wanted)
    assert told["left_out"] == []
    assert torch.load(tmp_path / "ours.pt", weights_only=False, mmap=True)["opt"]["groups"][0]["lr"] == 0.1
    meta = torch.load(tmp_path / "ours.pt", weights_only=False, map_location="meta")
    assert meta["object"].tensor.device.type == "meta"


def test_a_plain_one_loads_with_weights_only(tmp_path: Path, ckpt: Ckpt) -> None:
    plain = {key: value for key, value in state().items() if key not in ("object", "array")}
    dcp_formats.save(plain, tmp_path / "ck")
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt")
    del plain["bytes"]
    dcp_formats.save(plain, tmp_path / "ck2")
    done(ckpt, tmp_path / "ck2", tmp_path / "ours2.pt")
    assert same(torch.load(tmp_path / "ours2.pt", weights_only=True), as_torch_has_it(tmp_path / "ck2", tmp_path))


def test_ranks_and_a_mesh_are_joined_and_nested(tmp_path: Path, ckpt: Ckpt) -> None:
    whole = {"m.w": torch.arange(24.0).reshape(6, 4), "m.b": torch.arange(4)}
    dcp_formats.save_ranks(whole, tmp_path / "ck")
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt")
    assert same(loaded(tmp_path / "ours.pt"), as_torch_has_it(tmp_path / "ck", tmp_path))


def test_items_in_safetensors_are_nested_too(tmp_path: Path, ckpt: Ckpt) -> None:
    tensors = {"m": {"w": torch.ones(2), "deep": [{"b": torch.zeros(3)}]}}
    dcp_formats.save(tensors, tmp_path / "ck", serialization_format=SerializationFormat.SAFETENSORS)
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt")
    assert same(loaded(tmp_path / "ours.pt"), tensors)


def test_a_part_of_a_state_is_nested_below_it(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save(state(), tmp_path / "ck")
    wanted = as_torch_has_it(tmp_path / "ck", tmp_path)
    for select, part in (
        ("opt", wanted["opt"]),
        ("opt.groups", wanted["opt"]["groups"]),
        ("opt.state.0", wanted["opt"]["state"]["0"]),
        ("model.layers", {"0.weight": wanted["model"]["layers.0.weight"]}),
    ):
        done(ckpt, tmp_path / "ck", tmp_path / "ours.pt", "--select", select, "--force")
        assert same(loaded(tmp_path / "ours.pt"), part), select


def test_a_cast_reaches_the_tensors_and_no_value(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save({"a": {"w": torch.ones(2)}, "lr": 0.1}, tmp_path / "ck")
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt", "--dtype", "bfloat16")
    assert same(loaded(tmp_path / "ours.pt"), {"a": {"w": torch.ones(2).bfloat16()}, "lr": 0.1})


def test_tensors_only_still_gives_flat_names(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save(state(), tmp_path / "ck")
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt", "--tensors-only")
    found = loaded(tmp_path / "ours.pt")
    assert {"model.layers.0.weight", "opt.state.0.exp_avg", "list.0"} <= found.keys()
    assert "step" not in found


@pytest.mark.filterwarnings("ignore:.*TypedStorage")
def test_a_storage_by_itself_stays_one(tmp_path: Path, ckpt: Ckpt) -> None:
    typed = torch.arange(4.0).storage()
    torch.save({"s": typed, "w": torch.ones(2)}, tmp_path / "m.pt")
    assert ckpt("convert", tmp_path / "m.pt", tmp_path / "d", "--to", "dcp").code == 0
    dcp_to_torch_save(tmp_path / "d", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=False)["s"]
    assert (type(back), back.tolist()) == (type(typed), [0, 1, 2, 3])


def test_what_holds_no_values_says_so(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save({"w": torch.ones(2), "step": 7}, tmp_path / "ck")
    told = refusal(ckpt, tmp_path / "ck", tmp_path / "o.safetensors")
    assert "cannot be written to a safetensors file" in told
    assert "step: not a tensor" in told


def test_a_checkpoint_that_was_not_flattened_has_flat_names(tmp_path: Path, ckpt: Ckpt) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a.b": torch.ones(2), "n": 1}, checkpoint_id=tmp_path / "ck", planner=planner, no_dist=True)
    done(ckpt, tmp_path / "ck", tmp_path / "ours.pt")
    assert same(loaded(tmp_path / "ours.pt"), {"a.b": torch.ones(2), "n": 1})


def test_a_missing_file_of_values_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save({"w": torch.ones(2), "step": 7}, tmp_path / "ck", single_file_per_rank=False)
    metadata = pickle.loads((tmp_path / "ck" / ".metadata").read_bytes())
    (place,) = (info for index, info in metadata.storage_data.items() if index.fqn == "step")
    (tmp_path / "ck" / place.relative_path).unlink()
    told = refusal(ckpt, tmp_path / "ck", tmp_path / "o.pt")
    assert f"value 'step': it is in {place.relative_path}, which is missing" in told


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_no_value_is_run_and_each_comes_along_as_it_is(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save({"w": torch.ones(2), "evil": Marker(tmp_path / "ran")}, tmp_path / "ck")
    done(ckpt, tmp_path / "ck", tmp_path / "o.pt")
    assert not (tmp_path / "ran").exists()
    assert ckpt("scan", tmp_path / "o.pt").code == 1
    done(ckpt, tmp_path / "o.pt", tmp_path / "back", "--to", "dcp")
    assert not (tmp_path / "ran").exists()


# --- hostile paths ---------------------------------------------------------------------------------------------------

_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)

PATHS = [
    ({"a": ("l", 10**9), "b": ("b",)}, "is item 1000000000 of a list"),
    ({"a": ("l", 2**70), "b": ("b",)}, "of a list"),
    ({"a": ("x",), "b": ("x",)}, "contradicts another entry's"),
    ({"a": ("x",), "b": ("x", "y")}, "contradicts another entry's"),
    ({"a": ("x", "y"), "b": ("x",)}, "contradicts another entry's"),
    ({"a": ("x", "y"), "b": ("x", 0)}, "contradicts another entry's"),
    ({"a": ("x", 0), "b": ("x", "y")}, "contradicts another entry's"),
    ({"a": ("x", -1), "b": ("b",)}, "has the key -1"),
    ({"a": ("x", 1.5), "b": ("b",)}, "has the key 1.5"),
    ({"a": ("x", True), "b": ("b",)}, "has the key True"),
    ({"a": (_CYCLE,), "b": ("b",)}, "has the key"),
    ({"a": (), "b": ("b",)}, "its place in the state that was saved is ()"),
    ({"a": "x", "b": ("b",)}, "its place in the state that was saved is"),
    ({"a": ("x",) * 2000, "b": ("b",)}, "lies in more than"),
]


@pytest.mark.parametrize(("paths", "told"), PATHS, ids=[told for _, told in PATHS])
def test_paths_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, ckpt: Ckpt, paths: dict[str, Any], told: str
) -> None:
    dcp_formats.save({"a": torch.ones(2), "b": 1}, tmp_path / "ck")
    file = tmp_path / "ck" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.planner_data = paths
    file.write_bytes(pickle.dumps(metadata))
    assert ckpt("ls", tmp_path / "ck").code == 0
    err = refusal(ckpt, tmp_path / "ck", tmp_path / "o.pt")
    assert told in err
    assert [line for line in err.splitlines() if not line.startswith("hint: ")] == err.splitlines()[:1]


def test_many_names_of_one_large_value_are_refused(tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_cli import limits

    monkeypatch.setattr(limits, "READ_AGAIN", 10_000)
    shared = "x" * 300_000
    torch.save({str(number): shared for number in range(50)}, tmp_path / "m.pt")
    assert "many names have one" in refusal(ckpt, tmp_path / "m.pt", tmp_path / "ck", "--to", "dcp")
    dcp_formats.save({str(number): (torch.ones(1000),) for number in range(20)}, tmp_path / "in")
    file = tmp_path / "in" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    place = next(iter(metadata.storage_data.values()))
    metadata.storage_data = dict.fromkeys(metadata.storage_data, place)
    for number in range(20, 200):
        metadata.state_dict_metadata[str(number)] = metadata.state_dict_metadata["0"]
        index = dcp.metadata.MetadataIndex(str(number))
        metadata.storage_data[index] = place
    file.write_bytes(pickle.dumps(metadata))
    assert "many are at one place" in refusal(ckpt, tmp_path / "in", tmp_path / "o.pt")


# --- from one file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_file_becomes_what_torch_makes_of_it(tmp_path: Path, ckpt: Ckpt, options: dict[str, Any]) -> None:
    torch.save(state(), tmp_path / "m.pt", **options)
    if options:  # an old stream tells of the storages of its entries only
        torch.save({key: value for key, value in state().items() if key != "object"}, tmp_path / "m.pt", **options)
    done(ckpt, tmp_path / "m.pt", tmp_path / "ours", "--to", "dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_save_to_dcp(tmp_path / "m.pt", tmp_path / "theirs")
    found = as_torch_has_it(tmp_path / "ours", tmp_path)
    assert same(found, as_torch_has_it(tmp_path / "theirs", tmp_path))
    ours, theirs = (pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("ours", "theirs"))
    assert ours.planner_data == theirs.planner_data
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()


def test_what_torch_loads_in_place_is_what_was_in_the_file(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(state(), tmp_path / "m.pt")
    done(ckpt, tmp_path / "m.pt", tmp_path / "ours", "--to", "dcp")
    into = {"model": {"b": torch.zeros(3).bfloat16()}, "step": 0, "opt": {"groups": [{"lr": 0.0}]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert (into["step"], into["opt"]) == (7, {"groups": [{"lr": 0.1}]})
    assert torch.equal(into["model"]["b"], state()["model"]["b"])


def test_there_and_back_is_the_same_but_for_what_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({**state(), "none at all": {}}, tmp_path / "m.pt")
    told = done(ckpt, tmp_path / "m.pt", tmp_path / "ck", "--to", "dcp")
    assert "empty dicts (none at all)" in told["not_kept"]
    assert "the types of 2 keys, which become strings" in told["not_kept"]
    assert set(told["separated"]) == {"model.layers.0.weight", "model.tied"}
    done(ckpt, tmp_path / "ck", tmp_path / "back.pt")
    found, wanted = loaded(tmp_path / "back.pt"), state()
    wanted["model"] = dict(wanted["model"])
    wanted["opt"]["state"] = {str(key): value for key, value in wanted["opt"]["state"].items()}
    assert same(found, wanted)


def test_one_distributed_checkpoint_becomes_another_with_all_its_values(tmp_path: Path, ckpt: Ckpt) -> None:
    dcp_formats.save(state(), tmp_path / "in")
    done(ckpt, tmp_path / "in", tmp_path / "out", "--to", "dcp")
    assert same(as_torch_has_it(tmp_path / "out", tmp_path), as_torch_has_it(tmp_path / "in", tmp_path))


def test_a_selected_part_of_a_file_becomes_the_whole(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(state(), tmp_path / "m.pt")
    done(ckpt, tmp_path / "m.pt", tmp_path / "ck", "--to", "dcp", "--select", "opt")
    found = as_torch_has_it(tmp_path / "ck", tmp_path)
    assert found["groups"] == state()["opt"]["groups"]


def test_a_container_within_itself_is_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    inner: dict[str, Any] = {"w": torch.ones(2)}
    inner["again"] = inner
    torch.save({"a": inner}, tmp_path / "m.pt")
    assert "contains itself" in refusal(ckpt, tmp_path / "m.pt", tmp_path / "ck", "--to", "dcp")


def test_a_tensor_that_cannot_come_along_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"s": torch.eye(2).to_sparse(), "step": 1}, tmp_path / "m.pt")
    told = refusal(ckpt, tmp_path / "m.pt", tmp_path / "ck", "--to", "dcp")
    assert "s: sparse_coo tensor" in told


def test_a_dry_run_says_what_the_run_then_does(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(state(), tmp_path / "m.pt")
    for source, target, options in (("m.pt", "ck", ["--to", "dcp"]), ("ck", "o.pt", [])):
        dry = done(ckpt, tmp_path / source, tmp_path / target, *options, "-n")
        wet = done(ckpt, tmp_path / source, tmp_path / target, *options)
        assert {**dry, "dry_run": False} == wet
