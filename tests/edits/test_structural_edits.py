"""Structural edits of pickled checkpoints: names, objects with several names, values that open up."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import call
from builders.pt import write
from conftest import Ckpt
from run_edit import assert_refused, edited
from torch import nn
from torch_files import FORMATS, load, saved

from ckpt_cli.pickles.edit.rewrite import EditedPickle


@FORMATS
def test_no_key_of_a_container_is_given_twice(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    value = {"a": torch.ones(1), "b": {"x": torch.zeros(1)}, "c": {"x": {"y": 1}, "z": 2}}
    path = saved(tmp_path / "a.pt", value, is_zip=is_zip)
    assert_refused(ckpt, path, "would both be called 'b'", "rename", "a", "b")
    assert_refused(ckpt, path, "would both be called 'c'", "rename", "b", "c")
    assert_refused(ckpt, path, "would both be called 'c.x'", "rename", "c.z", "c.x")
    assert ckpt("rename", path, "a", "d").code == 0
    assert list(load(path)) == ["d", "b", "c"]


@FORMATS
def test_a_name_does_not_leave_its_container(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    value = {
        "model": {"a": torch.ones(1), "b": torch.ones(1)},
        "other": {"n": 1},
        "list": [torch.ones(1), torch.ones(2)],
    }
    path = saved(tmp_path / "a.pt", value, is_zip=is_zip)
    assert_refused(ckpt, path, "would leave what it is kept in ('model')", "rename", "model.a", "a")
    assert_refused(ckpt, path, "would leave what it is kept in ('model')", "rename", "model.a", "net.a")
    assert_refused(ckpt, path, "would leave what it is kept in ('model')", "rename", "model.a", "other.a")
    assert_refused(ckpt, path, "called by its place in a list", "rename", "list.0", "list.5")
    assert_refused(ckpt, path, "called by its place in a list", "rename", "list.0", "list.x")
    assert_refused(ckpt, path, "called by its place in a list", "rm", "list.0")
    edited(ckpt, "rm", path, "list.1")
    edited(ckpt, "rename", path, "model.a", "model.x.y")
    assert_refused(ckpt, path, "would leave what it is kept in ('model')", "rename", "model.x", "net.x")
    edited(ckpt, "rename", path, "model", "net")
    found = load(path)
    assert len(found["list"]) == 1
    assert list(found["net"]) == ["x.y", "b"]


@FORMATS
def test_a_container_of_which_every_entry_goes_stays_empty(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    model = nn.Linear(2, 2).state_dict()
    path = saved(tmp_path / "a.pt", {"model": model, "list": [torch.ones(1)], "epoch": 1}, is_zip=is_zip)
    edited(ckpt, "rm", path, "model.weight", "model.bias", "list.0")
    found = load(path)
    assert (type(found["model"]), dict(found["model"]), found["list"]) == (type(model), {}, [])
    edited(ckpt, "rm", path, "model", "list")
    assert load(path) == {"epoch": 1}


@FORMATS
def test_keys_keep_their_types_and_names_that_are_there_twice_are_refused(
    tmp_path: Path, ckpt: Ckpt, is_zip: bool
) -> None:
    value = {0: torch.ones(1), "0": torch.zeros(1), 3: torch.ones(2), (1, 2): torch.ones(3), None: 5, True: 6}
    value |= {"": torch.ones(4), ".x": torch.ones(5), "a.b": 1, "c.d": 2}
    path = saved(tmp_path / "a.pt", value, is_zip=is_zip)
    assert_refused(ckpt, path, "two entries are called '0'", "rename", "0", "9")
    assert_refused(ckpt, path, "several entries are called '0'", "rm", "0")
    assert_refused(ckpt, path, "would both be called '0'", "rename", "3", "0")
    edited(ckpt, "rename", path, "3", "7")
    edited(ckpt, "rename", path, "(1, 2)", "pair")
    edited(ckpt, "rename", path, "True", "yes")
    edited(ckpt, "rm", path, "None")
    edited(ckpt, "rm", path, "c.d")
    assert list(load(path)) == [0, "0", 7, "pair", "yes", "", ".x", "a.b"]


@FORMATS
def test_tensors_in_tuples_change_together(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    pair = (torch.ones(2), torch.zeros(2), 3)
    path = saved(tmp_path / "a.pt", {"pair": pair, "again": [pair, (pair,)]}, is_zip=is_zip)
    assert ckpt("cast", path, "bfloat16").code == 0
    found = load(path)
    assert [item.dtype for item in found["pair"][:2]] == [torch.bfloat16] * 2
    assert [item.dtype for item in found["again"][1][0][:2]] == [torch.bfloat16] * 2
    assert found["pair"][0].data_ptr() == found["again"][0][0].data_ptr()
    assert ckpt("set", path, "pair.2=4").code == 0
    assert (load(path)["pair"][2], load(path)["again"][0][2]) == (4, 3)


@FORMATS
def test_a_checkpoint_may_be_a_tuple_a_list_or_one_tensor(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    path = saved(tmp_path / "tuple.pt", (torch.ones(2), {"a": torch.ones(3)}, 5), is_zip=is_zip)
    assert ckpt("cast", path, "float16").code == 0
    assert ckpt("set", path, "2=6").code == 0
    assert ckpt("rename", path, "1.a", "1.b").code == 0
    assert ckpt("rm", path, "2").code == 0
    first, second = load(path)
    assert (first.dtype, second["b"].dtype) == (torch.float16, torch.float16)
    path = saved(tmp_path / "one.pt", torch.arange(4.0), is_zip=is_zip)
    assert ckpt("cast", path, "bfloat16").code == 0
    assert load(path).tolist() == [0, 1, 2, 3]
    assert load(path).dtype == torch.bfloat16
    assert_refused(ckpt, path, "nothing would be left", "rm", '""')


def test_an_ordered_dict_of_python_2_loses_a_pair_whole(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    pairs = [[["a", 1], ["b", 2], ["c", 3]]]
    write(path, {"state": call("collections.OrderedDict", *pairs), "x": 1})
    assert ckpt("ls", "-a", path).lines[0].startswith("state.a")
    assert ckpt("rm", path, "state.b").code == 0
    assert ckpt("rename", path, "state.c", "state.d").code == 0
    assert load(path)["state"] == OrderedDict(a=1, d=3)


# --- objects with several names --------------------------------------------------------------------------------------


@FORMATS
def test_what_is_one_object_under_two_names_is_not_changed_under_one(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    shared = {"w": torch.ones(2), "n": 1}
    path = saved(tmp_path / "a.pt", {"a": shared, "b": shared}, is_zip=is_zip)
    one_object = "several names are kept in one object"
    assert_refused(ckpt, path, one_object, "rename", "a.w", "a.v")
    assert_refused(ckpt, path, one_object, "rm", "a.w")
    assert_refused(ckpt, path, one_object, "untie", "a.w")
    assert_refused(ckpt, path, one_object, "set", "a.n=2")
    assert ckpt("rename", path, "--sub", r"\.w$", ".v").code == 0
    assert ckpt("rm", path, "a").code == 0
    assert list(load(path)["b"]) == ["v", "n"]


def test_a_whole_module_is_renamed_and_pruned_and_stays_one(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    path = saved(tmp_path / "net.pt", nn.Sequential(layer, nn.ReLU(), layer, nn.BatchNorm1d(3)))
    assert_refused(ckpt, path, "several names are kept in one object", "rename", "0.weight", "0.w")
    assert_refused(ckpt, path, "several names are kept in one object", "rm", "2.bias")
    assert_refused(ckpt, path, "several names are kept in one object", "untie", "0.weight")
    assert ckpt("rename", path, "3", "norm").code == 0
    assert ckpt("rename", path, "norm.running_mean", "norm.mean").code == 0
    assert ckpt("rename", path, "--sub", r"^([02])\.bias", r"\1.shift").code == 0
    found = load(path)
    assert list(found._modules) == ["0", "1", "2", "norm"]
    assert found[0] is found[2]
    assert list(found.state_dict()) == [
        "0.weight", "0.shift", "2.weight", "2.shift",
        "norm.weight", "norm.bias", "norm.mean", "norm.running_var", "norm.num_batches_tracked",
    ]  # fmt: skip
    edited(ckpt, "rename", path, "0", "first")
    edited(ckpt, "rm", path, "norm")
    found = load(path)
    assert list(found._modules) == ["first", "1", "2"]
    assert found._modules["first"] is found._modules["2"]


def test_the_metadata_of_a_state_dict_follows_a_prefix(tmp_path: Path, ckpt: Ckpt) -> None:
    net = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), head=nn.Linear(2, 1)))
    wrapped = nn.Module()
    wrapped.add_module("module", net)
    path = saved(tmp_path / "a.pt", wrapped.state_dict())
    assert ckpt("rename", path, "--strip", "module").code == 0
    found, wanted = load(path), net.state_dict()
    assert list(found._metadata.items()) == list(wanted._metadata.items())
    net.load_state_dict(found)


@pytest.mark.filterwarnings("ignore")  # of layouts that torch calls deprecated, or a prototype
def test_parts_of_quantized_tensors_and_numpy_arrays_are_not_cast(tmp_path: Path, ckpt: Ckpt) -> None:
    quantized = torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
    )
    value = {"q": quantized, "w": torch.ones(2), "array": np.ones(2), "m": torch.ones(2, device="meta")}
    path = saved(tmp_path / "a.pt", value)
    done = json.loads(ckpt("cast", path, "float16", "--json").out)
    assert (done["changed"], done["left"]) == (["w"], ["q", "array", "m"])
    found = load(path)
    assert found["w"].dtype == torch.float16
    assert torch.equal(found["q"].dequantize(), quantized.dequantize())
    assert (found["array"].dtype, found["m"].dtype) == (np.float64, torch.float32)
    for name, told in (("q", "is of qint8"), ("array", "array of numpy's"), ("m", "is meta")):
        assert_refused(ckpt, path, told, "cast", "float16", name)


# --- values ----------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_value_may_open_up_to_entries_of_its_own(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    old = {"scheduler": None, "empty": {}, "list": [1, 2], "pair": (1, 2), "w": torch.ones(1)}
    path = saved(tmp_path / "a.pt", old, is_zip=is_zip)
    assignments = ['scheduler={"step":[1,{"lr":null}]}', 'empty={"k":1}', "list=[[1],[2,3]]", "pair=[[1],2]"]
    dry = ckpt("set", path, *assignments, "-n")
    assert dry.code == 0, dry.err
    assert ckpt("set", path, *assignments).code == 0
    new = {"scheduler": {"step": [1, {"lr": None}]}, "empty": {"k": 1}, "list": [[1], [2, 3]], "pair": ([1], 2)}
    assert load(path) == new | {"w": torch.ones(1)}
    answer = ckpt("set", path, "--new", 'config={"optimizer":{"lr":0.1},"sizes":[[1],[]]}')
    assert answer.code == 0, answer.err
    assert load(path)["config"] == {"optimizer": {"lr": 0.1}, "sizes": [[1], []]}
    assert "config.optimizer.lr" in ckpt("ls", "-a", path).out


@FORMATS
def test_a_new_value_goes_into_the_innermost_mapping_even_an_empty_one(
    tmp_path: Path, ckpt: Ckpt, is_zip: bool
) -> None:
    noted: OrderedDict[str, Any] = OrderedDict()
    noted.__dict__["_metadata"] = OrderedDict({"": {"version": 1}})
    path = saved(tmp_path / "a.pt", {"": {"w": 1}, "a": {}, "b": OrderedDict(), "c": {"d": noted}}, is_zip=is_zip)
    answer = ckpt("set", path, "--new", "a.x=1", "b.x=2", "c.d.x=3", "c.y.z=4", "top=5")
    assert answer.code == 0, answer.err
    found = load(path)
    assert found == {"": {"w": 1}, "a": {"x": 1}, "b": {"x": 2}, "c": {"d": {"x": 3}, "y.z": 4}, "top": 5}
    assert vars(found["c"]["d"]) == {"_metadata": {"": {"version": 1}}}
    assert ckpt("set", path, "--new", "topmost=6").code == 0  # which begins as another name does


def test_a_cast_of_a_legacy_stream_looks_at_its_storages_once_rather_than_once_for_each(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    references = EditedPickle.references

    def counted(edited: EditedPickle) -> Any:
        calls.append(None)
        return references(edited)

    monkeypatch.setattr(EditedPickle, "references", counted)
    path = saved(tmp_path / "a.pt", {str(number): torch.ones(2) for number in range(50)}, is_zip=False)
    assert ckpt("cast", path, "bfloat16").code == 0
    assert len(calls) < 10
    assert load(path)["49"].tolist() == [1, 1]
