"""Objects whose state is not a dict of attributes: packed weights of quantized modules, and TorchScript's own classes.

Quantized modules keep their weights in objects of torch's C++ classes. Those are pickled by the state that they can be
packed from again, in TorchScript as `__torch__.torch.classes.quantized.LinearPackedParamsBase` with the state itself,
by torch.save as a `torch.ScriptObject` with the state and the name of the class. The parts of a state go by what
torch's `state_dict` calls them where it has them, else by their positions.

Sources: torch/ao/nn/quantized/modules/conv.py and torch/ao/nn/sparse/quantized/linear.py (`__getstate__`),
aten/src/ATen/native/quantized/cpu/fbgemm_utils.cpp (`register_linear_params`, `register_embedding_params`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckpt_cli.pickles.graph import Call, Dict, Global, callee

Part = tuple[str, object]
"""The name of a part below the object's, empty where it goes by the object's own, and the node."""

_SCRIPT = "__torch__."
_NATIVE = "__torch__.torch.classes."
"""The beginning of the names of C++ classes."""

_HELD = "torch.ScriptObject"
"""The class that torch.save gives objects of such classes: its state is a pair of the object's state and its class."""

_EMBEDDING = "EmbeddingPackedParamsBase"
"""A class whose one tensor the `state_dict` has under the object's own name."""

_MANGLED = r"\.___torch_mangle_\d+"

_CONV = r"torch\.(?:ao\.)?nn\.(?:intrinsic\.)?quantized\.(?:dynamic\.)?modules\.conv\w*\.Conv\w+"
_CONV_PARTS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
               "output_padding", "groups", "padding_mode", "weight", "bias", "scale", "zero_point",
               "training")  # fmt: skip

_SPARSE = r"torch\.(?:ao\.)?nn\.sparse\.quantized\.linear\.LinearPackedParams"
_SPARSE_PARTS = ("_packed_params", "training", "dtype")

_LONGEST = 1000
"""Characters of the name of such a class at most: names are compared once for every object."""

_NAMED = ((_CONV, _CONV_PARTS), (_SPARSE, _SPARSE_PARTS))
"""Modules that give a tuple as their state, and what they call the items."""


def packed_parts(node: Call) -> list[Part] | None:
    """Return the parts of a state that is not a dict; None for an object of any other kind."""
    found = _state_of(node)
    if found is None:
        return None
    qualified, state = found
    if not isinstance(state, tuple) or not state:
        return [("", state)]
    named = _names_of(qualified, len(state))
    if named is not None:
        return list(zip(named, state, strict=True))
    parts: list[Part] = [(str(index), part) for index, part in enumerate(state)]
    if qualified.endswith(_EMBEDDING) and len(state) > 1:
        tensors = _unwrapped(state[1])
        if isinstance(tensors, list) and len(tensors) == 1:
            parts[1] = ("", tensors[0])
    return parts


def has_parts(node: Call) -> bool:
    """True for an object that `packed_parts` gives the parts of."""
    return _state_of(node) is not None


def is_packed(node: object) -> bool:
    """True for an object of a C++ class of torch, or a quantized module that packs its weights into one itself."""
    found = _state_of(node) if isinstance(node, Call) else None
    if found is None:
        return False
    qualified, state = found
    return qualified.startswith(_NATIVE) or (isinstance(state, tuple) and _names_of(qualified, len(state)) is not None)


def _state_of(node: Call) -> tuple[str, object] | None:
    """The class of an object and its state, where that is not a dict."""
    states = node.states
    func = callee(node.func) if states and not isinstance(states[0], Dict) else None
    if not isinstance(func, Global) or len(func.module) + len(func.name) > _LONGEST:
        return None
    qualified, state = func.qualified, states[0]
    if qualified == _HELD:
        if type(state) is tuple and len(state) == 2 and isinstance(state[1], str):
            return str(state[1]), state[0]
        return None
    if qualified.startswith(_SCRIPT) or (type(state) is tuple and _names_of(qualified, len(state)) is not None):
        return qualified, state
    return None


def _names_of(qualified: str, count: int) -> Iterable[str] | None:
    """Return the names that a module has for the items of a state of `count` items."""
    if not any(len(names) == count for _, names in _NAMED):
        return None
    plain = re.sub(_MANGLED, "", qualified.removeprefix(_SCRIPT))
    return next((names for kind, names in _NAMED if len(names) == count and re.fullmatch(kind, plain)), None)


def _unwrapped(node: object) -> object:
    """The list that TorchScript wraps to say its type."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and node.args and not node.states:
        return node.args[0]
    return node
