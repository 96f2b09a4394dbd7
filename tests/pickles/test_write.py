"""Graphs written as pickles again: byte for byte where CPython wrote them, and equal objects everywhere."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import operator
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.pickles import Ops, get, marked, named, pickled, put
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, RawString
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.write import write_pickle


class Color(enum.Enum):
    """An enum."""

    RED = 1


class Slotted:
    """An object without a dict."""

    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.a, self.b) == (other.a, other.b)

    __hash__ = None  # type: ignore[assignment]


class WithKeywords:
    """An object that is made with keywords."""

    def __new__(cls, *, a: int) -> WithKeywords:
        made = super().__new__(cls)
        made.a = a
        return made

    a: int

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"a": self.a}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithKeywords) and self.a == other.a

    __hash__ = None  # type: ignore[assignment]


class Outer:
    """A class with a class in it."""

    class Inner(argparse.Namespace):
        """That class."""


class Listed(list[Any]):
    """A list with attributes."""


def listed() -> Listed:
    """One of these."""
    made = Listed([1, 2, 3])
    made.note = "x"
    return made


OBJECTS: dict[str, Any] = {
    "none": None,
    "integers": [0, 1, 255, 256, 65535, 65536, -1, -128, -129, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63,
                 -(2**63), 2**2039, 2**2040, -(2**2039), -(2**2040), True, False],
    "floats": [0.0, -0.0, 1.5, float("inf"), float("nan")],
    "strings": ["", "a", "é", "\ud800", "a" * 300, "long" * 20_000, "a", ""],
    "bytes": [b"", b"a", b"\xff" * 255, b"\xff" * 256, b"long" * 20_000],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "lists": [[], [1], list(range(999)), list(range(1000)), list(range(1001)), list(range(2000)), list(range(2001))],
    "dicts": [{}, {1: 2}, *({i: str(i) for i in range(n)} for n in (2, 999, 1000, 1001, 2000, 2001))],
    "ordered": [collections.OrderedDict((i, i) for i in range(n)) for n in (0, 1, 2, 1000, 1001, 2000)],
    "default": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("hello"),
    "deque": collections.deque([1, 2, 3], maxlen=5),
    "sets": [set(), {1}, frozenset(), frozenset([1, 2])],
    "namespace": argparse.Namespace(lr=0.1, layers=[1, 2]),
    "enum": [Color.RED, Color.RED],
    "slots": Slotted(),
    "keywords": WithKeywords(a=3),
    "nested class": Outer.Inner(a=1),
    "list with attributes": listed(),
    "partial": functools.partial(int, base=2),
    "function": operator.add,
    "class": collections.OrderedDict,
    "complex": 1 + 2j,
    "numpy": [np.arange(5), np.float32(2), np.zeros((2, 3), order="F"), np.array(["a", "bc"])],
    "bytearray": bytearray(b"abc" * 10),
    "path": Path("a/b"),
}  # fmt: skip
"""What checkpoints hold beside tensors, and what they do not."""


def again(data: bytes) -> bytes:
    """A pickle read and written, and found the same as a graph."""
    graph = read_pickle(data)
    out = bytearray()
    write_pickle(graph.root, data, out.extend)
    reread = read_pickle(bytes(out))
    assert reread.nbytes == len(out)
    assert same_graphs(graph.root, data, reread.root, bytes(out))
    return bytes(out)


def saved(value: Any) -> bytes:
    """The pickle that torch.save writes of an object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def same(one: Any, other: Any) -> bool:
    """Equal, NaN and arrays too."""
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.flags.f_contiguous == other.flags.f_contiguous
            and bool((one == other).all())
        )
    if isinstance(one, list):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, functools.partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return type(one) is type(other) and (one == other or (one != one and other != other))


CASES = [
    (name, protocol)
    for name in OBJECTS
    for protocol in range(6)
    if protocol >= {"slots": 2}.get(name, 0)  # which CPython refuses below
]


@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_what_cpython_pickles_loads_equal_after_it_is_written_again(name: str, protocol: int) -> None:
    data = pickle.dumps(OBJECTS[name], protocol)
    found = again(data)
    assert same(pickle.loads(found), OBJECTS[name])
    assert again(found) == found


@pytest.mark.parametrize("name", OBJECTS)
def test_what_cpython_writes_in_protocol_2_comes_out_byte_for_byte(name: str) -> None:
    data = pickle.dumps(OBJECTS[name], 2)
    assert again(data) == data


def shared() -> dict[str, Any]:
    """Objects that hold themselves and each other, of every kind that can."""
    items: list[Any] = [1]
    items.append(items)
    pairs: dict[str, Any] = {}
    pairs["self"] = pairs
    both = ([],)
    both[0].append(both)
    namespace = argparse.Namespace()
    namespace.me = [namespace, items]
    ordered: collections.OrderedDict[str, Any] = collections.OrderedDict()
    ordered["self"] = ordered
    five = ([], 1, 2, 3, 4)
    five[0].append(five)
    return {"items": items, "pairs": pairs, "both": both, "namespace": namespace, "ordered": ordered, "five": five,
            "again": [items, pairs]}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_objects_that_hold_themselves_still_do(protocol: int) -> None:
    found = pickle.loads(again(pickle.dumps(shared(), protocol)))
    assert found["items"][1] is found["items"]
    assert found["pairs"]["self"] is found["pairs"]
    assert found["both"][0][0] is found["both"]
    assert found["namespace"].me[0] is found["namespace"]
    assert found["namespace"].me[1] is found["items"]
    assert found["ordered"]["self"] is found["ordered"]
    assert found["five"][0][0] is found["five"]
    assert found["again"][1] is found["pairs"]


def models() -> dict[str, Any]:
    """What torch.save is given."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(4, 4)
    net = torch.nn.Sequential(shared, torch.nn.ReLU(), shared, torch.nn.BatchNorm1d(4), torch.nn.LSTM(4, 3))
    parameters = list(net[:4].parameters())
    adam = torch.optim.Adam(parameters)
    net[:4](torch.randn(3, 4)).sum().backward()
    adam.step()
    many = {f"layers.{number}.weight": torch.zeros(1) for number in range(1001)}
    return {
        "state_dict": net.state_dict(),
        "module": net,
        "training": {
            "model": net.state_dict(),
            "optimizer": adam.state_dict(),
            "epoch": 3,
            "args": argparse.Namespace(a=1),
        },
        "many": many,
        "many ordered": collections.OrderedDict(many),
        "sparse": torch.eye(3).to_sparse(),
        "float8": torch.zeros(3).to(torch.float8_e4m3fn),
        "complex": torch.zeros(2, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "dtypes": [torch.float32, torch.int8, torch.Size([1, 2]), torch.device("cpu")],
        "meta": torch.empty(2, device="meta"),
    }


@pytest.mark.parametrize("name", models())
def test_what_torch_saves_comes_out_byte_for_byte(name: str) -> None:
    data = saved(models()[name])
    assert again(data) == data


def test_a_pickle_of_protocol_4_becomes_one_that_weights_only_takes() -> None:
    data = pickle.dumps({"a": [1, (2, 3)], "b": collections.OrderedDict(x=1.5)}, 4)
    found = again(data)
    assert found[:2] == b"\x80\2"
    assert {op.proto for op, *_ in pickletools.genops(found)} <= {0, 1, 2}


def test_only_what_needs_a_newer_protocol_gets_one() -> None:
    wanted = {"bytes": (b"x", 3), "set": ({1}, 4), "bytearray": (bytearray(b"x"), 5), "dotted": (Outer.Inner(a=1), 4)}
    for value, protocol in wanted.values():
        assert again(pickle.dumps(value, 5))[1] == protocol


def test_python_2_strings_persistent_ids_and_old_instances_are_kept() -> None:
    raw = Ops(b"U\3a\xffb")
    old = Ops(marked(b"", [named("copy_reg.Old"), 1, raw]) + b"o")
    inst = Ops(b"(K\1i__main__\nOld\n")
    data = pickled(
        [put(0, raw), get(0), old, inst, Ops(b"X\1\0\0\0aQ"), Ops(b"\x82\7"), Ops(b"\x83\0\1"), Ops(b"\x84\0\0\1\0")]
    )
    root: Any = read_pickle(again(data)).root
    assert root[0] is root[1]
    assert isinstance(root[0], RawString)
    assert root[0].raw == b"a\xffb"
    assert [type(item) for item in root[2:5]] == [Call, Call, PersistentId]


def test_a_call_that_its_own_arguments_hold_is_made_once() -> None:
    """As pickle.py does: when the arguments turn out to have made it, they are dropped and it is fetched."""
    items: list[Any] = []
    node = Call("reduce", Global("builtins", "tuple"), (items,))
    items.append(node)
    out = bytearray()
    write_pickle(node, b"", out.extend)
    found: Any = read_pickle(bytes(out)).root
    assert found.args[0][0] is found


def test_a_graph_of_any_depth_is_written_and_compared_without_recursion() -> None:
    root: Any = []
    for _ in range(100_000):
        root = [(root,)]
    out = bytearray()
    write_pickle(root, b"", out.extend)
    reread = read_pickle(bytes(out)).root
    assert same_graphs(root, b"", reread, bytes(out))


def test_shared_tuples_do_not_multiply() -> None:
    root: Any = (1, 2)
    for _ in range(60):
        root = (root, root)
    out = bytearray()
    write_pickle(root, b"", out.extend)
    assert len(out) < 1000
    assert same_graphs(root, b"", read_pickle(bytes(out)).root, bytes(out))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, True), (1, 1.0), (0.0, -0.0), ("a", "b"), ("a", b"a"), ([1], (1,)), ([1], [1, 2]), ({1: 2}, {1: 3}),
        ({1: 2, 3: 4}, {3: 4, 1: 2}), (len, abs), ("x" * 70_000, "x" * 69_999 + "y"), ("x" * 70_000, "x" * 70_001),
        (argparse.Namespace(a=1), argparse.Namespace(b=1)), ({1}, frozenset([1])), (None, False),
        (bytearray(b"a"), bytearray(b"b")), (collections.OrderedDict(a=1), collections.OrderedDict(a=1, b=2)),
    ],
)  # fmt: skip
def test_what_differs_is_not_the_same(one: Any, other: Any) -> None:
    a, b = pickle.dumps([one], 5), pickle.dumps([other], 5)
    assert not same_graphs(read_pickle(a).root, a, read_pickle(b).root, b)
    assert same_graphs(read_pickle(a).root, a, read_pickle(a).root, a)


def test_equal_objects_are_not_the_same_as_one_object() -> None:
    item: list[int] = []
    shared, apart = pickle.dumps([item, item]), pickle.dumps([[], []])
    for a, b in ((shared, apart), (apart, shared)):
        assert not same_graphs(read_pickle(a).root, a, read_pickle(b).root, b)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda below: st.lists(below) | st.tuples(below, below) | st.dictionaries(st.text() | st.integers(), below),
    max_leaves=30,
)


@settings(max_examples=most(300), deadline=None)
@given(values, st.integers(0, 5))
def test_writing_what_was_read_is_an_involution(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found = again(data)
    assert pickle.loads(found) == value
    if protocol == 2:
        assert found == data


def test_a_dict_in_the_graph_can_be_changed_and_written() -> None:
    data = saved({"a": 1, "b": [2]})
    graph = read_pickle(data)
    assert isinstance(graph.root, Dict)
    graph.root.pairs[0] = "renamed"
    out = bytearray()
    write_pickle(graph.root, data, out.extend)
    assert pickle.loads(bytes(out)) == {"renamed": 1, "b": [2]}
