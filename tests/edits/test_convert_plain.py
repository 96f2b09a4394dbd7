"""`ckpt convert --plain` makes objects plain values: torch's weights_only loader takes the file, and they are equal."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import pathlib
import pickle
import types
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from builders.pickles import Ops, call, named, ordered_dict, pickled, raw_string, value
from builders.pt import write
from conftest import Ckpt

SAMPLES = Path(__file__).parent.parent / "samples"


class Colour(enum.Enum):
    """Pickled by its value, by every version of Python."""

    RED = 1
    PAIR = (1, "b")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.value,)


class Named(enum.Enum):
    """Pickled by its name, as Python 3.11.0 to 3.11.3 does all."""

    RED = 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (type(self), self.name)


class Level(enum.IntEnum):
    LOW = 3

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (int(self),)


class Bag(dict):  # type: ignore[type-arg]  # any dict
    pass


class Attributes(dict):  # type: ignore[type-arg]  # any dict
    """A dict whose keys are attributes too, as many packages for configs have them."""

    def __init__(self, **items: object) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Ordered(collections.OrderedDict):  # type: ignore[type-arg]  # any dict
    pass


class Row(list):  # type: ignore[type-arg]  # any list
    pass


class Point(NamedTuple):
    x: int
    y: object


class Name(str):
    pass


class Sub(torch.Tensor):
    pass


class Thing:
    def __init__(self) -> None:
        self.weight = torch.ones(2)


WHEN = datetime.datetime(2026, 11, 29, 3, 4, 5, 6)
VALUES: dict[str, tuple[object, object]] = {
    "float64": (np.float64(1.5), 1.5),
    "float32": (np.float32(0.1), float(np.float32(0.1))),
    "float16": (np.float16(0.1), float(np.float16(0.1))),
    "int64": (np.int64(-5), -5),
    "uint8": (np.uint8(5), 5),
    "bool": (np.bool_(True), True),
    "str": (np.str_("é"), "é"),
    "complex": (np.complex64(1 + 2j), 1 + 2j),
    "dtype": (np.dtype("f4"), "float32"),
    "objects": (np.array([[1, None], [{"a": np.float64(2)}, "x"]], dtype=object), [[1, None], [{"a": 2.0}, "x"]]),
    "texts": (np.array([["a", "bc"], ["", "é"]]), [["a", "bc"], ["", "é"]]),
    "path": (pathlib.PurePosixPath("/a/b"), "/a/b"),
    "here": (pathlib.Path("a"), "a"),
    "windows": (pathlib.PureWindowsPath("c:\\x"), "c:\\x"),
    "enum": (Colour.RED, 1),
    "enum by name": (Named.RED, "RED"),
    "enum of a tuple": (Colour.PAIR, (1, "b")),
    "int enum": (Level.LOW, 3),
    "namespace": (
        argparse.Namespace(lr=0.1, inner=types.SimpleNamespace(a=[Colour.RED])),
        {"lr": 0.1, "inner": {"a": [1]}},
    ),
    "dict subclass": (Bag(a=Bag(b=1)), {"a": {"b": 1}}),
    "attributes": (Attributes(a=1), {"a": 1}),
    "OrderedDict subclass": (Ordered(a=1), {"a": 1}),
    "list subclass": (Row([1, Row([2])]), [1, [2]]),
    "defaultdict": (collections.defaultdict(list, {1: [2]}), {1: [2]}),
    "deque": (collections.deque([1, 2]), [1, 2]),
    "named tuple": (Point(1, Colour.RED), (1, 1)),
    "text subclass": (Name("a"), "a"),
    "set": ({1, "a"}, {1, "a"}),
    "frozenset": (frozenset([1]), {1}),
    "bytes": ([b"", b"\x00\xffabc", b"x" * 70_000], [b"", b"\x00\xffabc", b"x" * 70_000]),
    "bytearray": (bytearray(b"\xff"), bytearray(b"\xff")),
    "counter": (collections.Counter("aab"), collections.Counter("aab")),
    "datetime": (WHEN, "2026-11-29T03:04:05.000006"),
    "zone": (WHEN.replace(tzinfo=datetime.timezone.utc), "2026-11-29T03:04:05.000006+00:00"),
    "date": ([WHEN.date(), WHEN.time()], ["2026-11-29", "03:04:05.000006"]),
    "timedelta": (datetime.timedelta(1, 2), 86402.0),
    "decimal": (decimal.Decimal("1.10"), "1.10"),
    "fraction": (fractions.Fraction(1, 3), "1/3"),
    "uuid": (uuid.UUID(int=5), str(uuid.UUID(int=5))),
    "keys": (
        {Colour.RED: 1, np.int64(3): 2, (1, pathlib.PurePosixPath("x")): 3, b"k": 4},
        {1: 1, 3: 2, (1, "x"): 3, b"k": 4},
    ),
    "plain": ({"a": [1, 2.5, None, True, "é", 10**40, (1, (2,))]}, {"a": [1, 2.5, None, True, "é", 10**40, (1, (2,))]}),
    "torch": ([torch.float16, torch.Size([2])], [torch.float16, torch.Size([2])]),
}


def saved(value: object, protocol: int = 2, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def converted(ckpt: Ckpt, here: Path, content: bytes, *options: str) -> tuple[Any, dict[str, Any]]:
    """What torch's weights_only loader makes of the plain file, and the report."""
    (here / "m.pt").write_bytes(content)
    answer = ckpt("convert", "--plain", "--force", "--json", *options, "m.pt", "out.pt")
    assert answer.code == 0, answer.err
    return torch.load(here / "out.pt", weights_only=True), json.loads(answer.out)


@pytest.mark.parametrize(("protocol", "legacy"), [(2, False), (2, True), (4, False)])
def test_every_value_becomes_its_plain_one(here: Path, ckpt: Ckpt, protocol: int, legacy: bool) -> None:
    state = {"w": torch.ones(2), **{name: value for name, (value, _) in VALUES.items()}}
    loaded, report = converted(ckpt, here, saved(state, protocol, legacy=legacy))
    assert loaded["w"].tolist() == [1, 1]
    for name, (_, plain) in VALUES.items():
        assert loaded[name] == plain, name
        assert _types(loaded[name]) == _types(plain), name
    changed = {each["name"].partition(".")[0] for each in report["plain"]}
    assert changed == set(VALUES) - {"set", "bytes", "bytearray", "counter", "plain", "torch"}


def _types(value: object) -> object:
    if isinstance(value, dict):
        return type(value), [(_types(key), _types(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [_types(item) for item in value]
    return type(value)


ARRAYS = {
    "rows": np.arange(6).reshape(2, 3),
    "columns": np.arange(6.0).reshape(2, 3).T,
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "swapped": np.arange(3, dtype=">f4"),
    "one": np.array(3.5),
    "none": np.zeros((0, 3)),
    "uint16": np.array([1], dtype=np.uint16),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "half": np.ones(5000, dtype=np.float16),
}


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_an_array_becomes_the_tensor_that_torch_makes_of_it(here: Path, ckpt: Ckpt, protocol: int) -> None:
    loaded, report = converted(ckpt, here, pickle.dumps(ARRAYS, protocol))
    for name, array in ARRAYS.items():
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        assert loaded[name].dtype is expected.dtype, name
        assert torch.equal(loaded[name], expected), name
    assert report["plain"] == [{"name": name, "was": "numpy.ndarray", "now": "tensor"} for name in ARRAYS]


def test_tensors_stay_as_they_are(here: Path, ckpt: Ckpt) -> None:
    base = torch.arange(6.0)
    module = torch.nn.Linear(2, 2)
    attribute = torch.ones(2)
    attribute.note = np.float64(2)  # type: ignore[attr-defined]  # a new attribute
    state = {
        "base": base,
        "view": base[2:4],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "state_dict": module.state_dict(),
        "sparse": torch.eye(2).to_sparse(),
        "sub": torch.ones(2).as_subclass(Sub),
        "attribute": attribute,
        "config": Bag(lr=np.float32(1)),
    }
    loaded, report = converted(ckpt, here, saved(state))
    assert loaded["view"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()
    assert torch.equal(loaded["view"], base[2:4])
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["state_dict"]._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]  # torch's own
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(2))
    assert type(loaded["sub"]) is torch.Tensor
    assert loaded["attribute"].note == 2.0
    assert {each["was"] for each in report["plain"]} == {
        f"{__name__}.Sub", f"{__name__}.Bag", "numpy.float64", "numpy.float32",
    }  # fmt: skip


def test_what_is_shared_and_cyclic_stays_so(here: Path, ckpt: Ckpt) -> None:
    row: list[object] = [np.float64(1)]
    row.append(row)
    bag = Bag(a=1)
    loaded, _ = converted(ckpt, here, saved({"row": row, "again": row, "one": bag, "two": bag}))
    assert loaded["row"][1] is loaded["row"] is loaded["again"]
    assert loaded["one"] is loaded["two"]


def test_a_plain_pickle_of_tensors_and_arrays_becomes_a_file_of_torch(here: Path, ckpt: Ckpt) -> None:
    base = torch.arange(4.0)
    state = {"base": base, "tied": base, "array": np.ones(3), "when": WHEN}
    for protocol in (1, 4):
        loaded, _ = converted(ckpt, here, pickle.dumps(state, protocol))
        assert torch.equal(loaded["base"], base)
        assert loaded["tied"].data_ptr() == loaded["base"].data_ptr()
        assert torch.equal(loaded["array"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_config_of_omegaconf_becomes_what_its_to_container_gives(here: Path, ckpt: Ckpt, protocol: int) -> None:
    loaded, report = converted(ckpt, here, (SAMPLES / f"omegaconf{protocol}.pkl").read_bytes())
    assert loaded["cfg"] == {
        "model": {
            "width": 8, "names": ["a", "b"], "lr": 0.1, "on": True, "none": None, "missing": "???",
            "ref": "${model.width}", "empty": {}, "list": [], "deep": [{"x": [1, [2]]}],
        },
        3: "int key",
    }  # fmt: skip
    assert loaded["list"] == [1, {"a": 2}]
    assert loaded["more"] == {"a": 1, "p": "a/b", "b": b"\x00\xff"}
    assert {"name": "cfg", "was": "omegaconf.dictconfig.DictConfig", "now": "dict"} in report["plain"]


def test_a_part_can_be_selected(here: Path, ckpt: Ckpt) -> None:
    state = {"hyper": argparse.Namespace(lr=np.float64(1), w=torch.ones(2)), "net": Thing()}
    loaded, _ = converted(ckpt, here, saved(state), "--select", "hyper")
    assert loaded["lr"] == 1.0
    assert loaded["w"].tolist() == [1, 1]


def test_what_changed_is_listed(here: Path, ckpt: Ckpt) -> None:
    (here / "m.pt").write_bytes(saved({"args": argparse.Namespace(a=np.float64(1))}))
    text = ckpt("convert", "--plain", "m.pt", "out.pt").err
    assert "made plain (2):\n    args: argparse.Namespace → dict\n    args.a: numpy.float64 → float\n" in text
    assert ckpt("convert", "--plain", "-n", "--force", "m.pt", "out.pt").err.count("→") == 2


REFUSED: dict[str, object] = {
    "module": torch.nn.Linear(2, 2),
    "partial": functools.partial(max, 1),
    "function": torch.nn.functional.gelu,
    "object": Thing(),
    "dates": np.array(["2026-11-29"], dtype="M8[D]"),
    "fields": np.zeros(2, dtype="f4,i8"),
    "range": range(3),
    "generator": np.random.default_rng(0),
    "type": int,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_plain_is_refused_by_its_place(here: Path, ckpt: Ckpt, name: str) -> None:
    (here / "m.pt").write_bytes(saved({"w": torch.ones(2), "a": [0, {"b": REFUSED[name]}]}))
    answer = ckpt("convert", "--plain", "m.pt", "out.pt")
    assert answer.code == 2
    assert answer.err.startswith("ckpt: m.pt: 'a.1.b"), answer.err
    assert answer.err.count("\n") == 2
    assert not (here / "out.pt").exists()


def test_keys_that_would_become_one_are_refused(here: Path, ckpt: Ckpt) -> None:
    (here / "m.pt").write_bytes(saved({"w": torch.ones(2), "a": {Colour.RED: 1, 1: 2}}))
    assert "several keys that would become one" in ckpt("convert", "--plain", "m.pt", "out.pt").err


def test_a_call_that_is_not_data_is_refused_and_not_run(here: Path, ckpt: Ckpt) -> None:
    write(here / "m.pt", pickled({"w": call("os.system", "touch done")}))
    answer = ckpt("convert", "--plain", "m.pt", "out.pt")
    assert (answer.code, (here / "done").exists()) == (2, False)
    assert "os.system" in answer.err


@pytest.mark.parametrize(
    "options",
    [
        ("out.safetensors",),
        ("--dtype", "float16", "out.pt"),
        ("--tensors-only", "out.pt"),
        ("--shared", "clone", "out.pt"),
    ],
)
def test_it_goes_with_no_other_way_to_write_values(here: Path, ckpt: Ckpt, options: tuple[str, ...]) -> None:
    (here / "m.pt").write_bytes(saved({"w": torch.ones(2)}))
    answer = ckpt("convert", "--plain", "m.pt", *options)
    assert answer.code == 2
    assert "--plain" in answer.err


def test_a_deep_graph_is_walked_without_recursion(here: Path, ckpt: Ckpt) -> None:
    nested = b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 50_000 + b"K\x01" + b"a" * 50_000 + b"s."
    write(here / "m.pt", nested)
    answer = ckpt("convert", "--plain", "m.pt", "out.pt")
    assert answer.code in (0, 2)
    assert "bug" not in answer.err


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"ascii", "ascii"),
        ("caf\u00e9".encode(), "caf\u00e9"),
        (b"caf\xe9\r\n\t", "caf\u00e9\r\n\t"),
        (b"\xff\xfe\x00", b"\xff\xfe\x00"),
        (b"\x80\x02.", b"\x80\x02."),
        (b"", ""),
        (b"\xe9" * 5000, "\u00e9" * 5000),
    ],
)
def test_strings_of_python_2_become_text_where_they_can_be(
    tmp_path: Path, ckpt: Ckpt, raw: bytes, text: str | bytes
) -> None:
    at = (raw_string(b"storage"), named("torch.FloatStorage"), raw_string(b"0"), raw_string(b"cpu"), 2)
    view = call("torch._utils._rebuild_tensor_v2", Ops(value(at) + b"Q"), 0, (2,), (1,), False, ordered_dict())
    root = {raw_string(b"w"): view, "value": raw_string(raw), raw_string(raw + b"!"): [(raw_string(raw), "unicode")]}
    write(tmp_path / "old.pt", root, {"0": bytes(8)})
    with pytest.raises((pickle.UnpicklingError, UnicodeDecodeError)):
        torch.load(tmp_path / "old.pt", weights_only=True)
    assert ckpt("convert", "--plain", tmp_path / "old.pt", tmp_path / "new.pt").code == 0
    found = torch.load(tmp_path / "new.pt", weights_only=True)
    end = "!" if isinstance(text, str) else b"!"
    assert found["value"] == text
    assert found[text + end] == [(text, "unicode")]  # type: ignore[operator]  # both are of one kind
    assert found["w"].tolist() == [0, 0]


@pytest.mark.parametrize("depth", [7_000, 9_000])
def test_a_key_that_is_too_deep_a_tuple_is_refused(here: Path, ckpt: Ckpt, depth: int) -> None:
    write(here / "m.pt", b"\x80\x02}K\x00" + b"\x85" * depth + b"K\x01s.")
    answer = ckpt("convert", "--plain", "m.pt", "out.pt")
    assert answer.code == (0 if depth < 8_000 else 2), answer.err
    assert ("nest deeper than 8000" in answer.err) is (depth > 8_000)
