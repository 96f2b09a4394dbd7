"""The entries in the state_dict of a pickled module, as `torch.nn.Module.state_dict` would give them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.graph import Call, Graph, Set
from ckpt_cli.pickles.nn_module import Module, module_of
from ckpt_cli.pickles.packed import is_packed
from ckpt_cli.pickles.tensors.arguments import text_of

_ARCHIVES = ("torchscript", "pt2")
"""Formats that hold one module, whose entries separate parameters and buffers from other attributes."""

_UNSAVED = "_non_persistent_buffers_set"
"""The attribute of a module that names the buffers which its state_dict leaves out."""


def state_names(checkpoint: Checkpoint, prefix: str = "") -> list[str] | None:
    """Return the names of a module's state_dict, in its order; None where the prefix is not a module."""
    graph = checkpoint.document
    if checkpoint.format in _ARCHIVES:
        inside = f"{prefix}." if prefix else ""
        listed = [
            tensor.name
            for tensor in checkpoint.tensors
            if tensor.kind in ("parameter", "buffer") and tensor.name.startswith(inside)
        ]
        return listed or None  # of a frozen module the weights are constants of its code
    if not isinstance(graph, Graph):
        return None
    opener = Containers(WalkBudget(graph.nbytes))
    module = module_of(node_at(graph.root, prefix, opener), opener)
    if module is None or module.scripted:
        return None
    known = {entry.name for entry in checkpoint.entries if isinstance(entry, Tensor)}
    packed = _Packed(known)
    names = _names(module, f"{prefix}." if prefix else "", opener, packed)
    return [name for name in dict.fromkeys(names) if name in known]


class _Packed:
    """The tensors of packed weights, which a state_dict has though no module has registered them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names
        self._sorted: list[str] | None = None

    def among(self, inside: str, attributes: Mapping[str, object]) -> Iterator[str]:
        """The names of the tensors of those attributes that are packed weights."""
        for name, node in attributes.items():
            if is_packed(node):
                yield from self.below(inside + name)

    def below(self, name: str) -> Iterator[str]:
        """The names of the tensors that the object of a name holds, or of its only one."""
        if self._sorted is None:
            self._sorted = sorted(self._names)
        yield name
        for place in range(bisect_left(self._sorted, f"{name}."), len(self._sorted)):
            if not self._sorted[place].startswith(f"{name}."):
                return
            yield self._sorted[place]


def node_at(root: object, prefix: str, opener: Containers) -> object:
    """The node that a dotted name leads to; None where it leads nowhere."""
    node, rest = root, prefix
    while rest:
        below = opener.children(node, "tensor") or ()
        found = next(((key, child) for key, child, _ in below if f"{rest}.".startswith(f"{key}.")), None)
        if found is None:
            return None
        node, rest = found[1], rest[len(found[0]) + 1 :]
    return node


def _names(module: Module, prefix: str, opener: Containers, packed: _Packed) -> Iterator[str]:
    """The names of a module's own tensors, then those of its modules, depth first."""
    stack: list[tuple[str, Module | None, int]] = [(prefix, module, 0)]
    modules: dict[int, Module | None] = {}
    while stack:
        inside, current, depth = stack.pop()
        if depth > limits.NESTING:
            raise LimitError(f"its modules nest deeper than {limits.NESTING}", fixed=True)
        if current is None:
            yield from packed.below(inside[:-1])
            continue
        yield from _registered(current, inside, opener)
        yield from packed.among(inside, current.settings)
        below = []
        for name, node in current.children.items():
            opener.budget.name(inside + name)
            if id(node) not in modules:
                modules[id(node)] = module_of(node, opener)
            child = modules[id(node)]
            if child is not None or is_packed(node):
                below.append((f"{inside}{name}.", child, depth + 1))
        stack.extend(reversed(below))


def _registered(module: Module, inside: str, opener: Containers) -> Iterator[str]:
    """The names of a module's parameters and buffers, without those that its state_dict leaves out."""
    left_out = _texts(module.settings.get(_UNSAVED))
    for name in module.registered:
        opener.budget.name(inside + name)
        if name not in left_out:
            yield inside + name


def _texts(node: object) -> set[str | None]:
    """The strings in a set, which protocols below 4 have as a call with a list."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and node.args:
        node = node.args[0]
    items = node.items if isinstance(node, Set) else node if isinstance(node, list) else []
    return {text_of(item) for item in items}
