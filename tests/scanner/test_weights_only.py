"""`scan` and `check` say of `torch.load(weights_only=True)` what torch does, and the names that they say suffice."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import importlib
import io
import json
import pathlib
import pickle
import random
import uuid
import warnings
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import call, pickled
from builders.pt import write
from conftest import Ckpt

from ckpt_cli.files.memory import MemorySource
from ckpt_cli.ops.check.run import check
from ckpt_cli.ops.scan import scan
from ckpt_cli.scanner.restricted_unpickler import RestrictedUnpickler
from ckpt_cli.scanner.weights_only import Verdict, verdict_of


class Colour(enum.Enum):
    RED = 1


class Bag(dict):  # type: ignore[type-arg]  # any dict
    pass


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]  # likewise
    pass


class Row(list):  # type: ignore[type-arg]  # any list
    pass


class Thing:
    def __init__(self) -> None:
        self.weight = torch.ones(2)


class Sub(torch.Tensor):
    pass


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def _cycle() -> object:
    items: list[object] = []
    items.append((items,))
    return items[0]


def _with_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "kept"  # type: ignore[attr-defined]  # a new attribute
    return tensor


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


WEIGHTS = torch.ones(2, requires_grad=True)
SAMPLES = Path(__file__).parent.parent / "samples"
OBJECTS: dict[str, object] = {
    "state_dict": Net().state_dict(),
    "module": Net(),
    "optimizer": torch.optim.AdamW([WEIGHTS]).state_dict(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "sparse": torch.eye(3).to_sparse(),
    "quantized": _quantized(),
    "subclass": torch.ones(2).as_subclass(Sub),
    "attribute": _with_attribute(),
    "uint16": torch.ones(2, dtype=torch.uint16),
    "storage": torch.ones(2).untyped_storage(),
    "dtypes": [torch.float8_e4m3fn, torch.strided, torch.device("cpu"), torch.Size([1])],
    "numbers": [1 + 2j, 10**50, -5, None, True, 0.5],
    "text": ["", "a", "é", "\ud800", b"abc", bytearray(b"abc")],
    "set": {1, 2},
    "frozenset": frozenset([1]),
    "counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list, {1: [2]}),
    "empty defaultdict": collections.defaultdict(list),
    "deque": collections.deque([1]),
    "dict subclass": Bag(a=1),
    "empty dict subclass": Bag(),
    "OrderedDict subclass": Ordered(a=1),
    "list subclass": Row([1]),
    "namespace": argparse.Namespace(lr=0.1),
    "object": Thing(),
    "enum": Colour.RED,
    "path": pathlib.PurePosixPath("a/b"),
    "partial": functools.partial(torch.nn.LayerNorm, eps=1e-6),
    "function": torch.nn.functional.gelu,
    "class": torch.nn.Linear,
    "date": [datetime.datetime(2026, 1, 1), datetime.timedelta(1)],
    "uuid": uuid.UUID(int=5),
    "zone": zoneinfo.ZoneInfo("UTC"),
    "random": [random.Random(1), random.getstate()],
    "numpy scalars": [np.float64(1), np.float32(1), np.bool_(1), np.str_("a"), np.datetime64("2026-01-01")],
    "numpy arrays": [np.ones(3), np.arange(3), np.array(["a"]), np.zeros(2, dtype="f4,i8")],
    "numpy objects": np.array([None, {}], dtype=object),
    "numpy generators": [np.random.default_rng(0), np.random.RandomState(0)],
    "cycle": _cycle(),
}


def load(data: bytes, names: tuple[str, ...] = ()) -> str | None:
    """The error of `torch.load(weights_only=True)` with some names allowed, each as the file spells it."""
    with torch.serialization.safe_globals([(_found(name), name) for name in names]):
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:
            return str(error)
    return None


def _found(dotted: str) -> Any:
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return functools.reduce(getattr, parts[end:], found)
    raise LookupError(dotted)


def verdict(data: bytes) -> Verdict:
    found = verdict_of(MemorySource(data), "m.pt")
    assert found is not None
    return found


def saved(value: object, protocol: int = 2, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    content = {"w": torch.ones(1), "x": value}
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", OBJECTS)
def test_a_file_loads_as_said_and_with_the_names_that_are_said(name: str, legacy: bool) -> None:
    for protocol in (2, 3, 4, 5):
        try:
            data = saved(OBJECTS[name], protocol, legacy=legacy)
        except pickle.PicklingError:
            continue  # a storage cannot be saved so
        found = verdict(data)
        assert found.loads == (load(data) is None), (protocol, found)
        assert (not found.problem) == (load(data, found.safe_globals) is None), (protocol, found)
        if not found.problem:
            for left in found.safe_globals:
                rest = tuple(each for each in found.safe_globals if each != left)
                assert load(data, rest) is not None, (protocol, left)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_is_refused_as_an_archive() -> None:
    data = (SAMPLES / "script.pt").read_bytes()
    assert "TorchScript" in verdict(data).problem
    assert "TorchScript" in (load(data) or "")


def test_a_tar_of_torch_is_refused() -> None:
    assert ".tar" in verdict((SAMPLES / "old.tar").read_bytes()).problem
    with pytest.raises(RuntimeError, match=r"\.tar"):
        torch.load(SAMPLES / "old.tar", weights_only=True)


def test_a_plain_pickle_is_no_file_of_torch_save() -> None:
    data = pickle.dumps({"a": 1}, 2)
    assert "plain pickle" in verdict(data).problem
    assert load(data) is not None


def test_names_of_os_are_refused_whatever_is_allowed(tmp_path: Path) -> None:
    write(tmp_path / "m.pt", pickled({"w": call("posix.getcwd")}))
    data = (tmp_path / "m.pt").read_bytes()
    assert "posix" in verdict(data).problem
    assert "blocked" in (load(data, ("posix.getcwd",)) or "")


@pytest.mark.parametrize("command", ["scan", "check"])
def test_the_answer_is_a_line_of_the_table_and_a_field_of_the_json(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(saved(argparse.Namespace(a=1)))
    text = ckpt(command, "-f", "table", str(path)).out
    assert text.count("weights_only") == 1
    assert "torch.load(weights_only=True) needs torch.serialization.add_safe_globals([argparse.Namespace])" in text
    answer = json.loads(ckpt(command, "--json", str(path)).out)["weights_only"]
    assert answer == {"loads": False, "safe_globals": ["argparse.Namespace"], "dangerous": [], "problems": []}


@pytest.mark.parametrize("command", ["scan", "check"])
def test_what_torch_load_has_nothing_to_do_with_gets_no_answer(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert json.loads(ckpt(command, "--json", str(tmp_path / "a.npz")).out)["weights_only"] is None
    assert "weights_only" not in ckpt(command, "-f", "table", str(tmp_path / "a.npz")).out


def test_nobody_is_advised_to_allow_a_name_that_runs_code(tmp_path: Path, ckpt: Ckpt) -> None:
    write(tmp_path / "m.pt", pickled({"w": call("builtins.eval", "1")}))
    text = ckpt("scan", "-f", "table", str(tmp_path / "m.pt")).out
    assert "add_safe_globals" not in text
    assert "refuses it: it would need builtins.eval, which nobody should allow" in text


def test_every_file_of_a_folder_counts(tmp_path: Path, ckpt: Ckpt) -> None:
    for number, value in enumerate((1, Colour.RED, collections.deque([1]))):
        (tmp_path / f"{number}.pt").write_bytes(saved(value))
    answer = json.loads(ckpt("scan", "--json", str(tmp_path)).out)["weights_only"]
    assert not answer["loads"]
    assert [problem["where"] for problem in answer["problems"]] == ["2.pt"]
    by_name = ["builtins.getattr"] if b"getattr" in pickle.dumps(Colour.RED) else []  # Python 3.11.0 to 3.11.3
    assert answer["safe_globals"] == [*by_name, f"{__name__}.Colour", "collections.deque"]


def test_check_asks_once_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = RestrictedUnpickler.load

    def counted(machine: RestrictedUnpickler, pos: int) -> str:
        asked.append(pos)
        return load(machine, pos)

    monkeypatch.setattr(RestrictedUnpickler, "load", counted)
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    assert check(str(tmp_path / "m.pt")).weights_only.loads
    assert asked == [0]
    assert scan(str(tmp_path / "m.pt")).weights_only.loads
    assert asked == [0, 0]
