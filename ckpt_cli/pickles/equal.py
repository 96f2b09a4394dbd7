"""Comparison of two graphs: do they stand for the same objects, shared and nested in the same way?"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ckpt_cli.pickles.graph import (
    ByteArray,
    Call,
    Dict,
    Extension,
    Global,
    Inline,
    Letter,
    Located,
    OutOfBand,
    PersistentId,
    RawString,
    Set,
    children_of,
    is_filled,
)

_PIECE = 1 << 20
"""Bytes of two long strings compared at a time."""

Data = bytes | memoryview


def same_graphs(a: object, a_data: Data, b: object, b_data: Data) -> bool:
    """True if the graphs below two nodes are the same up to identity; each with the pickle that it was read from.

    Two containers or calls that are one object in one graph must be one in the other, so ties and cycles count.
    """
    pairs, rows = _Pairs(), _Rows()
    agenda: list[tuple[Any, Any]] = [(a, b)]
    while agenda:
        one, other = agenda.pop()
        if pairs.is_new(one, other):
            same = rows.are_same(one, other) if type(one) is Call and type(other) is Call else None
            if same is None:
                same = _same_node(one, a_data, other, b_data, agenda)
            if not same:
                return False
    return not pairs.are_mixed


_PLAIN = frozenset([str, int, bool, type(None)])
"""Types of plain data, which are the same where they are equal."""

_SHAREABLE = frozenset([list, Dict, Call, Set, ByteArray, OutOfBand])
"""Types of nodes that can change, so that one that stands in two places is not the same as two that are equal."""

_FACTLESS = frozenset([tuple, list, Dict, PersistentId])
"""Types of nodes that are what they hold."""

_SHORT = 8
"""Items of a tuple of plain data and names that is compared wherever it is met, which takes no memory."""

_HOLDING_NONE = _PLAIN | {Global}

_LEAVES = _HOLDING_NONE | {Letter}
"""Types of nodes that hold none and that are the same where they are equal."""


def _same_node(one: Any, a_data: Data, other: Any, b_data: Data, agenda: list[tuple[Any, Any]]) -> bool:
    """True if two nodes are the same as far as is seen here; what they hold is put on the agenda."""
    kind = type(one)
    if kind is not type(other) and _kind(one) is not _kind(other):
        return False
    if kind not in _FACTLESS and not _same_facts(one, a_data, other, b_data):
        return False
    below, opposite = children_of(one), children_of(other)
    if len(below) != len(opposite):
        return False
    for pair in zip(below, opposite, strict=True):
        if (kind := type(pair[0])) is not type(pair[1]):
            agenda.append(pair)
        elif kind in _PLAIN:
            if pair[0] != pair[1]:
                return False
        elif not _are_equal(*pair):
            agenda.append(pair)
    return True


def _are_equal(one: Any, other: Any) -> bool:
    """True if two nodes of one type are the same name, reference, or short tuple of names and plain data.

    None of these differs from an equal one. False for all others, and where there may be more to compare.
    """
    kind = type(one)
    if kind is Global:
        return bool(one.name == other.name and one.module == other.module)
    if kind is PersistentId:
        one, other = one.pid, other.pid
        kind = type(one)
    if kind is not tuple or type(other) is not tuple or len(one) > _SHORT:
        return False
    kinds = [*map(type, one)]
    if not _LEAVES.issuperset(kinds) or kinds != [*map(type, other)]:
        return False
    if one == other:
        return True
    for a, b in zip(one, other, strict=True):
        if a != b and not (type(a) is Global and a.name == b.name and a.module == b.module):
            return False
    return True


class _Rows:
    """The templates of rows that were compared."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, object], bool] = {}

    def are_same(self, one: Call, other: Call) -> bool | None:
        """True if two calls were read as rows with the same arguments; None where there is more to compare."""
        a, b = one.row, other.row
        if a is None or b is None or is_filled(one) or is_filled(other):
            return None
        known = self._known.get((a, b))
        if known is None:
            known = self._known[a, b] = _facts_of_row(a) == _facts_of_row(b)
        return known and one.key == other.key


def _facts_of_row(row: Any) -> tuple[object, ...]:
    names = (row.func, row.kind, row.hooks)
    facts = (row.word, row.location, row.numel, row.offset, row.size, row.stride, row.requires_grad)
    return (*((name.module, name.name) for name in names), *facts)


class _Pairs:
    """The pairs of nodes that were compared, or are about to be."""

    def __init__(self) -> None:
        self.are_mixed = False
        """True once a node that can change stood for two."""
        self._partners: dict[int, int] = {}
        self._taken: set[int] = set()
        """The partners of nodes that can change."""
        self._others: set[tuple[int, int]] = set()
        """Further partners of nodes of which nobody can tell whether they are one object, such as tuples."""

    def is_new(self, one: Any, other: Any) -> bool:
        """True for a pair that is still to be compared."""
        kind = type(one)
        if kind is PersistentId or (kind is tuple and len(one) <= _SHORT and _HOLDING_NONE.issuperset(map(type, one))):
            return True
        ours, theirs = id(one), id(other)
        partner = self._partners.get(ours)
        if partner == theirs:
            return False
        if kind in _SHAREABLE:
            if partner is not None or theirs in self._taken:
                self.are_mixed = True
                return False
            self._taken.add(theirs)
        elif partner is not None:
            known = (ours, theirs) in self._others
            self._others.add((ours, theirs))
            return not known
        self._partners[ours] = theirs
        return True


def _kind(node: object) -> type:
    """Return the type of a node, for all strings of one kind the same, however long they are."""
    kind = type(node)
    if kind is Inline:
        return {"str": str, "escaped": str, "bytes": bytes, "raw": RawString}[node.kind]  # type: ignore[attr-defined]
    return _KINDS.get(kind, kind)


_KINDS: dict[type, type] = {Letter: str, Located: bytes}


def _same_facts(one: Any, a_data: Data, other: Any, b_data: Data) -> bool:
    """True if two nodes of one kind are the same but for what they hold."""
    kind = _kind(one)
    if kind in (str, bytes, RawString):
        return _same_strings(one, a_data, other, b_data)
    facts = _FACTS.get(kind)
    return facts is None or bool(facts(one) == facts(other))


_FACTS: dict[type, Callable[[Any], object]] = {
    Call: lambda node: (node.opcode, node.kwargs is None, len(node.items), len(node.pairs), len(node.states)),
    Global: lambda node: (node.module, node.name),
    float: lambda node: struct.pack("<d", node),
    Set: lambda node: node.frozen,
    Extension: lambda node: node.code,
    OutOfBand: lambda node: node.readonly,
    int: lambda node: node,
    bool: lambda node: node,
}
"""The facts of a node of each type besides its contents; nothing for other types."""


def _same_strings(one: object, a_data: Data, other: object, b_data: Data) -> bool:
    if not isinstance(one, Inline) and not isinstance(other, Inline):
        return _raw(one) == _raw(other)
    (ours, begin, size), (theirs, at, length) = _range(one, a_data), _range(other, b_data)
    return size == length and all(
        ours[begin + done : begin + min(done + _PIECE, size)] == theirs[at + done : at + min(done + _PIECE, size)]
        for done in range(0, size, _PIECE)
    )


def _range(node: object, data: Data) -> tuple[Data, int, int]:
    """Return where the bytes of a string are: what they lie in, their first one, how many."""
    if isinstance(node, Inline) and node.kind == "escaped":
        raw = node.unescaped(data)
        return raw, 0, len(raw)
    if isinstance(node, Inline):
        return data, node.offset, node.nbytes
    raw = _raw(node)
    return raw, 0, len(raw)


def _raw(node: object) -> bytes:
    if isinstance(node, RawString):
        return node.raw
    return (
        node.encode("utf-8", "surrogatepass")
        if isinstance(node, str)
        else bytes(node)
        if isinstance(node, bytes)
        else b""
    )
