"""Nodes as short text: the repr that an object would have, without making it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    callee,
)

if TYPE_CHECKING:
    import re

_DEPTH = 4
"""Containers within containers that are spelled out."""

_ITEMS = 8
"""Items of a container that are spelled out."""

_CHARACTERS = 120
"""Characters of a string that are spelled out."""

_ROOM = 600
"""Characters of values after which no further one is spelled out."""


_RECONSTRUCTORS = ("copyreg._reconstructor", "copy_reg._reconstructor")
"""The call that protocols 0 and 1 write for `object.__new__`; up to protocol 2 it goes by its name in Python 2."""


def describe(node: object) -> str:
    """A bounded repr of any node: it goes only so deep and so far, whatever the node holds."""
    text = _plain_call(node) if type(node) is Call else None
    return _Description().of(node, _DEPTH) if text is None else text


def _plain_call(node: Call) -> str | None:
    """The text of a call of a name with a few short arguments, as most objects are; None for any other call."""
    func, args = node.func, node.args
    if (
        type(func) is not Global
        or type(args) is not tuple
        or len(args) > _FEW
        or node.items
        or node.pairs
        or node.states
    ):
        return None
    name = func.qualified
    if name in _RECONSTRUCTORS or len(name) > _CHARACTERS or not name.isprintable():
        return None
    texts = []
    for item in args:
        if type(item) not in _SHORT or (type(item) is int and item.bit_length() > _CHARACTERS):
            return None
        text = repr(item)
        if len(text) > _CHARACTERS:
            return None
        texts.append(text)
    return f"{name}({', '.join(texts)})"


_FEW = 3
"""Arguments of a call that leave room, each of no more than `_CHARACTERS`."""

_SHORT = frozenset([str, int, float, bool, type(None)])
"""The types of plain data that are their repr."""


class _Description:
    """One description in the making."""

    __slots__ = ("room",)

    def __init__(self) -> None:
        self.room = _ROOM
        """Characters left."""

    def of(self, node: object, depth: int) -> str:
        """Return the text of a node, spelled out to `depth` containers within containers."""
        text = _simple(node)
        self.room -= 2 + len(text or "")
        if text is not None:
            return text
        return self._container(node, depth - 1) if depth else "…"

    def _container(self, node: object, depth: int) -> str:
        if isinstance(node, tuple):
            return f"({self._sequence(node, depth)}{',' if len(node) == 1 else ''})"
        if isinstance(node, list):
            return f"[{self._sequence(node, depth)}]"
        if isinstance(node, Set):
            text = f"{{{self._sequence(node.items, depth)}}}" if node.items else "set()"
            return f"frozenset({text})" if node.frozen else text
        if isinstance(node, Dict):
            return f"{{{self._mapping(node.pairs, depth)}}}"
        if isinstance(node, PersistentId):
            return f"<persistent id {self.of(node.pid, depth)}>"
        if isinstance(node, ByteArray):
            return f"bytearray({self.of(node.data, depth)})"
        if isinstance(node, Call):
            return self._call(node, depth)
        return f"<{type(node).__name__}>"

    def _call(self, node: Call, depth: int) -> str:
        func, args = callee(node.func), node.args if isinstance(node.args, tuple) else (node.args,)
        if isinstance(func, Global) and func.qualified in _RECONSTRUCTORS and args:
            func, args = args[0], ()
        name = self.of(func, depth)
        pieces = [self._sequence(args, depth)]
        if node.items:
            pieces.append(f"[{self._sequence(node.items, depth)}]")
        if node.pairs:
            pieces.append(f"{{{self._mapping(node.pairs, depth)}}}")
        for state in node.states[:_ITEMS]:
            if isinstance(state, Dict):
                pieces.append(self._mapping(state.pairs, depth, attributes=True))
            elif state is not None:
                pieces.append(self.of(state, depth))
        return f"{name}({', '.join(filter(None, pieces))})"

    def _sequence(self, items: Sequence[object], depth: int) -> str:
        texts = [self.of(item, depth) for item in items[:_ITEMS] if self.room > 0]
        return ", ".join([*texts, "…"] if len(items) > len(texts) else texts)

    def _mapping(self, pairs: Sequence[object], depth: int, *, attributes: bool = False) -> str:
        """Pairs as `key: value`; attributes as `key=value` where the keys are words."""
        texts = []
        for key, value in zip(pairs[: 2 * _ITEMS : 2], pairs[1 : 2 * _ITEMS : 2], strict=True):
            if self.room <= 0:
                break
            is_word = attributes and isinstance(key, str) and len(key) <= _CHARACTERS
            label = key if is_word else self.of(key, depth)
            texts.append(f"{label}{'=' if attributes else ': '}{self.of(value, depth)}")
        return ", ".join([*texts, "…"] if len(pairs) > 2 * len(texts) else texts)


def _simple(node: object) -> str | None:
    """The text of a node that holds no others; None for one that does."""
    if node is None or isinstance(node, bool | float):
        return repr(node)
    if isinstance(node, int):
        return repr(node) if node.bit_length() <= 4096 else f"<integer of {node.bit_length()} bits>"
    if isinstance(node, RawString):
        node = node.text
    if isinstance(node, str | bytes):
        return repr(node) if len(node) <= _CHARACTERS else repr(node[:_CHARACTERS]) + "…"
    if isinstance(node, Inline):
        return f"<{node.kind} of {node.nbytes} bytes>"
    if isinstance(node, Global):
        name = node.qualified[: _CHARACTERS + 1]
        name = name if len(name) <= _CHARACTERS else name[:_CHARACTERS] + "…"
        return name if name.isprintable() else repr(name)
    if isinstance(node, Extension):
        return f"<extension {node.code}>"
    if isinstance(node, OutOfBand):
        return "<buffer kept elsewhere>"
    return None


_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


def unescaped(text: bytes) -> bytes:
    """The bytes of a Python 2 string literal; raises ValueError for half an escape sequence.

    CPython's own decoder does the same, but warns of the escapes that it does not know.
    """
    if b"\\" not in text:
        return text
    import re

    return re.sub(rb"\\(?:x([0-9a-fA-F]{2})|([0-7]{1,3})|([^x]|x|$))", _unescape, text)


def _unescape(match: re.Match[bytes]) -> bytes:
    hexadecimal, octal, other = match.groups()
    if other in (b"", b"x"):
        raise ValueError("half an escape sequence in a string")
    if other:
        return other if other in (b"\\", b"'", b'"') else _ESCAPES.get(other, match[0])
    return bytes((int(hexadecimal, 16) if hexadecimal else int(octal, 8) & 0xFF,))
