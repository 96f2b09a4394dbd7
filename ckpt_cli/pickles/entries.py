"""A graph flattened to named entries: dicts, lists and objects open up, everything else is a leaf."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import repeat

from ckpt_cli import limits
from ckpt_cli.errors import LimitError
from ckpt_cli.model import Entry, Opaque, Tensor, Value
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString
from ckpt_cli.pickles.rebuild import Rebuilder, StorageFinder
from ckpt_cli.pickles.text import describe

_Children = Iterator[tuple[str, object, str]]
"""What opens up below a node: the key, the node and the kind that tensors there have."""

_CHECK_EVERY = 1 << 12

_PLAIN_GLOBALS = frozenset(
    ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch.Size",
     "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage"]
)  # fmt: skip
"""Globals that tell nothing of what a checkpoint holds: plain tensors and dicts need them."""


def entries_of(graph: Graph, finder: StorageFinder) -> list[Entry]:
    """Every leaf of the graph under its dotted name, in the document's order.

    Raises MalformedError for tensors that do not fit their storages, LimitError where shared containers multiply.
    """
    rebuilder = Rebuilder(finder)
    found: list[Entry] = []
    most = limits.ENTRIES_FLOOR + graph.nbytes // 3
    blocks = sys.getallocatedblocks() + limits.ENTRY_BLOCKS
    characters = 0
    for name, node, kind in _leaves(graph.root, rebuilder):
        if isinstance(node, Tensor):
            found.append(node if kind == "tensor" or node.kind != "tensor" else _with_kind(node, kind))
        else:
            found.append(Value(name, _plain(node)))
        characters += len(name)
        if len(found) % _CHECK_EVERY == 0 and sys.getallocatedblocks() > blocks:
            raise LimitError("its names take far more memory than those of a checkpoint of its size need")
        if len(found) > most or characters > limits.NAME_BYTES:
            raise LimitError(f"it opens up to more than {len(found) - 1} names, far more than a file of its size needs")
    return found


def objects_of(graph: Graph) -> list[str]:
    """The names that the pickle would import, without those that every plain state_dict needs."""
    names = [node.qualified for node in graph.globals]
    return [name for name in names if name not in _PLAIN_GLOBALS and not name.endswith("Storage")]


def top_level_of(graph: Graph) -> list[str]:
    """The outermost keys, where the pickle holds a mapping."""
    if isinstance(graph.root, Dict | Call):
        return [key_text(key) for key in graph.root.pairs[::2]]
    return []


def key_text(key: object) -> str:
    """A mapping's key as a part of a name: strings as they are, other keys by their repr."""
    if isinstance(key, str):
        return key
    return key.text if isinstance(key, RawString) else describe(key)


def _with_kind(tensor: Tensor, kind: str) -> Tensor:
    from dataclasses import replace

    return replace(tensor, kind=kind)


def _leaves(root: object, rebuilder: Rebuilder) -> Iterator[tuple[str, object, str]]:
    """Depth first, without recursion: (name, tensor or node, kind) of every leaf."""
    tensor = rebuilder.tensor("", root)
    children = None if tensor else _children(root, "tensor")
    if children is None:
        yield "", tensor or root, "tensor"
        return
    frames: list[tuple[str, _Children, int]] = [("", children, id(root))]
    open_nodes = {id(root)}
    while frames:
        prefix, children, identity = frames[-1]
        item = next(children, None)
        if item is None:
            frames.pop()
            open_nodes.discard(identity)
            continue
        key, node, kind = item
        name = f"{prefix}.{key}" if prefix and key else prefix or key
        if type(node) is Call:
            tensor = rebuilder.tensor(name, node)
            if tensor is not None:
                yield name, tensor, kind
                continue
        below = _children(node, kind)
        if below is None:
            yield name, node, kind
        elif id(node) in open_nodes:
            yield name, Opaque("<the same object again>"), kind
        elif len(frames) > limits.NESTING:
            raise LimitError(f"its containers nest deeper than {limits.NESTING}")
        else:
            open_nodes.add(id(node))
            frames.append((name, below, id(node)))


def _children(node: object, kind: str) -> _Children | None:
    """What opens up below a node, or None for a leaf."""
    if isinstance(node, Dict):
        return _of_pairs(node.pairs, kind) if node.pairs else None
    if isinstance(node, list | tuple):
        return None if _is_flat(node) else zip(map(str, range(len(node))), node, repeat(kind), strict=False)
    if isinstance(node, Call):
        return _of_call(node, kind)
    return None


def _of_pairs(pairs: list[object], kind: str) -> _Children:
    return zip(map(key_text, pairs[::2]), pairs[1::2], repeat(kind), strict=False)


def _of_call(node: Call, kind: str) -> _Children | None:
    """An object opens up to its mapping or sequence and its attributes; one that has none of these is a leaf."""
    attributes = next((state for state in node.states if isinstance(state, Dict)), None)
    ordered = isinstance(node.func, Global) and node.func.name == "OrderedDict"
    if ordered:
        old_style = _listed_pairs(node.args)
        return _of_pairs(node.pairs or old_style, kind) if node.pairs or old_style else None
    if attributes is not None and not node.pairs and not node.items:
        return _of_attributes(attributes, kind) if attributes.pairs else None
    if node.pairs:
        return _of_pairs(node.pairs, kind)
    if node.items and not _is_flat(node.items):
        return zip(map(str, range(len(node.items))), node.items, repeat(kind), strict=False)
    return None


def _listed_pairs(args: object) -> list[object]:
    """The pairs of an `OrderedDict([[key, value], …])`, as Python 2 wrote it."""
    if not isinstance(args, tuple) or len(args) != 1 or not isinstance(args[0], list):
        return []
    pairs: list[object] = []
    for item in args[0]:
        if not isinstance(item, list | tuple) or len(item) != 2:
            return []
        pairs.extend(item)
    return pairs


def _of_attributes(state: Dict, kind: str) -> _Children:
    """An object's attributes; those of a torch.nn.Module as its state_dict names them."""
    named = {key: value for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True) if isinstance(key, str)}
    if not {"_parameters", "_buffers", "_modules"} <= named.keys():
        yield from _of_pairs(state.pairs, kind)
        return
    for group, group_kind in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", kind)):
        for key, value, _ in _children(named[group], kind) or ():
            if value is not None:
                yield key, value, group_kind
    for key, value in named.items():
        if not key.startswith("_"):
            yield key, value, kind


_SCALARS = (type(None), bool, int, float, str, RawString)


def _is_flat(items: list[object] | tuple[object, ...]) -> bool:
    """Whether a sequence holds scalars only, and so is one value rather than many entries."""
    return all(isinstance(item, _SCALARS) for item in items)


def _plain(node: object) -> object:
    """A leaf's value: plain data where it is that, else its text."""
    if isinstance(node, RawString):
        return node.text
    if node is None or isinstance(node, bool | int | float | str | Opaque):
        return node
    if isinstance(node, list | tuple):
        if not any(isinstance(item, RawString) for item in node):
            return node
        texts = [item.text if isinstance(item, RawString) else item for item in node]
        return texts if isinstance(node, list) else tuple(texts)
    if isinstance(node, Dict):
        return {}
    return Opaque("OrderedDict()" if _is_empty_mapping(node) else describe(node))


def _is_empty_mapping(node: object) -> bool:
    return isinstance(node, Call) and isinstance(node.func, Global) and node.func.name == "OrderedDict"
