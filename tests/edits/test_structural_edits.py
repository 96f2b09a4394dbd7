"""Structural edits of pickled checkpoints: what they refuse, what they say, and graphs that are odd."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import call
from builders.pt import write
from conftest import Ckpt
from contract import quietly
from run_edit import assert_refused, assert_senseless, edited, edited_as_told, odd_requests, senseless
from torch import nn

from ckpt_cli.pickles.edit.rewrite import EditedPickle


def saved(path: Path, value: Any, *, is_zip: bool = True) -> Path:
    """A file that torch writes."""
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def load(path: Path) -> Any:
    """What torch makes of it."""
    return torch.load(path, weights_only=False)


FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


# --- names -----------------------------------------------------------------------------------------------------------


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


# --- other containers ------------------------------------------------------------------------------------------------


def test_meta_of_a_pickle_names_the_command_that_adds_an_entry(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "a.pt", {"a": 1})
    assert_refused(ckpt, path, f"hint: ckpt set {path} --new KEY=VALUE", "meta", "k=v")


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """Files of formats that take no structural edits."""
    net = nn.Linear(2, 2)
    with quietly():
        torch.jit.trace(net, torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
        torch.export.save(torch.export.export(net, (torch.ones(1, 2),)), tmp_path / "program.pt2")
    arrays = {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    np.savez(tmp_path / "arrays.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs take the names for options
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({name: torch.from_numpy(of) for name, of in arrays.items()}))
    return sorted(tmp_path.iterdir())


def test_containers_that_take_values_only_name_the_command_that_converts(others: list[Path], ckpt: Ckpt) -> None:
    assert len(others) == 4
    for path in others:
        for command, *rest in (
            ("rename", "weight", "w"), ("rename", "--add", "x"), ("rm", "bias"), ("keep", "bias"), ("cast", "float16"),
            ("set", "e=1", "--new"),
        ):  # fmt: skip
            assert_refused(ckpt, path, f"hint: ckpt convert {path} OUT.pt", command, *rest)
            assert "only the elements of tensors can be changed" in ckpt(command, path, *rest).err
        assert_refused(ckpt, path, "no metadata of strings", "meta", "a=b")


# --- what is refused -------------------------------------------------------------------------------------------------


@senseless
def test_what_makes_no_sense_is_refused_in_one_line(here: Path, ckpt: Ckpt, arguments: tuple[str, ...]) -> None:
    assert_senseless(ckpt, saved(here / "a.pt", odd_requests()), arguments)


STRANGE: dict[tuple[str, ...], str] = {
    ("rename", "model.w", "w"): "would leave what it is kept in ('model')",
    ("rm", "pair.0"): "called by its place in a list",
    ("rename", "pair.0", "pair.x"): "called by its place in a list",
    ("rm", "sparse.values"): "a part of a tensor",
    ("untie", "sparse"): "made of others",
    ("cast", "half", "epoch"): "no tensor",
    ("cast", "half", "steps"): "not floating",
    ("tie", "model.w", "epoch"): "names 0 tensors",
    ("meta", "k=v"): "has no metadata of strings",
}


@FORMATS
@pytest.mark.parametrize("arguments", STRANGE, ids=" ".join)
def test_what_a_pickle_cannot_say_is_refused_in_one_line(
    tmp_path: Path, ckpt: Ckpt, arguments: tuple[str, ...], is_zip: bool
) -> None:
    value = {
        "model": {"w": torch.ones(2), "v": torch.ones(2)}, "epoch": 3, "pair": (torch.ones(1), torch.zeros(1)),
        "sparse": torch.eye(2).to_sparse(), "steps": torch.tensor(1),
    }  # fmt: skip
    command, *rest = arguments
    assert_refused(ckpt, saved(tmp_path / "a.pt", value, is_zip=is_zip), STRANGE[arguments], command, *rest)


# --- what an edit says -----------------------------------------------------------------------------------------------

EDITS = {
    "rename": ["rename", "a", "x"],
    "rename to much more": ["rename", "a", "some.long.name" * 40],
    "rm": ["rm", "a"],
    "keep": ["keep", "a", "c"],
    "cast": ["cast", "float16"],
    "tie": ["tie", "a", "b"],
    "untie": ["untie", "d"],
    "compact": ["compact"],
    "set a value": ["set", "epoch=123456789"],
    "set a new one": ["set", "--new", "note=x"],
    "set both": ["set", "epoch=77", "a[0]=5"],
}


def sample() -> dict[str, Any]:
    """What every edit has something to do to."""
    shared = torch.zeros(3)
    return {"a": torch.ones(4), "b": torch.ones(4), "c": shared, "d": shared, "e": torch.ones(99)[:2], "epoch": 1}


@FORMATS
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_reports_the_stable_shape_and_a_dry_run_the_same_numbers(
    tmp_path: Path, ckpt: Ckpt, edit: str, is_zip: bool
) -> None:
    path, out = saved(tmp_path / "a.pt", sample(), is_zip=is_zip), tmp_path / "out.pt"
    before = path.read_bytes()
    command, *rest = EDITS[edit]
    for more, target in (["-o", out], out), ([], path):
        done = edited_as_told(ckpt, command, path, *rest, *more)
        assert (done["path"], done["output"], done["in_place"]) == (str(path), str(target), not more)
        if not done["patched"]:
            assert done["bytes_written"] == target.stat().st_size
        assert (path.read_bytes() == before) == bool(more)
    assert load(out).keys() == load(path).keys()


@FORMATS
@pytest.mark.parametrize("edit", EDITS)
def test_a_backup_is_the_old_file(tmp_path: Path, ckpt: Ckpt, edit: str, is_zip: bool) -> None:
    path = saved(tmp_path / "a.pt", sample(), is_zip=is_zip)
    os.chmod(path, 0o640)
    before = path.read_bytes()
    command, *rest = EDITS[edit]
    answer = ckpt(command, path, *rest, "--backup")
    assert answer.code == 0
    assert "the old file is" in answer.err
    assert (tmp_path / "a.pt.bak").read_bytes() == before
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == [".a.pt.bak.ckpt-undo", "a.pt", "a.pt.bak"]


@pytest.mark.parametrize(
    "edit", [["rm", "a"], ["rename", "a", "x"], ["set", "a[0]=5"], ["set", "epoch=5"], ["convert"], ["show", "a"]]
)
def test_an_output_is_a_regular_file_and_has_a_name(tmp_path: Path, ckpt: Ckpt, edit: list[str]) -> None:
    path, pipe = saved(tmp_path / "a.pt", sample()), tmp_path / "pipe"
    before = path.read_bytes()
    os.mkfifo(pipe)
    option = [] if edit[0] == "convert" else ["-o"]
    for more in ([], ["-n"]) if edit[0] != "show" else ([],):
        to = ["--to", "pt", "--force"] if edit[0] == "convert" else []
        answer = ckpt(edit[0], path, *edit[1:], *to, *more, *option, pipe)
        assert (answer.code, "is not a regular file" in answer.err) == (2, True), answer.err
        assert pipe.is_fifo()
        answer = ckpt(edit[0], path, *edit[1:], *to, *more, *option, "")
        assert (answer.code, "empty name" in answer.err) == (2, True), answer.err
    assert "empty name" in ckpt("convert", path, "", "--to", "hf", "--force").err
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "pipe"]


def test_an_edit_through_a_link_replaces_what_it_points_to(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "real").mkdir()
    path = saved(tmp_path / "real" / "a.pt", sample())
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    assert ckpt("rename", link, "a", "x").code == 0
    assert link.is_symlink()
    assert "x" in load(path)
    out = tmp_path / "out.pt"
    out.symlink_to(tmp_path / "real" / "new.pt")
    assert ckpt("rename", link, "x", "a", "-o", out).code == 0
    assert out.is_symlink()
    assert "a" in load(tmp_path / "real" / "new.pt")


def test_a_blob_of_the_hub_is_not_rewritten(tmp_path: Path, ckpt: Ckpt) -> None:
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    saved(blob, sample())
    link = tmp_path / "model.pt"
    link.symlink_to(blob)
    before = blob.read_bytes()
    for arguments in (["rename", link, "a", "x"], ["set", link, "epoch=12345678901"], ["meta", link, "a=b"]):
        answer = ckpt(*arguments)
        assert (answer.code, "hash of its content" in answer.err) == (2, True)
    assert ckpt("rename", link, "a", "x", "-o", blob).code == 2
    assert blob.read_bytes() == before


def test_a_folder_that_may_not_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    """As another user, as root may write everywhere."""
    folder = tmp_path / "closed"
    folder.mkdir()
    path = saved(folder / "a.pt", sample())
    os.chmod(folder, 0o555)
    for at in (tmp_path, *tmp_path.parents):
        if at.owner() == path.owner() and at != Path("/"):
            at.chmod(at.stat().st_mode | 0o555)
    other = saved(tmp_path / "other.pt", sample())
    code = (
        "import os, sys\n"
        "from ckpt_cli.cli.main import run\n"
        "path, other, command, *rest = sys.argv[1:]\n"
        "assert run([command, other, *rest]) == 0\n"  # which imports what that user may not read
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "sys.stderr.write('then\\n')\n"
        "sys.exit(run([command, path, *rest]))"
    )
    for arguments in (["rename", "a", "x"], ["set", "--new", "note=1"]):
        call = [sys.executable, "-c", code, str(path), str(other), *arguments]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        told = done.stderr.partition("then\n")[2]
        assert told.startswith("ckpt: ")
        assert "Permission denied" in told
        assert len(told.splitlines()) <= 2
    assert os.listdir(folder) == ["a.pt"]


def test_names_of_a_map_may_be_many(tmp_path: Path, ckpt: Ckpt) -> None:
    count = 4000
    path = saved(tmp_path / "a.pt", {f"layer.{number}.w": number for number in range(count)})
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"layer.{number}.w": f"block.{number}.weight" for number in range(count)}))
    assert ckpt("rename", path, "--map", names).code == 0
    assert list(load(path)) == [f"block.{number}.weight" for number in range(count)]


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


# --- folders of one file ---------------------------------------------------------------------------------------------

FOLDED = pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])


@FOLDED
@pytest.mark.parametrize("edit", ["rename", "rm", "keep", "cast", "tie", "untie"])
def test_the_one_file_of_a_folder_is_edited_as_if_it_were_named(
    tmp_path: Path, ckpt: Ckpt, name: str, edit: str
) -> None:
    source, folder = saved(tmp_path / "a.pt", {**sample(), "epoch": torch.ones(1)}), tmp_path / "folder"
    folder.mkdir()
    assert ckpt("convert", source, folder / name).code == 0
    (folder / name).chmod(0o640)
    single = Path(shutil.copy(folder / name, tmp_path / name))
    done = []
    for path in (single, folder):
        command, *rest = EDITS[edit]
        arguments = [command, path, *rest]
        assert ckpt(*arguments, "-o", tmp_path / f"{path.name}.out").code == 0
        assert ckpt(*arguments, "-n").code == 0
        answer = ckpt(*arguments, "--backup", "--json")
        assert answer.code == 0, answer.err
        done.append({key: value for key, value in json.loads(answer.out).items() if isinstance(value, int | list)})
    assert {**done[1], "backups": 1} == {**done[0], "backups": 1}
    assert sorted(os.listdir(folder)) == [f".{name}.bak.ckpt-undo", name, f"{name}.bak"]
    assert (folder / name).read_bytes() == single.read_bytes()
    assert (folder / name).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder.out").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder.out").read_bytes() == (tmp_path / f"{name}.out").read_bytes()


@FOLDED
def test_the_one_file_of_a_folder_is_no_output_and_stays_in_its_cache(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    source, folder, blobs = saved(tmp_path / "a.pt", sample()), tmp_path / "folder", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    blob = blobs / ("ab" * 32)
    assert ckpt("convert", source, folder / name, "--tensors-only").code == 0
    (folder / name).rename(blob)
    before = blob.read_bytes()
    (folder / name).symlink_to(blob)
    for edit in (["rm", folder, "a"], ["cast", folder, "float16"], ["set", folder, "a[0]=7"]):
        for dry in ([], ["-n"]):
            assert "name is the hash of its content" in ckpt(*edit, *dry).err
    (folder / name).unlink()
    shutil.copy(blob, folder / name)
    for edit in (["rm", folder, "a", "-o"], ["set", folder, "a[0]=7", "-o"], ["convert", folder, "--force"]):
        answer = ckpt(*edit, folder / name)
        assert (answer.code, "the output is the file itself" in answer.err) == (2, True)
    assert blob.read_bytes() == (folder / name).read_bytes() == before
