"""Pickles that are small and sound, but whose nodes are reached so often that walking over them never ends.

The memo makes a graph of what looks like a tree: two bytes refer to a list of a hundred thousand items once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builders.hostile_pickles import SCALE, SOUND, Case, deep, doubled
from builders.pickles import (
    Ops,
    built,
    call,
    filled,
    get,
    named,
    new,
    ordered_dict,
    parameter,
    pickled,
    put,
    raw_string,
    value,
)

_AGAIN = int(200_000 * SCALE)
"""How often the shared node is referred to."""

_LONG = int(50_000 * SCALE)
"""Items of the shared node."""

_OFTEN = "over and over"
_NAMES = "opens up to more than"


def _often(shared: Any, times: int = _AGAIN) -> bytes:
    """A list whose first item is shared by all its others."""
    return pickled(Ops(b"](" + put(0, shared) + b"h\0" * times + b")e"))  # the empty tuple: else all is one value


def _laughs(layers: int, wrap: Callable[[list[Ops]], Ops]) -> bytes:
    """Containers of ten references to the container before, so that a few lines make 10 ** layers."""
    pieces = put(0, wrap([SOUND]))
    for layer in range(layers):
        pieces = Ops(put(layer + 1, wrap([pieces, *[get(layer)] * 9])))
    return pickled(pieces)


def _as_list(items: list[Ops]) -> Ops:
    return value(items)


def _as_dict(items: list[Ops]) -> Ops:
    return value({f"k{place}": item for place, item in enumerate(items)})


def _as_ordered_dict(items: list[Ops]) -> Ops:
    return ordered_dict((f"k{place}", item) for place, item in enumerate(items))


def _as_object(items: list[Ops]) -> Ops:
    return built(new("a.B"), _as_dict(items))


def _as_wrapper(items: list[Ops]) -> Ops:
    """A tensor that is made of tensors, as subclasses are."""
    kind = named("a.Wrapper")
    args = (kind, named("torch.float32"), (4,), (1,), 0, named("torch.strided"), call("torch.device", "cpu"), False)
    func = named("torch._utils._rebuild_wrapper_subclass")
    return call("torch._tensor._rebuild_from_type_v2", func, kind, args, _as_dict(items))


def _module(parameters: dict[str, Any], **attributes: Any) -> Ops:
    """A torch.nn.Module."""
    state = {"_parameters": ordered_dict(parameters.items()), "_buffers": ordered_dict(), "_modules": ordered_dict()}
    return built(new("a.Module"), {**state, **attributes})


def _itself(times: int) -> bytes:
    """A dict all of whose values are the dict."""
    return pickled(Ops(b"}q\0(" + (value("k") + b"h\0") * times + b"u"))


def _long_names(levels: int) -> bytes:
    """Dicts within dicts under one long key: the innermost name has a copy of it for every level."""
    key = value("k" * 60_000)
    head = b"}(" + put(1, key)
    return pickled(Ops(head + b"}(h\1" * (levels - 1) + value(1) + b"u" * levels))


_WORDS = [f"w{n}" for n in range(_LONG)]
_WIDE_ARGUMENTS = Ops(b"(" + SOUND + b"\x88" + b"N" * _LONG + b"t")

WALKS: list[Case] = [
    ("laughing_lists", lambda: _laughs(9, _as_list), _NAMES),
    ("laughing_dicts", lambda: _laughs(9, _as_dict), _NAMES),
    ("laughing_ordered_dicts", lambda: _laughs(9, _as_ordered_dict), _NAMES),
    ("laughing_objects", lambda: _laughs(9, _as_object), _NAMES),
    ("laughing_wrappers", lambda: _laughs(9, _as_wrapper), _OFTEN),
    ("laughing_empty_tuples", lambda: pickled(value({"a": doubled()})), _NAMES),
    ("a_dict_that_is_all_its_values", lambda: _itself(_LONG), None),
    ("a_dict_that_is_all_of_200_000_values", lambda: _itself(_AGAIN), None),
    ("a_long_flat_list_shared", lambda: _often([0] * _LONG), _OFTEN),
    ("a_long_tuple_shared", lambda: _often(tuple([0] * _LONG)), _OFTEN),
    ("long_python_2_strings_shared", lambda: _often(raw_string(b"\xff" * 60_000)), _OFTEN),
    ("a_list_of_python_2_strings_shared", lambda: _often([raw_string(b"\xff")] * _LONG), _OFTEN),
    ("a_long_text_shared", lambda: _often("😀" * 15_000), _OFTEN),
    ("a_deep_tuple_shared_as_a_call", lambda: _often(call("a.b", deep(_AGAIN // 2))), _OFTEN),
    ("a_wide_call_shared", lambda: _often(call("a.b", *[tuple(range(9))] * 9)), _OFTEN),
    ("a_module_that_skips_all_shared", lambda: _often(_module(dict.fromkeys(_WORDS))), _OFTEN),
    ("a_module_of_private_attributes_shared",
     lambda: _often(_module({}, **{f"_{word}": 0 for word in _WORDS})), _OFTEN),
    ("an_object_of_many_states_shared", lambda: _often(Ops(new("a.B") + b"Nb" * _LONG)), _OFTEN),
    ("an_ordered_dict_of_a_long_list_shared",
     lambda: _often(call("collections.OrderedDict", [*[["k", 0]] * _LONG, 0])), _OFTEN),
    ("a_parameter_of_many_arguments_shared",
     lambda: _often(Ops(named("torch._utils._rebuild_parameter") + _WIDE_ARGUMENTS + b"R")), _NAMES),
    ("a_tensor_of_much_metadata_shared",
     lambda: _often(Ops(SOUND[:-2] + value(dict.fromkeys(_WORDS, True)) + b"tR")), f"has {_LONG} flags"),
    ("a_wrapper_of_many_attributes_shared",
     lambda: _often(_as_wrapper([value(0)] * _LONG)), _OFTEN),
    ("a_wrapper_of_many_tensors_shared", lambda: _often(_as_wrapper([put(1, SOUND), *[get(1)] * 1000])), _OFTEN),
    ("one_tensor_200_000_times", lambda: _often(SOUND), _NAMES),
    ("one_parameter_40_000_times", lambda: _often(parameter(SOUND), _AGAIN // 5), None),
    ("keys_of_calls", lambda: pickled(filled(Ops(b"}"), [(put(0, call("a.b", *range(9))), 0),
                                                         *[(get(0), 0)] * _LONG])), _OFTEN),
    ("one_key_50_000_times", lambda: pickled(filled(Ops(b"}"), [("k", SOUND)] * _LONG)), None),
    ("long_names", lambda: _long_names(900), "its names take more than"),
    ("long_names_that_fan_out", lambda: pickled({"k" * 60_000: {f"{n}": n for n in range(5_000)}}),
     "its names take more than"),
    ("wide_names_that_fan_out", lambda: pickled({"😀" + "k" * 15_000: {f"{n}": n for n in range(2_000)}}),
     "its names take more than"),
    ("a_tensor_of_sparse_tensors", lambda: pickled({"a": _sparse_of_sparse(30)}), "made of tensors"),
    ("a_sparse_tensor_of_itself", lambda: pickled({"a": _sparse_of_sparse(10)}), None),
]  # fmt: skip
"""Name, pickle, and a part of the error or None where it may open."""


def _sparse_of_sparse(levels: int) -> Ops:
    """A sparse tensor whose indices and values are the same sparse tensor, and so on: 2 ** levels tensors."""
    made = put(0, SOUND)
    for level in range(levels):
        parts = (made, get(level), call("torch.Size", (4,)), True)
        layout = call("torch.serialization._get_layout", "torch.sparse_coo")
        made = put(level + 1, call("torch._utils._rebuild_sparse_tensor", layout, parts))
    return made
