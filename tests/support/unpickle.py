"""Makes the objects that a graph stands for, for tests only: what pickle.loads makes, from the nodes of the reader."""

from __future__ import annotations

import importlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from typing import Any

from ckpt_cli.pickles.graph import (
    ByteArray,
    Call,
    Dict,
    Global,
    Inline,
    Located,
    OutOfBand,
    PersistentId,
    RawString,
    Set,
)


class Maker:
    """Makes each node once, so that shared nodes become shared objects; cycles go through lists and dicts."""

    def __init__(
        self,
        data: bytes = b"",
        persistent: Callable[[Any], Any] = lambda pid: ("persistent", pid),
        buffers: Iterable[Any] = (),
        encoding: str = "ascii",
    ) -> None:
        self._data = data
        self._persistent = persistent
        self._buffers = iter(buffers)
        self._encoding = encoding
        self._made: dict[int, Any] = {}

    def make(self, node: Any) -> Any:
        """The object of a node."""
        if type(node) in (type(None), bool, int, float, str, bytes):
            return node
        if id(node) not in self._made:
            table = {list: self._list, Dict: self._dict, Call: self._call, tuple: self._tuple, Set: self._set}
            if type(node) in table:
                table[type(node)](node)
            else:
                self._made[id(node)] = self._other(node)
        return self._made[id(node)]

    def _list(self, node: list[Any]) -> None:
        items = self._made[id(node)] = []
        items.extend(map(self.make, node))

    def _tuple(self, node: tuple[Any, ...]) -> None:
        items = tuple(map(self.make, node))
        self._made.setdefault(id(node), items)

    def _dict(self, node: Dict) -> None:
        made = self._made[id(node)] = {}
        self._fill(made, node.pairs)

    def _set(self, node: Set) -> None:
        kind = frozenset if node.frozen else set
        self._made[id(node)] = kind(map(self.make, node.items))

    def _fill(self, made: Any, pairs: Iterable[Any]) -> None:
        pairs = list(pairs)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            made[self.make(key)] = self.make(value)

    def _call(self, node: Call) -> None:
        func, args = self.make(node.func), self.make(node.args)
        kwargs = self.make(node.kwargs) if node.opcode == "new_ex" else {}
        made = func.__new__(func, *args, **kwargs) if node.opcode.startswith("new") else func(*args)
        self._made[id(node)] = made
        for item in node.items:
            (made.add if isinstance(made, set) else made.append)(self.make(item))
        self._fill(made, node.pairs)
        for state in map(self.make, node.states):
            if hasattr(made, "__setstate__"):
                made.__setstate__(state)
            else:
                attributes, slots = state if isinstance(state, tuple) else (state, None)
                if attributes:
                    vars(made).update(attributes)
                for name, value in (slots or {}).items():
                    setattr(made, name, value)

    def _other(self, node: Any) -> Any:
        if isinstance(node, str):
            return str(node)
        if isinstance(node, Inline):
            raw = self._data[node.offset : node.offset + node.nbytes]
            return raw if node.kind.startswith("byte") else raw.decode("utf-8", "surrogatepass")
        if isinstance(node, Located):
            return bytes(node)
        if isinstance(node, RawString):
            return node.raw.decode(self._encoding) if self._encoding != "bytes" else node.raw
        if isinstance(node, ByteArray):
            return bytearray(self.make(node.data))
        if isinstance(node, PersistentId):
            return self._persistent(self.make(node.pid))
        if isinstance(node, OutOfBand):
            buffer = next(self._buffers)
            return memoryview(buffer).toreadonly() if node.readonly else buffer
        if isinstance(node, Global):
            return _imported(*NAME_MAPPING.get((node.module, node.name), (node.module, node.name)))
        raise TypeError(f"nothing to make of a {type(node).__name__}")


def _imported(module: str, name: str) -> Any:
    """An object by its name, which may be the one that it had in Python 2."""
    found: Any = importlib.import_module(IMPORT_MAPPING.get(module, module))
    for part in name.split("."):
        found = getattr(found, part)
    return found
