"""Which entries the state_dict of a pickled module has: what `torch.nn.Module.state_dict` would put into it."""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.model import Checkpoint, Tensor
from ckpt_cli.pickles.arguments import text_of
from ckpt_cli.pickles.budget import Budget
from ckpt_cli.pickles.entries import Opener
from ckpt_cli.pickles.graph import Call, Graph, Set
from ckpt_cli.pickles.modules import Module, module_of

_ARCHIVES = ("torchscript", "pt2")
"""Formats that hold one module, whose entries tell parameters and buffers from what else it has."""

_UNSAVED = "_non_persistent_buffers_set"
"""The attribute of a module that names the buffers which its state_dict leaves out."""


def state_names(checkpoint: Checkpoint, prefix: str = "") -> list[str] | None:
    """The names, in a state_dict's order, of what the module at a prefix has in it; None where there is no module."""
    graph = checkpoint.document
    if checkpoint.format in _ARCHIVES:
        inside = f"{prefix}." if prefix else ""
        return [
            tensor.name
            for tensor in checkpoint.tensors
            if tensor.kind in ("parameter", "buffer") and tensor.name.startswith(inside)
        ]
    if not isinstance(graph, Graph):
        return None
    opener = Opener(Budget(graph.nbytes))
    module = module_of(node_at(graph.root, prefix, opener), opener)
    if module is None or module.scripted:
        return None
    known = {entry.name for entry in checkpoint.entries if isinstance(entry, Tensor)}
    names = _names(module, f"{prefix}." if prefix else "", opener)
    return [name for name in dict.fromkeys(names) if name in known]


def node_at(root: object, prefix: str, opener: Opener) -> object:
    """The node that a dotted name leads to; None where it leads nowhere."""
    node, rest = root, prefix
    while rest:
        below = opener.children(node, "tensor") or ()
        found = next(((key, child) for key, child, _ in below if f"{rest}.".startswith(f"{key}.")), None)
        if found is None:
            return None
        node, rest = found[1], rest[len(found[0]) + 1 :]
    return node


def _names(module: Module, prefix: str, opener: Opener) -> Iterator[str]:
    """The names of a module's own tensors, then those of its modules, depth first."""
    stack = [(prefix, module, 0)]
    modules: dict[int, Module | None] = {}
    while stack:
        inside, current, depth = stack.pop()
        if depth > limits.NESTING:
            raise LimitError(f"its modules nest deeper than {limits.NESTING}")
        left_out = _texts(current.settings.get(_UNSAVED))
        for name in current.registered:
            opener.budget.name(inside + name)
            if name not in left_out:
                yield inside + name
        below = []
        for name, node in current.children.items():
            opener.budget.name(inside + name)
            if id(node) not in modules:
                modules[id(node)] = module_of(node, opener)
            child = modules[id(node)]
            if child is not None:
                below.append((f"{inside}{name}.", child, depth + 1))
        stack.extend(reversed(below))


def _texts(node: object) -> set[str | None]:
    """The strings in a set, which protocols below 4 have as a call with a list."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and node.args:
        node = node.args[0]
    items = node.items if isinstance(node, Set) else node if isinstance(node, list) else []
    return {text_of(item) for item in items}
