"""Whether two graphs stand for the same objects, shared and nested in the same way."""

from __future__ import annotations

import struct

from ckpt_cli.pickles.graph import Call, Extension, Global, Inline, OutOfBand, PersistentId, RawString, Set, children_of
from ckpt_cli.pickles.write import unescaped_text

_PIECE = 1 << 20
"""Bytes of two long strings compared at a time."""

Data = bytes | memoryview


def same_graphs(a: object, a_data: Data, b: object, b_data: Data) -> bool:
    """Whether the graphs below two nodes are the same up to identity; each with the pickle that it was read from.

    Two containers or calls that are one object in one graph must be one in the other, so ties and cycles count.
    """
    forward: dict[int, int] = {}
    backward: dict[int, int] = {}
    compared: set[tuple[int, int]] = set()
    agenda: list[tuple[object, object]] = [(a, b)]
    while agenda:
        one, other = agenda.pop()
        pair = (id(one), id(other))
        if pair in compared:
            continue
        if _kind(one) is not _kind(other):
            return False
        compared.add(pair)
        if not isinstance(one, _LEAVES) and (
            forward.setdefault(*pair) != pair[1] or backward.setdefault(*pair[::-1]) != pair[0]
        ):
            return False
        if not _same_facts(one, a_data, other, b_data):
            return False
        ours, theirs = children_of(one), children_of(other)
        if len(ours) != len(theirs):
            return False
        agenda.extend(zip(ours, theirs, strict=True))
    return True


_LEAVES = (str, bytes, int, float, type(None), tuple, RawString, Inline, Global, Extension, PersistentId)
"""Nodes of which nobody can tell whether they are one object: they cannot change, or stand for one thing."""


def _kind(node: object) -> type:
    """The type of a node, for all strings of one kind the same, however long they are."""
    if isinstance(node, Inline):
        return {"str": str, "escaped": str, "bytes": bytes, "raw": RawString}[node.kind]
    return next((kind for kind in (str, bytes) if isinstance(node, kind)), type(node))


def _same_facts(one: object, a_data: Data, other: object, b_data: Data) -> bool:
    """Whether two nodes of one kind are the same but for what they hold."""
    if isinstance(one, float) and isinstance(other, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, Call) and isinstance(other, Call):
        return _shape(one) == _shape(other)
    if isinstance(one, Global) and isinstance(other, Global):
        return (one.module, one.name) == (other.module, other.name)
    if isinstance(one, Set) and isinstance(other, Set):
        return one.frozen == other.frozen
    if isinstance(one, Extension) and isinstance(other, Extension):
        return one.code == other.code
    if isinstance(one, OutOfBand) and isinstance(other, OutOfBand):
        return one.readonly == other.readonly
    if isinstance(one, str | bytes | RawString | Inline):
        return _same_strings(one, a_data, other, b_data)
    return one == other if isinstance(one, int | None) else True


def _shape(node: Call) -> tuple[object, ...]:
    """How a call is made, and how many things were done to its result."""
    counts = (len(node.items), len(node.pairs), len(node.states))
    return (node.opcode, node.kwargs is None, *counts)


def _same_strings(one: object, a_data: Data, other: object, b_data: Data) -> bool:
    if not isinstance(one, Inline) and not isinstance(other, Inline):
        return _raw(one) == _raw(other)
    (ours, begin, size), (theirs, at, length) = _range(one, a_data), _range(other, b_data)
    return size == length and all(
        ours[begin + done : begin + min(done + _PIECE, size)] == theirs[at + done : at + min(done + _PIECE, size)]
        for done in range(0, size, _PIECE)
    )


def _range(node: object, data: Data) -> tuple[Data, int, int]:
    """Where the bytes of a string are: what they lie in, their first one, how many."""
    if isinstance(node, Inline) and node.kind == "escaped":
        raw = unescaped_text(node, data)
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
