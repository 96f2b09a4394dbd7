"""Names changed and dropped in a plain state_dict: one mapping whose values are tensors and scalars, and nothing else.

There every entry is one pair of the mapping, so no place of the graph has to be looked for, and no object can have
several names below the mapping. All other graphs, and all other changes, are for `apply.py`, which does the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Entry, Tensor, Value
from ckpt_cli.model.names import Below
from ckpt_cli.pickles.containers import is_ordered_dict
from ckpt_cli.pickles.edit.apply import tend_metadata
from ckpt_cli.pickles.graph import Call, Dict, Graph

_SCALARS = frozenset([str, int, float, bool, type(None)])


def edit_flat(graph: Graph, entries: Sequence[Entry], changes: Changes, is_tensor: Callable[[object], bool]) -> bool:
    """Carry out changes where they are names and droppings in a plain state_dict; False, with nothing done, elsewhere.

    The graph itself is changed. `is_tensor` says whether a node is a call that makes a tensor.
    """
    pairs = _pairs_of(graph.root)
    if pairs is None or not _only_names(changes) or not _are_its(pairs, entries, is_tensor):
        return False
    after = list(_after(pairs, changes))
    keys = set(after[::2])
    if not after or "" in keys or len(after) != 2 * len(keys) or not _drops_all_below(entries, changes):
        return False
    pairs[:] = after
    tend_metadata([("", graph.root)], (entry.name for entry in entries), changes)
    return True


def _pairs_of(root: object) -> list[object] | None:
    """Return the pairs of a root that is a dict or an OrderedDict."""
    pairs = root.pairs if isinstance(root, Dict | Call) else None
    is_mapping = isinstance(root, Dict) or (isinstance(root, Call) and is_ordered_dict(root) and root.args == ())
    return pairs if is_mapping and isinstance(pairs, list) else None


def _only_names(changes: Changes) -> bool:
    if changes.root or changes.tensors or changes.values or changes.added or changes.contents or changes.device:
        return False
    return bool(changes.names or changes.dropped)


def _are_its(pairs: list[object], entries: Sequence[Entry], is_tensor: Callable[[object], bool]) -> bool:
    """True if the entries are the values of some pairs, one of each, and no two have one name."""
    if len(pairs) != 2 * len(entries):
        return False
    names = set()
    for key, node, entry in zip(pairs[::2], pairs[1::2], entries, strict=True):
        if type(key) is not str or key != entry.name or entry.holder is not None:
            return False
        if isinstance(entry, Value):
            if type(node) not in _SCALARS:
                return False
        elif not isinstance(entry, Tensor) or not is_tensor(node):
            return False
        names.add(key)
    return len(names) == len(entries)


def _after(pairs: list[object], changes: Changes) -> Iterator[object]:
    """The pairs that stay, with their new keys."""
    names, dropped = changes.names, changes.dropped
    for key, node in zip(pairs[::2], pairs[1::2], strict=True):
        if key not in dropped:
            yield names.get(key, key)  # type: ignore[call-overload]  # it is a str, as was seen
            yield node


def _drops_all_below(entries: Sequence[Entry], changes: Changes) -> bool:
    """True if what is dropped is there, and is all that lies below the prefixes that are dropped."""
    below = Below(changes.dropped_prefixes)
    dropped = changes.dropped
    if sum(entry.name in dropped for entry in entries) != len(dropped):
        return False
    return not below or all(entry.name in dropped for entry in entries if entry.name in below)
