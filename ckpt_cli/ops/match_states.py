"""The two sides of `match`: the state_dict that a checkpoint holds, and what a model would expect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import MalformedError, NameNotFoundError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import head_of, is_file
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor
from ckpt_cli.model.names import Holders, prefixes_of
from ckpt_cli.nn.state_dict import node_at, state_names, versions_of
from ckpt_cli.ops.parts import MODEL_KEYS, by_role
from ckpt_cli.ops.select import close_names
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.graph import Graph

Shape = tuple[int, ...]

EXTRA = "_extra_state"
"""The last part of the name under which a module keeps what is not a tensor (torch/nn/modules/module.py)."""

_DEEPEST = 3
"""Containers within containers that are looked into for the model."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One name of a state_dict."""

    name: str
    shape: Shape | None = None
    """None for a value, and for a tensor that has no shape yet."""
    dtype: str = ""
    kind: str = "tensor"
    """`tensor`, `lazy` for an uninitialized one, or `value` for anything that is not a tensor."""

    @property
    def is_extra(self) -> bool:
        """True for the extra state of a module."""
        return self.name.endswith(EXTRA) and (self.name == EXTRA or self.name.endswith(f".{EXTRA}"))

    @property
    def is_value(self) -> bool:
        """True for anything that is not a tensor."""
        return self.kind == "value"


@dataclass(frozen=True, slots=True)
class State:
    """A state_dict: its names in their order, without the prefix of the container that it is in."""

    path: str
    prefix: str
    """The container that it is in, empty for the whole checkpoint."""
    leaves: Mapping[str, Leaf]
    versions: Mapping[str, object] = field(default_factory=dict)
    """The versions of modules that its `_metadata` notes, by their names."""
    nested: Sequence[str] = ()
    """Its keys that are dicts, where a state_dict has tensors."""
    outside: Sequence[str] = ()
    """The full names of all other entries of its checkpoint."""

    def full(self, name: str) -> str:
        """Return a name of the state_dict as the checkpoint has it."""
        return f"{self.prefix}.{name}" if self.prefix else name


def shapes_fit(given: Leaf, wanted: Leaf) -> bool:
    """True if a tensor can be copied: torch also takes one element for a scalar, and any shape for a lazy parameter."""
    if wanted.kind == "lazy" or given.shape == wanted.shape:
        return True
    return wanted.shape == () and given.shape == (1,)


def state_of(checkpoint: Checkpoint, prefix: str | None = None, *, aliases: bool = False) -> State:
    """Return the state_dict at a prefix; by default that of the model.

    With `aliases`, names that safetensors notes as others of a tensor count too. Raises NameNotFoundError where
    nothing lies below the prefix.
    """
    prefix = model_part(checkpoint) if prefix is None else prefix.removesuffix(".")
    graph = checkpoint.document if isinstance(checkpoint.document, Graph) else None
    inside = f"{prefix}." if prefix else ""
    registered = state_names(checkpoint, prefix)
    leaves: dict[str, Leaf] = {}
    outside: list[str] = []
    wanted = None if registered is None else set(registered)
    for entry in checkpoint.entries:
        if entry.name.startswith(inside) and (wanted is None or entry.name in wanted) and _counts(entry, aliases):
            leaf = _leaf(entry, entry.name[len(inside) :])
            leaves.setdefault(leaf.name, leaf)
            if leaf.kind != "value" or leaf.is_extra:
                continue
        if entry.holder is None and not (isinstance(entry, Tensor) and entry.alias_of is not None):
            outside.append(entry.name)
    nested: list[str] = []
    if graph is not None and registered is None:
        nested = _compare_keys(leaves, graph, prefix)
    if not leaves and prefix:
        known = {entry.name.rpartition(".")[0] for entry in checkpoint.entries}
        raise NameNotFoundError(prefix, close_names(prefix, known), path=checkpoint.path)
    versions = versions_of(checkpoint, prefix) if graph is not None else None
    notes = {} if versions is None else {name: note.get("version") for name, note in versions.notes.items()}
    return State(checkpoint.path, prefix, leaves, notes, nested, outside)


def model_tensors(checkpoint: Checkpoint, prefix: str | None = None) -> tuple[str, list[Tensor]]:
    """Return the tensors of the model, and what all their names begin with, up to a dot; or those below a prefix.

    Where there is no model they are those of its EMA, or all. Raises NameNotFoundError for a prefix without tensors.
    """
    if prefix is None:
        prefix = checkpoint.weights or model_part(checkpoint)
        named = _below(checkpoint.tensors, prefix)
        roles = by_role(checkpoint, named)
        return f"{prefix}." if prefix else "", roles.get("model") or roles.get("EMA") or named
    prefix = prefix.removesuffix(".")
    found = _below(checkpoint.tensors, prefix)
    if not found:
        known = prefixes_of(tensor.name for tensor in checkpoint.tensors)
        raise NameNotFoundError(prefix, close_names(prefix, known), path=checkpoint.path)
    return f"{prefix}." if prefix else "", found


def _below(tensors: Sequence[Tensor], prefix: str) -> list[Tensor]:
    """Return the tensors below a prefix, but those that are private to others."""
    inside = f"{prefix}." if prefix else ""
    return [tensor for tensor in tensors if tensor.name.startswith(inside) and tensor.holder is None]


def _counts(entry: Entry, aliases: bool) -> bool:
    """True for an entry that is in the state_dict: private attributes of tensors are not."""
    return entry.holder is None and (aliases or not isinstance(entry, Tensor) or entry.alias_of is None)


def _leaf(entry: Entry, name: str) -> Leaf:
    at = f".{name}".find(f".{EXTRA}.") if EXTRA in name else -1
    if at >= 0:  # an extra state that is a dict: one key of the state_dict
        return Leaf(name[: at + len(EXTRA)], kind="value")
    if not isinstance(entry, Tensor):
        return Leaf(name, None, "", "value")
    return Leaf(name, entry.shape, entry.dtype.name, "lazy" if entry.layout == "uninitialized" else "tensor")


def _compare_keys(leaves: dict[str, Leaf], graph: Graph, prefix: str) -> list[str]:
    """Add the keys without entries to the leaves, and return those that hold other tensors."""
    opener = Containers(WalkBudget(graph.nbytes))
    keys = [key for key, _, _ in opener.children(node_at(graph.root, prefix, opener), "tensor") or ()]
    if not keys:
        return []
    known = set(keys)
    below = [leaf.name for leaf in leaves.values() if leaf.name not in known]
    holders = Holders(below)
    for key in keys:
        if key not in leaves and key not in holders:
            leaves[key] = Leaf(key, kind="value")
    return [key for key in dict.fromkeys(keys) if key in holders and key not in leaves]


# --- the part of a training checkpoint that is the model ----------------------------------------------------------


def model_part(checkpoint: Checkpoint) -> str:
    """Return the prefix of the model in a training checkpoint; empty where the whole is a state_dict."""
    graph = checkpoint.document
    tensors = checkpoint.tensors
    if not isinstance(graph, Graph):
        tops = dict.fromkeys(tensor.name.partition(".")[0] for tensor in tensors)
        has_optimizer = any(top.startswith(("optim", "lr_sched")) for top in tops)
        return next((name for name in MODEL_KEYS if has_optimizer and name in tops), "")
    opener = Containers(WalkBudget(graph.nbytes))
    names = [tensor.name for tensor in tensors]
    prefix = ""
    for _ in range(_DEEPEST):
        if state_names(checkpoint, prefix) is not None:
            break
        children = opener.children(node_at(graph.root, prefix, opener), "tensor") or ()
        inside = f"{prefix}." if prefix else ""
        keys = {key for key, _, _ in children}
        found = next(
            (n for n in MODEL_KEYS if n in keys and any(name.startswith(f"{inside}{n}.") for name in names)), None
        )
        if found is None:
            break
        prefix = inside + found
    return prefix


# --- what `ckpt ls --json` printed ----------------------------------------------------------------------------------


_LISTING = 100_000
"""Bytes at the begin of a listing in which its entries begin."""


def listing_of(path: str, prefix: str | None = None) -> State | None:
    """Return the state_dict in what `ckpt ls --json` printed; None for any other file.

    Raises MalformedError for a listing that ckpt did not print.
    """
    import json

    if not is_file(path):
        return None
    head = head_of(path, _LISTING)
    if head[:1] != b"{" or b'"entries"' not in head:
        return None
    raw = head_of(path, limits.INDEX_JSON + 1) if len(head) == _LISTING else head
    if len(raw) > limits.INDEX_JSON:
        return None
    try:
        listing = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    entries = listing.get("entries") if isinstance(listing, dict) else None
    if not isinstance(entries, list):
        return None
    found = [_listed(item, path) for item in entries]
    if prefix is None:
        prefix = _model_of(found)
    prefix = prefix.removesuffix(".")
    inside = f"{prefix}." if prefix else ""
    leaves: dict[str, Leaf] = {}
    for leaf in found:
        if leaf.name.startswith(inside):
            leaves[leaf.name[len(inside) :]] = Leaf(leaf.name[len(inside) :], leaf.shape, leaf.dtype, leaf.kind)
    if not leaves and prefix:
        raise NameNotFoundError(prefix, path=path)
    return State(path, prefix, leaves)


def _model_of(leaves: Iterable[Leaf]) -> str:
    """Return the prefix of the model by names alone, where something of an optimizer lies beside it."""
    tops = dict.fromkeys(leaf.name.partition(".")[0] for leaf in leaves)
    beside = any(top.startswith(("optim", "lr_sched")) for top in tops)
    return next((name for name in MODEL_KEYS if beside and name in tops), "")


def _listed(item: Any, path: str) -> Leaf:
    """Return an entry of the JSON of `ls`."""
    if isinstance(item, dict) and isinstance(item.get("name"), str):
        if item.get("type") == "value":
            return Leaf(item["name"], kind="value")
        shape, dtype = item.get("shape"), item.get("dtype")
        is_shape = isinstance(shape, list) and all(type(size) is int for size in shape)
        if isinstance(dtype, str) and (is_shape or shape is None):
            return Leaf(item["name"], None if shape is None else tuple(shape), dtype, "tensor" if is_shape else "lazy")
    raise MalformedError("an entry is not as ckpt ls --json prints it", path=path)
