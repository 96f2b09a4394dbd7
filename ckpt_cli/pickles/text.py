"""Nodes as short text: what an object would look like, told without making it."""

from __future__ import annotations

from ckpt_cli.pickles.graph import (
    ByteArray,
    Call,
    Dict,
    Extension,
    Global,
    Inline,
    OutOfBand,
    PersistentId,
    RawString,
    Set,
)

_DEPTH = 4
"""Containers within containers that are spelled out."""

_ITEMS = 8
"""Items of a container that are spelled out."""

_CHARACTERS = 120
"""Characters of a string that are spelled out."""


def describe(node: object, depth: int = _DEPTH) -> str:
    """A bounded repr of any node; it never recurses deeper than `depth` and never walks a whole container."""
    if node is None or isinstance(node, bool | float):
        return repr(node)
    if isinstance(node, int):
        return repr(node) if node.bit_length() <= 4096 else f"<integer of {node.bit_length()} bits>"
    if isinstance(node, str | bytes):
        return repr(node) if len(node) <= _CHARACTERS else repr(node[:_CHARACTERS]) + "…"
    if isinstance(node, RawString):
        return describe(node.text)
    if isinstance(node, Inline):
        return f"<{node.kind} of {node.nbytes} bytes>"
    if isinstance(node, Global):
        return node.qualified
    if isinstance(node, Extension):
        return f"<extension {node.code}>"
    if isinstance(node, OutOfBand):
        return "<buffer kept elsewhere>"
    if depth == 0:
        return "…"
    return _describe_container(node, depth - 1)


def _describe_container(node: object, depth: int) -> str:
    if isinstance(node, tuple):
        return f"({_sequence(node, depth)}{',' if len(node) == 1 else ''})"
    if isinstance(node, list):
        return f"[{_sequence(node, depth)}]"
    if isinstance(node, Set):
        text = f"{{{_sequence(node.items, depth)}}}" if node.items else "set()"
        return f"frozenset({text})" if node.frozen else text
    if isinstance(node, Dict):
        return f"{{{_mapping(node.pairs, depth, ': ')}}}"
    if isinstance(node, PersistentId):
        return f"<persistent id {describe(node.pid, depth)}>"
    if isinstance(node, ByteArray):
        return f"bytearray({describe(node.data, depth)})"
    if isinstance(node, Call):
        return _describe_call(node, depth)
    return f"<{type(node).__name__}>"


def _describe_call(node: Call, depth: int) -> str:
    name = describe(node.func, depth)
    args = node.args if isinstance(node.args, tuple) else (node.args,)
    if name == "copyreg._reconstructor" and args:  # what protocols 0 and 1 make of `object.__new__`
        name, args = describe(args[0], depth), ()
    pieces = []
    if args:
        pieces.append(_sequence(args, depth))
    if node.items:
        pieces.append(f"[{_sequence(node.items, depth)}]")
    if node.pairs:
        pieces.append(f"{{{_mapping(node.pairs, depth, ': ')}}}")
    for state in node.states:
        if isinstance(state, Dict):
            pieces.append(_mapping(state.pairs, depth, "=", bare=True))
        elif state is not None:
            pieces.append(describe(state, depth))
    return f"{name}({', '.join(filter(None, pieces))})"


def _sequence(items: list[object] | tuple[object, ...], depth: int) -> str:
    texts = [describe(item, depth) for item in items[:_ITEMS]]
    return ", ".join([*texts, "…"] if len(items) > _ITEMS else texts)


def _mapping(pairs: list[object], depth: int, sign: str, *, bare: bool = False) -> str:
    """Pairs as `key: value`, or with `bare` as `key=value` where the keys are words."""
    texts = []
    for key, value in zip(pairs[: 2 * _ITEMS : 2], pairs[1 : 2 * _ITEMS : 2], strict=True):
        label = key if bare and isinstance(key, str) else describe(key, depth)
        texts.append(f"{label}{sign}{describe(value, depth)}")
    return ", ".join([*texts, "…"] if len(pairs) > 2 * _ITEMS else texts)
