"""Conversions: every container that can be read into every format that can be written, by the reference readers."""

from __future__ import annotations

import argparse
import collections
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders.pickles import tensor as viewed
from builders.pt import archive, torch_records
from conftest import Ckpt
from contract import FORMATS, Format, State, bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from test_fidelity import assert_same, load, storages, training
from torch import nn

from ckpt_cli.arrays import cast as casting


def read_pt(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What torch loads without trusting the file."""
    found: State = torch.load(path)
    return found


def read_safetensors(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What the library loads, and the aliases that `save_model` would have noted."""
    with safe_open(path, "pt") as file:
        noted = file.metadata()
    assert noted["format"] == "pt"
    stored = load_file(path)
    return stored | {name: stored[kept] for name, kept in noted.items() if kept in stored and name not in stored}


def read_npz(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """What numpy loads."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def read_hf(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """Every shard, and the aliases in the index."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in set(index["weight_map"].values()):
        part = load_file(path / shard)
        assert all(index["weight_map"][name] == shard for name in part)
        stored |= part
    assert stored.keys() == index["weight_map"].keys()
    noted = index["metadata"]
    return stored | {name: stored[kept] for name, kept in noted.items() if kept in stored and name not in stored}


def read_bin(path: Path, _: Mapping[str, torch.Tensor]) -> State:
    """Every shard."""
    index = json.loads((path / "pytorch_model.bin.index.json").read_text())
    found = {}
    for shard in set(index["weight_map"].values()):
        found |= torch.load(path / shard)
    assert found.keys() == index["weight_map"].keys()
    return found


def read_dcp(path: Path, like: Mapping[str, torch.Tensor]) -> State:
    """What torch.distributed.checkpoint loads into tensors of these shapes."""
    found = {name: torch.full_like(tensor.contiguous(), 0) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


TARGETS: dict[str, tuple[str, list[str], Callable[[Path, Mapping[str, torch.Tensor]], State]]] = {
    "pt": ("out.pt", [], read_pt),
    "safetensors": ("out.safetensors", [], read_safetensors),
    "npz": ("out.npz", ["--tensors-only"], read_npz),
    "hf": ("out", ["--max-shard", "60B"], read_hf),
    "hf-bin": ("out", ["--max-shard", "120", "--to", "hf-bin"], read_bin),
    "dcp": ("out", ["--to", "dcp"], read_dcp),
}

NOT_IN_NPZ = ("0.bias",)
"""bfloat16."""


def selection(source: Format, target: str) -> list[str]:
    """The options that take the sample out of what is around it."""
    if source.variant == "lightning":
        return ["--select", "state_dict"]
    return ["--tensors-only"] if source.variant == "module" and target == "npz" else []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FORMATS, ids=lambda source: source.label)
def test_every_container_becomes_every_format(tmp_path: Path, ckpt: Ckpt, source: Format, target: str) -> None:
    path = tmp_path / f"in{source.suffix}"
    wanted = source.sample()
    source.write(wanted, path)
    name, options, read = TARGETS[target]
    answer = ckpt("convert", path, tmp_path / name, *options, *selection(source, target))
    assert answer.code == 0, answer.err
    if target == "npz":
        wanted = {name: tensor for name, tensor in wanted.items() if name not in NOT_IN_NPZ}
    found = read(tmp_path / name, wanted)
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].contiguous().view(-1), tensor.contiguous().view(-1)), key
        assert found[key].shape == tensor.shape, key
    tied = source.keeps_ties and target in ("pt", "safetensors", "hf", "hf-bin")
    answered = ckpt("ties", tmp_path / name, "0.weight", "2.weight") if target != "dcp" else None
    assert answered is None or answered.code == (0 if tied else 1)
    if tied:
        assert found["0.weight"].data_ptr() == found["2.weight"].data_ptr()


def state_of_all_kinds() -> State:
    """Everything that a state_dict has and safetensors can hold, ties in between."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3), torch.randn(2)
    return {
        "scale": torch.tensor(1.5),
        "b": bias,
        "lm_head.weight": weight,
        "half": torch.randn(3).half(),
        "a.bias": bias,
        "columns": torch.randn(3, 4).t(),
        "embed.weight": weight,
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "wide": torch.tensor([1, 65535], dtype=torch.uint16),
        "none": torch.empty(0, 2),
        "pairs": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }


def assert_same_state(found: State, wanted: State) -> None:
    """Equal in names, order, dtypes, shapes, values and ties."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name
    pairs = [
        [[one.data_ptr() == other.data_ptr() for one in state.values() if one.numel()]
         for other in state.values() if other.numel()]
        for state in (found, wanted)
    ]  # fmt: skip
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("through", ["x.safetensors", "set", "bins"])
def test_there_and_back_keeps_order_dtypes_and_ties(tmp_path: Path, ckpt: Ckpt, through: str) -> None:
    path, middle, back = tmp_path / "a.pt", tmp_path / through, tmp_path / "b.pt"
    torch.save(state_of_all_kinds(), path)
    options = {"set": ["--max-shard", "1MB"], "bins": ["--to", "hf-bin"]}.get(through, [])
    assert ckpt("convert", path, middle, *options).code == 0
    answer = ckpt("convert", middle, back)
    assert answer.code == 0, answer.err
    assert_same_state(torch.load(back), state_of_all_kinds())


_NAMES = st.text("abcXYZ.01_é", min_size=1, max_size=8)


@given(st.lists(st.tuples(_NAMES, st.integers(0, 3)), min_size=1, max_size=8, unique_by=lambda pair: pair[0]))
@settings(max_examples=25, deadline=None)
def test_through_safetensors_and_back_involution(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[str, int]]
) -> None:
    from ckpt_cli.edits.convert import convert
    from ckpt_cli.edits.convert_options import ConvertOptions

    folder = tmp_path_factory.mktemp("involution")
    dtypes = (torch.float32, torch.float64, torch.int8, torch.bfloat16)
    pool = [torch.arange(number + 1).to(dtypes[number]) for number in range(4)]
    state = {name: pool[number] for name, number in chosen}
    torch.save(state, folder / "a.pt")
    convert(str(folder / "a.pt"), str(folder / "a.safetensors"), ConvertOptions())
    convert(str(folder / "a.safetensors"), str(folder / "b.pt"), ConvertOptions())
    assert_same_state(torch.load(folder / "b.pt"), state)


def test_the_kept_name_of_a_tie_is_the_one_that_save_model_keeps(tmp_path: Path, ckpt: Ckpt) -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    save_model(net, str(tmp_path / "theirs.safetensors"), metadata={"format": "pt"})
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "ours.safetensors").code == 0
    noted = []
    for name in ("theirs", "ours"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            noted.append({key: value for key, value in file.metadata().items() if key != "ckpt.order"})
            assert sorted(file.keys()) == ["0.bias", "0.weight"]
    assert noted[0] == noted[1]


def test_aliases_keep_their_places_when_they_are_renamed(tmp_path: Path, ckpt: Ckpt) -> None:
    weight = torch.ones(2)
    save = {"z": weight, "m": torch.zeros(1), "a": weight}
    torch.save(save, tmp_path / "a.pt")
    path = tmp_path / "a.safetensors"
    assert ckpt("convert", tmp_path / "a.pt", path).code == 0
    assert ckpt("rename", path, "--add", "x").code == 0
    assert [row.split("\t")[0] for row in ckpt("ls", path).lines] == ["x.z", "x.m", "x.a"]


# --- what is pickled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_legacy_stream_becomes_a_zip_object_for_object(tmp_path: Path, ckpt: Ckpt, protocol: int) -> None:
    path, out = tmp_path / "old.pt", tmp_path / "new.pt"
    torch.save(training(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    answer = ckpt("convert", path, out)
    assert answer.code == 0, answer.err
    found, wanted = load(out), training()
    assert_same(found, wanted)
    assert storages(found) == storages(wanted)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None


def test_a_legacy_stream_becomes_what_torch_saves_today(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "new.pt")
    (tmp_path / "sub").mkdir()
    assert ckpt("convert", tmp_path / "old.pt", tmp_path / "sub" / "new.pt").code == 0
    ours, theirs = (zipfile.ZipFile(path) for path in (tmp_path / "sub" / "new.pt", tmp_path / "new.pt"))
    with ours, theirs:
        assert ours.namelist() == theirs.namelist()
        for name in theirs.namelist():
            if not name.endswith("serialization_id"):
                assert ours.read(name) == theirs.read(name), name
                assert ours.getinfo(name).header_offset == theirs.getinfo(name).header_offset


def test_a_part_of_a_legacy_stream_is_cast_and_keeps_its_objects(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "old.pt", tmp_path / "new.pt"
    saved = {"a": {"w": torch.ones(2), "args": argparse.Namespace(x=1)}, "b": torch.zeros(3)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert ckpt("convert", path, out, "--select", "a", "--dtype", "bf16").code == 0
    found = load(out)
    assert found["args"] == argparse.Namespace(x=1)
    assert found["w"].dtype == torch.bfloat16
    assert list(found) == ["w", "args"]


class Counted(nn.Module):
    """A module with all that a state_dict leaves out or says twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again = self.first
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.loose = torch.full((2,), 3.0)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_module_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt, protocol: int, legacy: bool) -> None:
    path, out = tmp_path / "net.pt", tmp_path / "out.pt"
    net = Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class whose source torch looks for
        torch.save(net, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    answer = ckpt("convert", path, out)
    assert (answer.code, "attributes of modules left out" in answer.err) == (0, True)
    found = torch.load(out)
    assert type(found) is collections.OrderedDict
    assert_same_state(found, net.state_dict())


def test_a_module_within_a_training_checkpoint_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt) -> None:
    net = Counted()
    torch.save({"net": net, "epoch": 3}, tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "b.pt", "--select", "net").code == 0
    assert_same_state(torch.load(tmp_path / "b.pt"), net.state_dict())


def test_a_script_gives_its_state_dict(tmp_path: Path, ckpt: Ckpt) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "b.pt").code == 0
    found = torch.load(tmp_path / "b.pt")
    assert type(found) is collections.OrderedDict
    assert_same_state(found, net.state_dict())


# --- what does not come along ----------------------------------------------------------------------------------------


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
        "  epoch: a value, no tensor",
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


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_an_output_that_is_there_needs_force(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save({"w": torch.ones(2)}, path)
    out.write_text("mine")
    answer = ckpt("convert", path, out)
    assert (answer.code, out.read_text()) == (2, "mine")
    assert "hint: --force replaces it" in answer.err
    assert ckpt("convert", path, out, "--force").code == 0
    assert list(load_file(out)) == ["w"]
    assert ckpt("convert", path, path, "--force").code == 2
    assert ckpt("convert", path, tmp_path / "w.unknown").code == 2
    assert ckpt("convert", path, tmp_path / "w.pt", "--to", "gguf2").code == 2
    assert ckpt("convert", path, tmp_path / "w.pt", "--max-shard", "5 apples").code == 2


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "options",
    [["o.pt"], ["o.pt", "--tensors-only"], ["o.pt", "--shared", "clone"], ["o.pt", "--dtype", "float16"],
     ["o.safetensors"], ["o.npz"], ["o", "--max-shard", "80"], ["o"], ["o", "--to", "hf-bin", "--max-shard", "80"],
     ["o", "--to", "dcp"], ["o.safetensors", "--dtype", "bfloat16"]],
    ids=" ".join,
)  # fmt: skip
def test_a_dry_run_tells_the_numbers_of_the_real_one(
    tmp_path: Path, ckpt: Ckpt, options: list[str], is_zip: bool
) -> None:
    big = torch.randn(30, 2)
    state = {"a": big, "tied": big, "columns": big.t()[:1], "n": torch.arange(5), "empty": torch.empty(0, 2)}
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    out, *more = options
    dry = json.loads(ckpt("convert", path, tmp_path / out, *more, "--json", "-n").out)
    assert os.listdir(tmp_path) == ["a.pt"]
    done = json.loads(ckpt("convert", path, tmp_path / out, *more, "--json").out)
    assert done == {**dry, "dry_run": False}
    written = [tmp_path / out / name for name in done["files"]] or [tmp_path / out]
    assert sum(file.stat().st_size for file in written) == dry["bytes_written"]


def test_a_cast_to_a_dtype_without_infinity_tells_how_many_values_would_be_cut(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([1e6, 2e6, 1.0])}, path)
    answer = ckpt("convert", path, tmp_path / "b.pt", "--dtype", "float8_e4m3fn")
    assert "2 values would become the largest there is in float8_e4m3fn" in answer.err


def test_what_a_dtype_holds_is_worked_out_once_for_all_tensors(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({str(number): torch.ones(2) for number in range(30)}, path)
    before = casting._limits.cache_info().misses
    assert ckpt("convert", path, tmp_path / "b.safetensors", "--dtype", "bfloat16").code == 0
    assert ckpt("cast", path, "bfloat16").code == 0
    assert casting._limits.cache_info().misses <= before + 1


def test_a_dry_run_refuses_a_cast_that_loses_values(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([1e6, 1.0])}, path)
    for out in ("b.pt", "b.safetensors", "b"):
        answers = [ckpt("convert", path, tmp_path / out, "--dtype", "float16", *more) for more in (["-n"], [])]
        assert answers[0] == answers[1]
        assert answers[0].code == 2
        assert ckpt("convert", path, tmp_path / out, "--dtype", "float16", "--lossy", "-n").code == 0


def test_a_dry_run_writes_nothing_and_says_what_it_would(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path)
    answer = ckpt("convert", path, tmp_path / "b", "-n")
    assert (answer.code, "1 tensor would be written" in answer.err) == (0, True)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
