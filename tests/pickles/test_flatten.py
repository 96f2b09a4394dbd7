"""A graph flattened to names: what opens up, what is a leaf, and what every name and value is."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import (
    Ops,
    built,
    call,
    filled,
    get,
    named,
    new,
    ordered_dict,
    put,
    raw_string,
    tensor,
    value,
)
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Tensor, Value

pytestmark = pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")


class Colour(enum.Enum):
    """An enum."""

    RED = 1


class Meter:
    """An object with attributes."""

    def __init__(self) -> None:
        self.total, self.count, self.last = 3.5, 7, torch.ones(2)


class Slotted:
    """An object with slots."""

    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Net(nn.Module):
    """A module with everything that a module can have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.BatchNorm1d(3)
        self.second.weight = self.first.bias
        self.none = None
        self.register_parameter("absent", None)
        self.register_buffer("steps", torch.tensor(4), persistent=False)
        self.rate = 0.5
        self._hidden = 1
        self.table = {"a": torch.zeros(1)}


def of(folder: Path, item: Any) -> Checkpoint:
    """What torch saves of something, opened."""
    path = folder / "saved.pt"
    torch.save(item, path)
    return open_checkpoint(str(path))


def built_of(folder: Path, root: Any) -> Checkpoint:
    """What the builders make of something, opened; there is one storage of 64 bytes."""
    return open_checkpoint(str(pt.write(folder / "built.pt", root, {"0": bytes(64)})))


def values(checkpoint: Checkpoint) -> dict[str, object]:
    """Each entry's value, or the shape of one that is a tensor."""
    return {entry.name: entry.value if isinstance(entry, Value) else entry.shape for entry in checkpoint.entries}


T = tensor("0", (16,))
"""A tensor."""


def test_nested_containers_become_dotted_names(tmp_path: Path) -> None:
    item = {
        "model": collections.OrderedDict([("0.weight", torch.ones(2, 3)), ("0.bias", torch.ones(2))]),
        "pair": (torch.ones(1), {"deep": [torch.ones(4)]}),
        7: torch.ones(5),
        (1, 2): torch.ones(6),
        None: torch.ones(7),
        1.5: torch.ones(8),
        True: torch.ones(9),
        "": {"": torch.ones(10)},
        "epoch": 3,
    }
    assert values(of(tmp_path, item)) == {
        "model.0.weight": (2, 3), "model.0.bias": (2,), "pair.0": (1,), "pair.1.deep.0": (4,), "7": (5,),
        "(1, 2)": (6,), "None": (7,), "1.5": (8,), "True": (9,), "": (10,), "epoch": 3,
    }  # fmt: skip
    assert of(tmp_path, item).top_level == ["model", "pair", "7", "(1, 2)", "None", "1.5", "True", "", "epoch"]


def test_an_optimizer_state_is_named_as_its_keys_are(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.25)
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    found = values(of(tmp_path, {"optimizer": optimizer.state_dict()}))
    assert found["optimizer.state.0.exp_avg"] == (1, 2)
    assert found["optimizer.state.1.step"] == ()
    assert found["optimizer.param_groups.0.lr"] == 0.25
    assert found["optimizer.param_groups.0.betas"] == (0.9, 0.999)
    assert found["optimizer.param_groups.0.params"] == [0, 1]


def test_the_metadata_of_a_state_dict_is_no_entry(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(2).state_dict()
    assert hasattr(state, "_metadata")
    checkpoint = of(tmp_path, state)
    assert list(values(checkpoint)) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert checkpoint.objects == []


def test_a_root_that_is_no_mapping_has_its_own_names(tmp_path: Path) -> None:
    assert values(of(tmp_path, torch.ones(2))) == {"": (2,)}
    assert values(of(tmp_path, [torch.ones(2), 5])) == {"0": (2,), "1": 5}
    assert values(of(tmp_path, 5)) == {"": 5}
    assert values(of(tmp_path, None)) == {"": None}
    assert values(of(tmp_path, {})) == {"": {}}
    assert values(of(tmp_path, collections.OrderedDict())) == {"": Opaque("OrderedDict()")}
    assert of(tmp_path, torch.ones(2)).top_level == []


PLAIN: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": -7,
    "long": 1 << 200,
    "float": 0.5,
    "text": "naïve\n",
    "list": [1, 2.5, "a", None, False],
    "tuple": (1, "a"),
    "empty list": [],
    "empty tuple": (),
    "empty dict": {},
}


def test_plain_leaves_are_their_values(tmp_path: Path) -> None:
    assert values(of(tmp_path, PLAIN)) == PLAIN


OPAQUE: dict[str, tuple[Any, str]] = {
    "bytes": (b"\0a", "_codecs.encode('\\x00a', 'latin1')"),
    "set": ({1}, "__builtin__.set([1])"),
    "complex": (1 + 2j, "__builtin__.complex(1.0, 2.0)"),
    "class": (Meter, f"{__name__}.Meter"),
    "size": (torch.Size([2, 3]), "torch.Size((2, 3))"),
    "dtype": (torch.float16, "torch.float16"),
    "device": (torch.device("cuda", 1), "torch.device('cuda', 1)"),
    "partial": (functools.partial(max, 1),
                "functools.partial(__builtin__.max, (__builtin__.max, (1,), {}, None))"),
    "empty deque": (collections.deque(maxlen=4), "collections.deque((), 4)"),
    "deque": (collections.deque([1]), "collections.deque([1])"),
    "ordered": (collections.OrderedDict(), "OrderedDict()"),
    "counter": (collections.Counter("aab"), "collections.Counter({'a': 2, 'b': 1})"),
    "object": (object(), "__builtin__.object()"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPAQUE)
def test_other_leaves_are_told_by_their_text(name: str, tmp_path: Path) -> None:
    item, text = OPAQUE[name]
    assert values(of(tmp_path, {"x": item})) == {"x": Opaque(text)}


def test_an_enum_is_told_as_this_python_pickles_it(tmp_path: Path) -> None:
    (told,) = values(of(tmp_path, {"x": Colour.RED})).values()
    by_value, by_name = f"{__name__}.Colour(1)", f"__builtin__.getattr({__name__}.Colour, 'RED')"  # 3.11.0 to 3.11.3
    assert told in (Opaque(by_value), Opaque(by_name))


def test_a_numpy_array_is_a_leaf(tmp_path: Path) -> None:
    found = of(tmp_path, {"array": np.ones(3), "scalar": np.float32(1), "objects": np.array([None])}).entries
    assert [entry.name for entry in found] == ["array", "scalar", "objects"]
    assert isinstance(found[0], Tensor)
    assert found[1:] == [Value("scalar", 1.0), Value("objects", Opaque("numpy.ndarray(shape=(1,), dtype=object)"))]


def test_mappings_and_objects_open_up(tmp_path: Path) -> None:
    item = {
        "default": collections.defaultdict(list, a=torch.ones(1)),
        "slots": Slotted(),
        "namespace": argparse.Namespace(lr=0.1, data="imagenet", layers=[4, 8]),
        "meter": Meter(),
        "deque": collections.deque([torch.ones(2), 3]),
    }
    assert values(of(tmp_path, item)) == {
        "default.a": (1,), "slots.a": 1, "namespace.lr": 0.1, "namespace.data": "imagenet",
        "namespace.layers": [4, 8], "meter.total": 3.5, "meter.count": 7, "meter.last": (2,), "deque.0": (2,),
        "deque.1": 3,
    }  # fmt: skip


def test_a_whole_module_has_the_names_and_kinds_of_its_state_dict(tmp_path: Path) -> None:
    net = Net()
    checkpoint = of(tmp_path, {"net": net})
    found = {tensor.name: tensor for tensor in checkpoint.tensors}
    expected = {f"net.{name}": "parameter" for name, _ in net.named_parameters(remove_duplicate=False)}
    expected |= {f"net.{name}": "buffer" for name, _ in net.named_buffers()}
    assert {name: found[name].kind for name in expected} == expected
    assert set(found) - set(expected) == {"net.table.a"}
    assert found["net.second.weight"].view == found["net.first.bias"].view
    others = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert others["net.rate"] == 0.5
    assert others["net.training"] is True
    assert others["net.first.in_features"] == 2
    assert "net.none" in others
    assert not any("_hidden" in name or "absent" in name for name in others)
    assert {f"{__name__}.Net", "torch.nn.modules.linear.Linear"} <= set(checkpoint.objects)


def test_a_container_that_is_shared_is_listed_under_each_name(tmp_path: Path) -> None:
    shared = {"a": torch.ones(2), "n": 1}
    checkpoint = of(tmp_path, {"x": shared, "y": [shared, shared]})
    assert values(checkpoint) == {
        "x.a": (2,), "x.n": 1, "y.0.a": (2,), "y.0.n": 1, "y.1.a": (2,), "y.1.n": 1,
    }  # fmt: skip
    assert len({tensor.storage for tensor in checkpoint.tensors}) == 1


def test_a_container_within_itself_is_told_and_not_followed(tmp_path: Path) -> None:
    root: dict[str, Any] = {"a": torch.ones(2), "list": []}
    root["list"].extend([root, root["list"], 1])
    meter = Meter()
    meter.last = meter  # type: ignore[assignment]
    root["meter"] = meter
    again = Opaque("<the same object again>")
    assert values(of(tmp_path, root)) == {
        "a": (2,), "list.0": again, "list.1": again, "list.2": 1, "meter.total": 3.5, "meter.count": 7,
        "meter.last": again,
    }  # fmt: skip


def test_empty_keys_add_no_dot(tmp_path: Path) -> None:
    assert values(built_of(tmp_path, {"": T, "a": {"": T}, "b": {"": {"c": T}}})) == {
        "": (16,), "a": (16,), "b.c": (16,),
    }  # fmt: skip


def test_one_name_may_stand_twice(tmp_path: Path) -> None:
    twice = filled(Ops(b"}"), [("a", 1), ("a", 2), ("b.c", 3), ("b", {"c": 4})])
    entries = built_of(tmp_path, twice).entries
    assert [(entry.name, entry.value) for entry in entries if isinstance(entry, Value)] == [
        ("a", 1), ("a", 2), ("b.c", 3), ("b.c", 4),
    ]  # fmt: skip


def test_python_2_strings_are_text(tmp_path: Path) -> None:
    root = {raw_string(b"k\xc3\xa9y"): raw_string(b"caf\xe9"), "list": [raw_string(b"a"), 1],
            "tuple": (raw_string(b"b"),), "tensor": {raw_string(b"t"): T}}  # fmt: skip
    assert values(built_of(tmp_path, root)) == {"kéy": "café", "list": ["a", 1], "tuple": ("b",), "tensor.t": (16,)}


def test_an_ordered_dict_of_pairs_opens_as_one(tmp_path: Path) -> None:
    """As Python 2 wrote it: `OrderedDict([[key, value], …])`."""
    pairs = call("collections.OrderedDict", [["a", T], ("b", 1)])
    assert values(built_of(tmp_path, {"x": pairs})) == {"x.a": (16,), "x.b": 1}
    for odd in (call("collections.OrderedDict", [["a"]]), call("collections.OrderedDict", 5)):
        assert values(built_of(tmp_path, {"x": odd})) == {"x": Opaque("OrderedDict()")}


def test_an_object_with_items_and_attributes_opens_to_its_items(tmp_path: Path) -> None:
    kind = built(filled(new("lab.Dict"), [("a", T)]), {"extra": 1})
    assert values(built_of(tmp_path, {"x": kind})) == {"x.a": (16,)}


def test_attributes_and_slots_are_listed_together(tmp_path: Path) -> None:
    kind = built(new("lab.Slotted"), ({"a": 1}, {"b": T}))
    assert values(built_of(tmp_path, {"x": kind})) == {"x.a": 1, "x.b": (16,)}
    for state in (1, 2), ({"a": 1}, {"b": 1}, 3):
        (entry,) = built_of(tmp_path, {"x": built(new("lab.Odd"), state)}).entries
        assert isinstance(entry, Value)


def test_a_module_pickled_by_python_2_is_known_by_its_attributes(tmp_path: Path) -> None:
    groups = [(raw_string(b"_parameters"), ordered_dict([(raw_string(b"w"), T)])),
              (raw_string(b"_buffers"), ordered_dict([("b", T), ("none", None)])),
              (raw_string(b"_modules"), ordered_dict())]  # fmt: skip
    made = built(new("lab.Net"), filled(Ops(b"}"), [*groups, (raw_string(b"rate"), 1)]))
    checkpoint = built_of(tmp_path, made)
    assert values(checkpoint) == {"w": (16,), "b": (16,), "rate": 1}
    assert [tensor.kind for tensor in checkpoint.tensors] == ["parameter", "buffer"]


def test_what_a_pickle_names_beyond_plain_tensors_is_listed_once(tmp_path: Path) -> None:
    root = {"a": T, "b": call("lab.made"), "c": [call("lab.made"), named("os.system"), named("torch.float8_e5m2")]}
    assert built_of(tmp_path, root).objects == ["lab.made", "os.system"]


NAMES = st.text(st.characters(codec="utf-8"), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("tensor")
TREES = st.recursive(
    LEAVES,
    lambda inner: st.dictionaries(NAMES | st.integers(), inner, max_size=4) | st.lists(inner, max_size=4),
    max_leaves=20,
)


def flattened(item: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The names and leaves of nested data, by recursion: the rule that the walk follows without it."""
    if isinstance(item, dict) and item:
        pairs = [(key if isinstance(key, str) else repr(key), below) for key, below in item.items()]
    elif isinstance(item, list) and any(isinstance(below, list | dict) or below == "tensor" for below in item):
        pairs = [(str(place), below) for place, below in enumerate(item)]
    else:
        return [(prefix, item)]
    found = []
    for key, below in pairs:
        found += flattened(below, f"{prefix}.{key}" if prefix and key else prefix or key)
    return found


def with_tensors(item: Any) -> Any:
    """The data as opcodes, with a tensor for each word `tensor`."""
    if isinstance(item, dict):
        return {key: with_tensors(below) for key, below in item.items()}
    if isinstance(item, list):
        return [with_tensors(below) for below in item]
    return T if item == "tensor" else item


@settings(max_examples=most(150), deadline=None)
@given(TREES)
def test_any_tree_flattens_as_its_rule_says(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    checkpoint = built_of(tmp_path_factory.getbasetemp(), with_tensors(tree))
    mine = [(e.name, "tensor" if isinstance(e, Tensor) else e.value) for e in checkpoint.entries]
    checkpoint.close()
    assert mine == flattened(tree)


# --- limits ----------------------------------------------------------------------------------------------------------

LAUGH = Ops(value([put(0, [T, T]), get(0), get(0), get(0)]))


@pytest.mark.parametrize(
    ("limit", "most", "root", "words"),
    [
        ("ENTRIES_FLOOR", -100, LAUGH, "opens up to more than"),
        ("NAME_BYTES", 20, {"a" * 21: 1}, "its names take more than 20 bytes"),
        ("NAME_BYTES", 20, {"é" * 6: 1}, "its names take more than 20 bytes"),
        ("NAME_BYTES", 20, {"a" * 15: {"b" * 15: 1}}, "its names take more than 20 bytes"),
        ("WALK_STEPS", 20, [T, *[1] * 20], "over and over"),
        ("WALK_STEPS", 20, {"a": call("b.c")}, "over and over"),
        ("NESTING", 3, [[[[[T]]]]], "its containers nest deeper than 3"),
    ],
)
def test_a_limit_of_the_walk_is_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, most: int, root: Any, words: str
) -> None:
    monkeypatch.setattr(limits, "WALK_STEPS_PER_BYTE", 0)
    monkeypatch.setattr(limits, limit, most)
    with pytest.raises(LimitError, match=words) as refused:
        built_of(tmp_path, root)
    assert refused.value.path == str(tmp_path / "built.pt")


def test_containers_may_nest_as_deep_as_the_limit(tmp_path: Path) -> None:
    root: Any = T
    for _ in range(limits.NESTING):
        root = Ops(b"(" + value(root) + b"t")
    assert [tensor.name for tensor in built_of(tmp_path, root).tensors] == [".".join("0" * limits.NESTING)]
