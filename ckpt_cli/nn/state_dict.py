"""The state_dict of a pickled module as `torch.nn.Module.state_dict` would give it: its entries, and its `_metadata`.

The `_metadata` of a state_dict has the versions of its modules, by which their classes read older ones. torch makes it
from `_version`, an attribute of each module's class (torch/nn/modules/module.py). A pickled module does not have that,
so it follows from the name of its class.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import LimitError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.graph import Call, Dict, Graph, Set
from ckpt_cli.pickles.nn_module import Module, has_notes, module_of, notes_of
from ckpt_cli.pickles.packed import is_packed
from ckpt_cli.pickles.tensors.arguments import text_of

_ARCHIVES = ("torchscript", "pt2")
"""Formats that hold one module, whose entries separate parameters and buffers from other attributes."""

_UNSAVED = "_non_persistent_buffers_set"
"""The attribute of a module that names the buffers which its state_dict leaves out."""


def is_one_module(checkpoint: Checkpoint) -> bool:
    """True if the format holds one module, so that all its entries are those of modules."""
    return checkpoint.format in _ARCHIVES


def state_names(checkpoint: Checkpoint, prefix: str = "") -> list[str] | None:
    """Return the names of a module's state_dict, in its order; None where the prefix is not a module."""
    graph = checkpoint.document
    if is_one_module(checkpoint):
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


# --- the `_metadata`: versions of modules -----------------------------------------------------------------------------

_RENAMED = {
    "torch.nn.quantized.": "torch.ao.nn.quantized.",
    "torch.nn.intrinsic.": "torch.ao.nn.intrinsic.",
    "torch.quantization.": "torch.ao.quantization.",
}
"""The names of classes' modules since torch 1.13."""

_VERSIONS: tuple[tuple[str, int], ...] = (
    ("torch.nn.modules.batchnorm.", 2),
    ("torch.nn.modules.instancenorm.", 2),
    ("torch.ao.nn.intrinsic.qat.modules.conv_fused.ConvBn", 2),
    ("torch.ao.nn.intrinsic.quantized.dynamic.modules.linear_relu.", 4),
    ("torch.ao.nn.intrinsic.quantized.modules.bn_relu.", 2),
    ("torch.ao.nn.intrinsic.quantized.modules.linear_relu.", 3),
    ("torch.ao.nn.quantized.dynamic.modules.linear.", 4),
    ("torch.ao.nn.quantized.dynamic.modules.rnn.GRU", 2),
    ("torch.ao.nn.quantized.dynamic.modules.rnn.LSTM", 2),
    ("torch.ao.nn.quantized.modules.batchnorm.", 2),
    ("torch.ao.nn.quantized.modules.linear.Linear", 3),
    ("torch.ao.nn.quantized.modules.normalization.InstanceNorm", 2),
    ("torch.ao.quantization.observer.HistogramObserver", 3),
    ("torch.ao.quantization.observer.MinMaxObserver", 3),
    ("torch.ao.quantization.observer.MovingAverage", 3),
    ("torch.ao.quantization.observer.PerChannelMinMaxObserver", 3),
)
"""The versions of those classes of torch that have another one than 1, by what their names begin with (torch 2.13)."""

_OTHER_CELLS = ("GRUCell", "LSTMCell")
"""Classes that have version 1 although their names begin like others'."""


@dataclass(frozen=True, slots=True)
class Versions:
    """The notes of a state_dict about its modules."""

    notes: Mapping[str, Mapping[str, object]]
    """By the name of each module: its version, and what else is noted."""
    assumed: tuple[str, ...] = ()
    """Classes that are not torch's own, whose version is taken to be 1."""


def versions_of(checkpoint: Checkpoint, prefix: str) -> Versions | None:
    """Find the notes of the state_dict at a prefix, or those that the module there would make; None for neither."""
    graph = checkpoint.document
    if not isinstance(graph, Graph):
        return None
    opener = Containers(WalkBudget(graph.nbytes))
    node = node_at(graph.root, prefix, opener)
    module = module_of(node, opener)
    if module is not None:
        return _of_modules(module, opener)
    notes = _plain_notes(node)
    return Versions(notes) if notes else None


def has_versions(checkpoint: Checkpoint, prefix: str) -> bool:
    """True if a state_dict at or below a prefix has notes of its modules."""
    graph = checkpoint.document
    if not isinstance(graph, Graph):
        return False
    return has_notes(node_at(graph.root, prefix, Containers(WalkBudget(graph.nbytes))))


def _of_modules(root: Module, opener: Containers) -> Versions:
    notes: dict[str, Mapping[str, object]] = {}
    assumed: dict[str, None] = {}
    for name, module in _modules(root, opener):
        version, is_known = _version(module)
        notes[name] = {"version": version}
        if not is_known:
            assumed[module.qualified or "a class without a name"] = None
    return Versions(notes, tuple(assumed))


def _modules(root: Module, opener: Containers) -> Iterator[tuple[str, Module]]:
    """Every module under its name, depth first, as state_dict goes through them."""
    stack = [("", root, 0)]
    known: dict[int, Module | None] = {}
    while stack:
        name, module, depth = stack.pop()
        if depth > limits.NESTING:
            raise LimitError(f"its modules nest deeper than {limits.NESTING}", fixed=True)
        yield name, module
        below = []
        for key, node in module.children.items():
            inside = f"{name}.{key}" if name else key
            opener.budget.name(inside)
            if id(node) not in known:
                known[id(node)] = module_of(node, opener)
            child = known[id(node)]
            if child is not None:
                below.append((inside, child, depth + 1))
        stack.extend(reversed(below))


def _version(module: Module) -> tuple[int, bool]:
    """The version of a module's class, and whether it is certain; a scripted module has version 1 in torch too."""
    own = module.settings.get("_version")
    if module.scripted or type(own) is int:
        return (own, True) if type(own) is int else (1, True)
    name = module.qualified
    for old, new in _RENAMED.items():
        if name.startswith(old):
            name = new + name[len(old) :]
    if not name.startswith("torch."):
        return 1, False
    if name.rpartition(".")[2] in _OTHER_CELLS:
        return 1, True
    return next((version for begin, version in _VERSIONS if name.startswith(begin)), 1), True


def _plain_notes(node: object) -> dict[str, Mapping[str, object]] | None:
    """The `_metadata` of a state_dict, where it is a map of maps of plain values."""
    pairs = next(iter(notes_of(node)), None)
    if pairs is None or not isinstance(node, Call):
        return None
    found: dict[str, Mapping[str, object]] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        name = text_of(key)
        inner = value.pairs if isinstance(value, Dict | Call) else None
        if name is None or inner is None:
            return None
        said = {text_of(field): what for field, what in zip(inner[::2], inner[1::2], strict=True)}
        if None in said or not all(type(what) in _PLAIN for what in said.values()):
            return None
        found[name] = {str(field): what for field, what in said.items()}
    return found


_PLAIN = (int, float, bool, str, type(None))
