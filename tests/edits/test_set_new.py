"""Tensors that `set --new` adds: from .npy files bit for bit, from numbers in a dtype, into every container."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from run_edit import assert_refused, edited, edited_as_told
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_cli
from ckpt_cli.edits import set_new as new_tensors

CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8", "c16", "b1")


def array_of(code: str, order: str, *, fortran: bool) -> np.ndarray[Any, Any]:
    """Random bits, NaN payloads among them, as an array of 3 x 5."""
    raw = np.random.default_rng(len(code) + ord(code[-1])).integers(0, 256, (3, 5, np.dtype(code).itemsize), np.uint8)
    if code == "b1":
        raw &= 1
    if code in ("f2", "f4"):  # a signalling NaN
        raw[0, 0] = {"f2": [1, 0x7C], "f4": [1, 0, 0x80, 0x7F]}[code]
    array = raw.view(f"<{code}")[..., 0].astype(f"{order}{code}")
    if code in ("f2", "f4") and order == ">":
        array = raw.view(f"<{code}")[..., 0].byteswap().view(f">{code}")
    return np.asfortranarray(array) if fortran else array


def assert_bits(tensor: torch.Tensor, array: np.ndarray[Any, Any]) -> None:
    """A tensor has the shape, the dtype and the bits of an array."""
    plain = array.byteswap().view(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
    assert tuple(tensor.shape) == array.shape
    assert str(tensor.dtype) == f"torch.{array.dtype.name}"
    assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == plain.tobytes(order="C")


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Files of every dtype, in both byte orders, in C's and in Fortran's order, by their names."""
    found = {}
    for code in CODES:
        for order in "<>":
            for fortran in (False, True):
                name = f"{code}{'lb'[order == '>']}{'cf'[fortran]}"
                found[name] = array_of(code, order, fortran=fortran)
                np.save(tmp_path / f"{name}.npy", found[name])
    return found


def assignments(tmp_path: Path, names: list[str], prefix: str = "") -> list[str]:
    return [f"{prefix}{name}=@{tmp_path}/{name}.npy" for name in names]


def is_typed(code: str) -> bool:
    """Whether torch has had the dtype since before 1.6."""
    return code[0] != "u" or code[1] == "1"


# --- pickled files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_arrays_become_tensors_bit_for_bit(
    tmp_path: Path, ckpt: Ckpt, arrays: dict[str, np.ndarray[Any, Any]], is_zip: bool
) -> None:
    path = tmp_path / "m.pt"
    shared = torch.arange(4.0)
    state = OrderedDict({"0.w": torch.ones(2, 2), "0.v": shared})
    torch.save({"model": state, "again": shared, "epoch": 3}, path, _use_new_zipfile_serialization=is_zip)
    names = [name for name in arrays if is_zip or is_typed(name)]
    done = edited_as_told(ckpt, "set", path, *assignments(tmp_path, names, "model.new."), "--new")
    assert done["bytes_written"] == path.stat().st_size
    assert done["changed"] == [f"model.new.{name}" for name in names]
    for mapped in [False, True][: 1 + is_zip]:
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert list(loaded) == ["model", "again", "epoch"]
        assert list(loaded["model"]) == ["0.w", "0.v", *(f"new.{name}" for name in names)]
        assert loaded["again"].data_ptr() == loaded["model"]["0.v"].data_ptr()
        for name in names:
            assert_bits(loaded["model"][f"new.{name}"], arrays[name])


def test_the_layout_of_a_zip_file_stays_torch_s_own(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.arange(6, dtype=np.float32))
    path = tmp_path / "m.pt"
    torch.save({"model": {"w": torch.ones(3)}, "last": torch.arange(5)}, path)
    edited(ckpt, "set", path, f"model.q=@{tmp_path}/q.npy", "--new")
    offsets = torch.load(path, weights_only=True, map_location="meta")
    raw = path.read_bytes()
    for tensor, values in ((offsets["model"]["q"], np.arange(6, dtype=np.float32)), (offsets["last"], np.arange(5))):
        begin = tensor.untyped_storage()._checkpoint_offset
        assert raw[begin : begin + values.nbytes] == values.tobytes()
    assert ckpt("check", path, "--deep").code == 0


def test_a_new_tensor_goes_into_the_innermost_container(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.float32(2))
    path = tmp_path / "m.pt"
    value = {"model": {"a.w": torch.ones(1), "deep": {"x": 1}}, "empty": {}, "none": OrderedDict()}
    value["state"] = {0: {"step": torch.ones(1)}, 1: {"step": torch.ones(1)}}
    torch.save(value, path)
    names = ("model.b.w", "model.deep.y", "empty.z", "none.k", "state.2", "top.x")
    edited(ckpt, "set", path, *(f"{name}=@{tmp_path}/q.npy" for name in names), "--new")
    found = torch.load(path, weights_only=True)
    assert list(found) == [*value, "top.x"]
    assert (list(found["model"]), list(found["model"]["deep"])) == (["a.w", "deep", "b.w"], ["x", "y"])
    assert (list(found["empty"]), list(found["none"]), list(found["state"])) == (["z"], ["k"], [0, 1, 2])
    assert found["state"][2] == 2


def test_a_new_tensor_of_a_pickled_module_is_a_buffer(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.ones(2, np.float32))
    path = tmp_path / "m.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    edited(ckpt, "set", path, f"0.scale=@{tmp_path}/q.npy", "--new")
    module = torch.load(path, weights_only=False)
    assert list(module.state_dict()) == ["0.weight", "0.bias", "0.scale"]
    assert [name for name, _ in module.named_buffers()] == ["0.scale"]
    for name, told in (("0._modules", "has an attribute '_modules' already"), ("1.scale", "is an object")):
        assert_refused(ckpt, path, told, "set", f"{name}=@{tmp_path}/q.npy", "--new")


def test_elements_values_and_new_tensors_are_set_at_once(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.arange(3))
    path = tmp_path / "m.pt"
    torch.save({"a": torch.zeros(2), "note": "x"}, path)
    edited(ckpt, "set", path, "a[0]=7", 'note="@x"', f"q=@{tmp_path}/q.npy", 'text="@q.npy"', "l=[1,2]", "--new")
    found = torch.load(path, weights_only=True)
    assert found["a"].tolist() == [7, 0]
    assert found["q"].tolist() == [0, 1, 2]
    assert (found["note"], found["text"], found["l"]) == ("@x", "@q.npy", [1, 2])


def test_a_tensor_that_is_there_takes_the_bits_of_an_array(
    tmp_path: Path, ckpt: Ckpt, arrays: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = tmp_path / "m.pt"
    dtypes = {name: getattr(torch, array.dtype.name) for name, array in arrays.items()}
    torch.save({name: torch.zeros((3, 5), dtype=dtype) for name, dtype in dtypes.items()}, path)
    edited(ckpt, "set", path, *assignments(tmp_path, list(arrays)))
    for name, tensor in torch.load(path, weights_only=True).items():
        assert_bits(tensor, arrays[name])


@pytest.mark.parametrize("most", [1, 100, 4096])
def test_an_array_in_fortran_s_order_is_turned_in_pieces(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(new_tensors, "_COLUMNS", most)
    monkeypatch.setattr(new_tensors, "PIECE", most + 16)
    array = np.asfortranarray(np.arange(7 * 3 * 4 * 2, dtype=">i4").reshape(7, 3, 4, 2))
    np.save(tmp_path / "q.npy", array)
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    edited(ckpt, "set", tmp_path / "m.pt", f"q=@{tmp_path}/q.npy", "--new")
    edited(ckpt, "set", tmp_path / "m.pt", f"half=@{tmp_path}/q.npy", "--new", "--dtype", "half")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert found["q"].is_contiguous()
    assert_bits(found["q"], array)
    assert_bits(found["half"], array.astype(np.float16))


def test_a_big_endian_file_gets_no_values_in_the_other_order(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "little.pt")
    path = tmp_path / "in" / "big.pt"
    path.parent.mkdir()
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(path, "w") as big:
        for name in little.namelist():
            data = little.read(name)
            data = np.frombuffer(data, "<f4").byteswap().tobytes() if "/data/" in name else data
            big.writestr(name, b"big" if name.endswith("byteorder") else data)
    for words in (("set", "n=1", "--new", "--dtype", "f32"), ("cast", "float64")):
        assert_refused(ckpt, path, "big-endian", words[0], *words[1:])
    edited(ckpt, "cast", path, "float8_e4m3fn")
    edited(ckpt, "set", path, "n=[1,2]", "--new", "--dtype", "uint8")
    found = torch.load(path, weights_only=True)
    assert (found["a"].float().tolist(), found["n"].tolist()) == ([0, 1, 2], [1, 2])


# --- numbers of a dtype ----------------------------------------------------------------------------------------------

NUMBERS = {
    "5": ("bf16", torch.tensor(5, dtype=torch.bfloat16)),
    "[[1,2],[3,4.5]]": ("half", torch.tensor([[1, 2], [3, 4.5]], dtype=torch.float16)),
    "[]": ("float32", torch.zeros(0)),
    "[[],[]]": ("torch.int64", torch.zeros((2, 0), dtype=torch.int64)),
    "[true,false]": ("bool", torch.tensor([True, False])),
    "1+2j": ("complex64", torch.tensor(1 + 2j)),
    "18446744073709551615": ("uint64", torch.tensor(2**64 - 1, dtype=torch.uint64)),
    "[0.5,448]": ("fp8", torch.tensor([0.5, 448]).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_with_a_dtype_become_a_tensor(tmp_path: Path, ckpt: Ckpt, text: str) -> None:
    dtype, wanted = NUMBERS[text]
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(1)}, path)
    edited_as_told(ckpt, "set", path, f"x={text}", "--new", "--dtype", dtype)
    found = torch.load(path, weights_only=True)["x"]
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.reshape(-1).view(torch.uint8).tolist() == wanted.reshape(-1).view(torch.uint8).tolist()


def test_an_array_is_converted_to_a_dtype_and_must_fit_it(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.asfortranarray(np.array([[1, 70000], [0.1, -2]])))
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(1)}, path)
    argument = f"x=@{tmp_path}/q.npy"
    assert_refused(ckpt, path, "float16 cannot hold 70000", "set", argument, "--new", "--dtype", "half")
    edited(ckpt, "set", path, argument, "--new", "--dtype", "half", "--cast")
    wanted = torch.tensor([[1, 70000], [0.1, -2]], dtype=torch.float64).half()
    assert torch.equal(torch.load(path, weights_only=True)["x"], wanted)


# --- what is refused -------------------------------------------------------------------------------------------------


def odd_files(folder: Path) -> None:
    """Files that are not one array of numbers."""
    np.save(folder / "text.npy", np.array(["a"]))
    np.save(folder / "dates.npy", np.array(["2020-01-01"], "M8[D]"))
    np.save(folder / "fields.npy", np.zeros(2, [("a", "f4"), ("b", "i4")]))
    np.save(folder / "objects.npy", np.array([None], object))
    np.save(folder / "long.npy", np.zeros(2, np.longdouble))
    np.savez(folder / "several.npz", a=np.ones(1))
    with (folder / "two.npy").open("wb") as file:
        np.save(file, np.ones(2))
        np.save(file, np.ones(3))
    np.save(folder / "q.npy", np.ones(3))
    (folder / "cut.npy").write_bytes((folder / "q.npy").read_bytes()[:-3])
    (folder / "plain.npy").write_text("hello world, no array")
    os.mkfifo(folder / "pipe.npy")


ODD = {
    "n=@text.npy": "not numbers", "n=@dates.npy": "not numbers", "n=@fields.npy": "not numbers",
    "n=@objects.npy": "not numbers", "n=@long.npy": "not numbers", "n=@several.npz": "not a numpy array",
    "n=@two.npy": "more than one array", "a=@two.npy": "more than one array", "n=@cut.npy": "the file has",
    "n=@plain.npy": "not a numpy array", "n=@pipe.npy": "not a regular file", "a=@pipe.npy": "not a regular file",
    "n=@gone.npy": "No such file", "a=@gone.npy": "No such file", "n=@.": "Is a directory", "n=@": "No such file",
    "a.b=@q.npy": "'a' is an entry itself", "epoch.x=@q.npy": "'epoch' is an entry itself",
    "list.2=@q.npy": "'list' is an entry itself", "model=@q.npy": "'model' is what 'model.w' lies in",
    '"model"=@q.npy': "'model' is what 'model.w' lies in", "state.x=@q.npy": "the keys of 'state' are numbers",
    "pair.x=@q.npy": "is not a mapping", "note=@q.npy": "text that begins with @ is a JSON string",
    "epoch=@q.npy": "text that begins with @ is a JSON string", "n[0]=@q.npy": "nothing is called 'n'",
}  # fmt: skip


@pytest.mark.parametrize("assignment", ODD)
def test_what_is_no_new_tensor_is_refused(
    tmp_path: Path, ckpt: Ckpt, assignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd_files(tmp_path)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.pt"
    value = {"a": torch.ones(3), "note": "x", "epoch": 1, "list": [1, 2], "model": {"w": torch.ones(1)}}
    torch.save({**value, "state": {0: {"x": torch.ones(1)}}, "pair": (torch.ones(1),)}, path)
    assert_refused(ckpt, path, ODD[assignment], "set", assignment, "--new")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("n=[1,2]", "--dtype", "f32"), "goes with --new"),
        (("a=2", "--new", "--dtype", "f32"), "nothing here is new"),
        (("n=1", "--new", "--dtype", "qint8"), "not a dtype that a new tensor can have"),
        (("n=1", "--new", "--dtype", "flaot32"), "did you mean float32"),
        (("n=[1,300]", "--new", "--dtype", "uint8"), "uint8 cannot hold 300"),
        (("n=[[1],[2,3]]", "--new", "--dtype", "uint8"), "different lengths"),
        (("n=x", "--new", "--dtype", "uint8"), "not a value for a tensor"),
        (("n=1", "n=2", "--new", "--dtype", "uint8"), "'n' is given twice"),
        (("n=1", "n.x=2", "--new", "--dtype", "uint8"), "cannot both be entries"),
    ],
)
def test_numbers_that_are_no_new_tensor_are_refused(
    tmp_path: Path, ckpt: Ckpt, arguments: tuple[str, ...], told: str
) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(3)}, path)
    assert_refused(ckpt, path, told, "set", *arguments)


def test_a_legacy_stream_gets_no_dtype_that_torch_cannot_load_from_it(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert_refused(ckpt, path, "torch cannot load", "set", "n=1", "--new", "--dtype", "uint16")


def test_a_format_that_cannot_grow_says_so(tmp_path: Path, ckpt: Ckpt) -> None:
    np.save(tmp_path / "q.npy", np.ones(3))
    np.savez(tmp_path / "m.npz", a=np.ones(2))
    np.save(tmp_path / "m.npy", np.ones(2))
    for name in ("m.npz", "m.npy"):
        assert_refused(
            ckpt, tmp_path / name, "only the elements of tensors can be changed", "set", f"n=@{tmp_path}/q.npy", "--new"
        )


# --- safetensors and sets of shards ----------------------------------------------------------------------------------


def test_safetensors_takes_every_dtype_that_it_has(
    tmp_path: Path, ckpt: Ckpt, arrays: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = tmp_path / "m.safetensors"
    before = {"b": torch.ones(3, dtype=torch.uint8), "a": torch.arange(3.0)}
    save_file(before, path, metadata={"format": "pt"})
    names = [name for name in arrays if not name.startswith("c16")]
    done = edited_as_told(ckpt, "set", path, *assignments(tmp_path, names, "new."), "--new")
    assert done["bytes_written"] == path.stat().st_size
    found = load_file(path)
    assert found.keys() == {*before, *(f"new.{name}" for name in names)}
    assert all(torch.equal(found[name], before[name]) for name in before)
    for name in names:
        assert_bits(found[f"new.{name}"], arrays[name])
    assert_refused(ckpt, path, "has no dtype", "set", f"c=@{tmp_path}/c16lc.npy", "--new")
    assert_refused(ckpt, path, "'a' is an entry itself", "set", f"a.b=@{tmp_path}/f4lc.npy", "--new")
    assert_refused(ckpt, path, "tensors and strings only", "set", "n=[1]", "--new")


def shard_set(folder: Path, *, is_safetensors: bool) -> Path:
    """Two shards with an index; returns its path."""
    suffix, stem = ("safetensors", "model") if is_safetensors else ("bin", "pytorch_model")
    parts = [{"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(3)}, {"layers.2.w": torch.ones(4)}]
    names = [f"{stem}-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        if is_safetensors:
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 36, "total_parameters": 9}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("is_safetensors", [True, False], ids=["safetensors", "bin"])
def test_a_set_of_shards_gets_a_new_tensor_beside_its_neighbours(
    tmp_path: Path, ckpt: Ckpt, is_safetensors: bool
) -> None:
    np.save(tmp_path / "q.npy", np.arange(5, dtype=">f4"))
    (tmp_path / "set").mkdir()
    index = shard_set(tmp_path / "set", is_safetensors=is_safetensors)
    edited_as_told(ckpt, "set", index, f"layers.1.scale=@{tmp_path}/q.npy", f"head.scale=@{tmp_path}/q.npy", "--new")
    told = json.loads(index.read_text())
    assert told["metadata"] == {"total_size": 36 + 40, "total_parameters": 9 + 10}
    first, last = sorted(set(told["weight_map"].values()))
    assert (told["weight_map"]["layers.1.scale"], told["weight_map"]["head.scale"]) == (first, last)
    for file in (first, last):
        path = index.parent / file
        state = load_file(path) if is_safetensors else torch.load(path, weights_only=True)
        assert state.keys() == {name for name, its in told["weight_map"].items() if its == file}
        scales = [tensor for name, tensor in state.items() if name.endswith("scale")]
        assert [tensor.tolist() for tensor in scales] == [[0, 1, 2, 3, 4]]
    assert ckpt("check", index).code == 0
    assert_refused(ckpt, index, "cannot be set in a set", "set", "n=1", "--new")
    assert_refused(ckpt, index.parent / first, "is one shard of", "set", f"n=@{tmp_path}/q.npy", "--new")
    edited(ckpt, "set", index, f"n=@{tmp_path}/q.npy", "layers.0.w=7", "--new")
    with ckpt_cli.open(index) as checkpoint:
        assert checkpoint["n"].numpy().tolist() == [0, 1, 2, 3, 4]
        assert set(checkpoint["layers.0.w"].numpy().reshape(-1).tolist()) == {7}


def test_a_tied_safetensors_file_keeps_its_aliases_beside_a_new_tensor(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"b": "a", "format": "pt"})
    edited(ckpt, "set", path, "c=[1,2]", "--new", "--dtype", "int32")
    answer = ckpt("ls", path)
    assert [line.split("\t")[0] for line in answer.out.splitlines()] == ["a", "c", "b"]
    assert load_file(path)["c"].tolist() == [1, 2]
