"""The places of the entries of a distributed checkpoint in the state that was saved: dicts and lists, from their paths.

The planner flattens nested dicts and lists to names and notes each one's path in `planner_data` (`flatten_state_dict`
and `set_element` in torch/distributed/checkpoint/_nested_dict.py and _traverse.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Dict
from ckpt_cli.pickles.tensors.arguments import text_of

Path = tuple["str | int", ...]
"""The keys of dicts and indices of lists that lead to an entry."""


class _Leaf:
    """A node at the end of a path."""

    __slots__ = ("node",)

    def __init__(self, node: object) -> None:
        self.node = node


_Branch = dict["str | int", object] | list[object]


def path_of(name: str, node: object) -> Path:
    """The path of an entry, from what the planner noted; its name alone where that is nothing."""
    if node is None:
        return (name,)
    if not isinstance(node, tuple) or not node:
        raise MalformedError(f"entry {describe(name)}: its place in the state that was saved is {describe(node)}")
    if len(node) > limits.NESTING:
        raise LimitError(f"entry {describe(name)} lies in more than {limits.NESTING} containers", fixed=True)
    found: list[str | int] = []
    for key in node:
        text = text_of(key)
        if text is None and (type(key) is not int or key < 0):
            raise MalformedError(f"entry {describe(name)}: its place has the key {describe(key)}")
        found.append(key if text is None else text)
    return tuple(found)


def renamed_path(path: Path, new: str) -> Path:
    """Return the path of an entry under a new name: keys that both have at the beginning or the end stay the same.

    What lies between them is one key, as the new name does not say where containers begin in it.
    """
    head: list[str | int] = []
    tail: list[str | int] = []
    keys, rest = list(path), new
    while len(keys) > 1 and rest.endswith(f".{keys[-1]}"):
        tail.insert(0, keys.pop())
        rest = rest[: -len(str(tail[0])) - 1]
    while len(keys) > 1 and rest.startswith(f"{keys[0]}."):
        head.append(keys.pop(0))
        rest = rest[len(str(head[-1])) + 1 :]
    is_index = len(keys) == 1 and isinstance(keys[0], int) and rest.isascii() and rest.isdecimal()
    return (*head, int(rest) if is_index and str(int(rest)) == rest else rest, *tail)


def new_path(name: str, paths: Iterable[Path]) -> Path:
    """Return a path for a new name among others: in the innermost container that its beginning names, as one key."""
    containers: dict[str, Path] = {}
    for path in paths:
        for end in range(1, len(path)):
            containers.setdefault(dotted(path[:end]), path[:end])
    beginnings = [place for place, letter in enumerate(name) if letter == "."]
    for place in reversed(beginnings):
        found = containers.get(name[:place])
        if found is not None:
            return renamed_path((*found, ""), name)
    return (name,)


def below(path: Path, prefix: str) -> Path | None:
    """Return the rest of a path below a dotted prefix; None for an entry that is not below it."""
    reached = ""
    for number, key in enumerate(path):
        if reached == prefix:
            return path[number:]
        reached = f"{reached}.{key}" if number else str(key)
        if reached.startswith(f"{prefix}."):
            return (reached[len(prefix) + 1 :], *path[number + 1 :])
    return None


def nest(leaves: Iterable[tuple[str, Path, object]]) -> object:
    """Put nodes where their paths say: dicts and lists, where an index that none has is None, as in torch.

    Raises MalformedError for paths that contradict each other, LimitError for lists of far more items than are there.
    """
    root: _Branch | None = None
    gaps = 0
    for name, path, node in leaves:
        if root is None:
            root = _branch_for(path[0])
        branch = root
        for key, following in itertools.pairwise(path):
            gaps += _reach(name, branch, key, gaps)
            child = branch[key]  # type: ignore[index]  # _reach looked at it
            if child is None:
                child = branch[key] = _branch_for(following)  # type: ignore[index]
            if isinstance(child, _Leaf):
                raise _contradiction(name)
            branch = child  # type: ignore[assignment]
        gaps += _reach(name, branch, path[-1], gaps)
        if branch[path[-1]] is not None:  # type: ignore[index]
            raise _contradiction(name)
        branch[path[-1]] = _Leaf(node)  # type: ignore[index]
    return _as_nodes({} if root is None else root)


def _branch_for(key: str | int) -> _Branch:
    """The container that has such a key."""
    return {} if isinstance(key, str) else []


def _reach(name: str, branch: object, key: str | int, gaps: int) -> int:
    """Make room for a key in a container; returns how many items a list got for that, which are None."""
    if isinstance(branch, dict) and isinstance(key, str):
        branch.setdefault(key, None)
        return 0
    if not isinstance(branch, list) or not isinstance(key, int):
        raise _contradiction(name)
    more = max(key + 1 - len(branch), 0)
    if gaps + more > limits.DCP_ITEMS:
        raise LimitError(f"entry {describe(name)} is item {key} of a list, beyond {limits.DCP_ITEMS:,} items in all")
    branch.extend([None] * more)
    return more


def _contradiction(name: str) -> MalformedError:
    return MalformedError(f"entry {describe(name)}: its place in the state that was saved contradicts another entry's")


def _as_nodes(root: _Branch) -> object:
    """Containers as nodes of a pickle."""
    made: list[tuple[_Branch, list[object]]] = []
    top = _node_for(root, made)
    while made:
        branch, items = made.pop()
        pairs = branch.items() if isinstance(branch, dict) else ((None, item) for item in branch)
        for key, item in pairs:
            if key is not None:
                items.append(key)
            if isinstance(item, _Leaf):
                items.append(item.node)
            else:
                items.append(_node_for(item, made) if isinstance(item, dict | list) else None)
    return top


def _node_for(branch: _Branch, made: list[tuple[_Branch, list[object]]]) -> object:
    items: list[object] = []
    made.append((branch, items))
    return Dict(items) if isinstance(branch, dict) else items


def dotted(path: Sequence[str | int]) -> str:
    """The name that a path gives an entry."""
    return ".".join(map(str, path))
