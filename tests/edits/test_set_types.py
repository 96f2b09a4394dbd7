"""What `set` makes of values that are not plain data: numpy's scalars stay what they are, objects are refused."""

from __future__ import annotations

import decimal
import json
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt

from ckpt_cli.pickles.edit.retype import retyped
from ckpt_cli.pickles.graph import Call, Global, RawString
from ckpt_cli.pickles.read import read_pickle

FORMATS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def saved(path: Path, state: object, *, is_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    return path


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


class Meter:
    """An object with attributes."""

    def __init__(self) -> None:
        self.best = np.float64(0.5)


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("old", "text", "new"),
    [
        (np.float64(1.5), "=2.5", np.float64(2.5)),
        (np.float32(1.5), "=2", np.float32(2)),
        (np.float32(1.5), "=0.1", np.float32(0.1)),
        (np.float16(1.5), "*=2", np.float16(3)),
        (np.float32(1), "=nan", np.float32("nan")),
        (np.float16(1), "=-inf", np.float16("-inf")),
        (np.int64(7), "+=1", np.int64(8)),
        (np.int8(-1), "=-128", np.int8(-128)),
        (np.uint64(7), f"={2**64 - 1}", np.uint64(2**64 - 1)),
        (np.uint16(7), "/=7", np.uint16(1)),
        (np.int32(7), "=8.0", np.int32(8)),
        (np.bool_(True), "=false", np.bool_(False)),
        (np.str_("abc"), "=a longer text ü", np.str_("a longer text ü")),
        (np.str_("abc"), "=xyz", np.str_("xyz")),
        (np.str_("abc"), '=""', np.str_("")),
        (np.dtype(">f4").type(1), "=2", np.float32(2)),
    ],
    ids=repr,
)
def test_a_numpy_scalar_stays_one_of_its_dtype(
    tmp_path: Path, ckpt: Ckpt, old: np.generic, text: str, new: np.generic, is_zip: bool, protocol: int
) -> None:
    path = saved(tmp_path / "a.pt", {"v": old, "same": old, "w": torch.ones(2)}, is_zip=is_zip, protocol=protocol)
    answer = ckpt("set", path, f"v{text}", "w[0]=3")
    assert answer.code == 0, answer.err
    after = loaded(path)
    assert (type(after["v"]), after["v"].dtype) == (type(new), new.dtype)
    assert after["v"] == new or (after["v"] != after["v"] and new != new)
    assert (after["same"], after["w"].tolist()) == (old, [3, 1])


@FORMATS
def test_a_numpy_scalar_stays_one_wherever_it_is(tmp_path: Path, ckpt: Ckpt, is_zip: bool) -> None:
    state = {"l": [np.float32(1), np.float32(2)], "t": (np.int32(1), "x"), "d": {"n": {"m": np.uint8(3)}}, "o": Meter()}
    path = saved(tmp_path / "a.pt", state, is_zip=is_zip)
    assert ckpt("set", path, "l.1=5", "t.0=9", "d.n.m=255", "o.best-=1").code == 0
    after = loaded(path)
    found = [after["l"][1], after["t"][0], after["d"]["n"]["m"], after["o"].best]
    assert [(type(value), value.item()) for value in found] == [
        (np.float32, 5), (np.int32, 9), (np.uint8, 255), (np.float64, -0.5),
    ]  # fmt: skip
    assert type(after["t"]) is tuple


@pytest.mark.parametrize(
    ("old", "text", "cast"),
    [
        (np.int64(7), f"={2**63}", np.int64(-(2**63))),
        (np.int8(7), "+=121", np.int8(-128)),
        (np.uint8(7), "=256", np.uint8(0)),
        (np.uint8(7), "-=8", np.uint8(255)),
        (np.int32(7), "=1.5", np.int32(1)),
        (np.float16(1), "=1e6", np.float16("inf")),
        (np.float16(1), "=1e-9", np.float16(0)),
        (np.float32(1), "=-1e39", np.float32("-inf")),
        (np.float32(1e30), "*=1e30", np.float32("inf")),
        (np.bool_(False), "=2", np.bool_(True)),
    ],
    ids=repr,
)
def test_a_value_that_a_numpy_scalar_cannot_hold_needs_a_cast(
    tmp_path: Path, ckpt: Ckpt, old: np.generic, text: str, cast: np.generic
) -> None:
    path = saved(tmp_path / "a.pt", {"v": old})
    before = path.read_bytes()
    for dry in ([], ["-n"]):
        answer = ckpt("set", path, f"v{text}", *dry)
        assert (answer.code, len(answer.err.splitlines())) == (2, 2)
        assert "\nhint: --cast " in answer.err
    assert path.read_bytes() == before
    assert ckpt("set", path, f"v{text}", "--cast").code == 0
    after = loaded(path)["v"]
    assert (type(after), after) == (type(cast), cast)


def test_a_numpy_scalar_is_listed_as_before(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "a.pt", {"best": np.float32(1.5), "it": np.int64(7)})
    assert ckpt("set", path, "best=2.5", "it=8").code == 0
    assert json.loads(ckpt("ls", "-a", "--json", path).out)["entries"] == [
        {"name": "best", "type": "value", "value": 2.5},
        {"name": "it", "type": "value", "value": 8},
    ]


def test_an_array_of_no_dimensions_is_set_as_the_tensor_that_it_is(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"zero": np.array(3.0, np.float32)}, protocol=4))
    assert ckpt("set", path, "zero=4").code == 0
    after = pickle.loads(path.read_bytes())["zero"]
    assert (type(after), after.dtype, after.shape, after.item()) == (np.ndarray, np.float32, (), 4)


OBJECTS = {
    "size": torch.Size([2, 3]), "dtype": torch.float16, "device": torch.device("cpu"), "number": decimal.Decimal("1.5"),
    "path": pathlib.PurePosixPath("a/b"), "raw": np.bytes_(b"ab"), "day": np.datetime64("2020-01-01"), "z": 1 + 2j,
    "set": {1}, "bytes": b"ab", "range": range(3),
}  # fmt: skip


@FORMATS
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_refused_with_what_can_be_done(tmp_path: Path, ckpt: Ckpt, name: str, is_zip: bool) -> None:
    path = saved(tmp_path / "a.pt", {**OBJECTS, "w": torch.ones(1)}, is_zip=is_zip)
    before = path.read_bytes()
    for assignment in (f"{name}=1", f"{name}=[1,2]", f"{name}=text", f"{name}+=1"):
        answer = ckpt("set", path, assignment)
        assert (answer.code, len(answer.err.splitlines())) == (2, 2)
        assert "is an object" in answer.err
        assert answer.err.endswith("hint: --cast puts a plain value in its place, None goes there without it\n")
    assert path.read_bytes() == before
    assert ckpt("set", path, f"{name}=[1,2]", "--cast").code == 0
    assert loaded(path)[name] == [1, 2]
    path = saved(path, OBJECTS, is_zip=is_zip)
    assert ckpt("set", path, f"{name}=None").code == 0
    assert loaded(path) == {**OBJECTS, name: None}


def test_the_way_to_replace_a_whole_module_is_named_and_works(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "a.pt", {"ema": torch.nn.Linear(1, 1), "epoch": 3})
    answer = ckpt("set", path, "ema=None")
    assert answer.code == 2
    assert "'ema' has tensors and other values below it" in answer.err
    assert answer.err.endswith(f"run ckpt rm {path} ema, then ckpt set {path} ema=None --new\n")
    assert ckpt("rm", path, "ema").code == 0
    assert ckpt("set", path, "ema=None", "--new").code == 0
    assert loaded(path) == {"epoch": 3, "ema": None}


def test_whole_numbers_in_a_list_of_floats_become_floats(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "a.pt", {"betas": (0.9, 0.999), "mixed": [1, 0.5], "none": []})
    assert ckpt("set", path, "betas=[1,0]", "mixed=[2,3,4]", "none=[1]").code == 0
    assert [repr(value) for value in loaded(path).values()] == ["(1.0, 0.0)", "[2, 3.0, 4.0]", "[1]"]


def test_a_string_of_python_2_stays_one(tmp_path: Path, ckpt: Ckpt) -> None:
    assert isinstance(retyped("x", "new", RawString(b"old"), cast=False), RawString)
    graph = read_pickle(pickle.dumps(np.float32(1), protocol=2))
    made = retyped("x", 2.0, graph.root, cast=False)
    assert isinstance(made, Call)
    assert isinstance(made.func, Global)
    assert made.func.name == "scalar"
