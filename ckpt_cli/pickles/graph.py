"""The nodes of a pickle that was read and not run.

Plain data are themselves: None, bool, int, float, str, bytes, and `list` and `tuple` of nodes. Everything that would
hash, import or call when unpickled is one of the classes here. Nodes are compared by identity, never by value, and
every walk over them is iterative: a hostile graph is deep, shared and cyclic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from ckpt_cli.facts import dataclass


class Global:
    """A name that the pickle would import: `torch._utils` `_rebuild_tensor_v2`."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def qualified(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"


class Call:
    """The result of a call: REDUCE, NEWOBJ, NEWOBJ_EX, INST and OBJ, with what was done to the result."""

    __slots__ = ("args", "func", "items", "key", "kwargs", "opcode", "pairs", "row", "states")

    def __init__(self, opcode: str, func: object, args: object, kwargs: object = None) -> None:
        self.opcode = opcode
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.row: Row | None = None
        """The facts that `args` are made of when they are asked for; None where they are there."""
        self.key = ""
        """The key of the storage, where there is a row."""
        self.states: Sequence[object] = ()
        """Each BUILD's argument: `__setstate__` or the instance's dict."""
        self.items: Sequence[object] = ()
        """The items that APPENDS or ADDITEMS gave it."""
        self.pairs: Sequence[object] = ()
        """The pairs that SETITEMS gave it: key, value, key, value…"""

    def __getattr__(self, name: str) -> Any:
        """Make the arguments of a call that was read as a row: Python asks this only for a slot that is not set."""
        if name != "args" or self.row is None:
            raise AttributeError(name)
        args = self.args = self.row.arguments(self.key)
        self.row = None
        return args


class Row(Protocol):
    """The facts of a call that rebuilds a plain tensor, but for the key of its storage (`pickles/rows.py`)."""

    def arguments(self, key: str) -> tuple[object, ...]:
        """Return new nodes for the arguments of the call."""


class Dict:
    """A dict as its pairs, in order, nothing hashed: key, value, key, value…"""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[object]) -> None:
        self.pairs = pairs


class Set:
    """A set or frozenset as its items, in order."""

    __slots__ = ("frozen", "items")

    def __init__(self, items: list[object], *, frozen: bool) -> None:
        self.items = items
        self.frozen = frozen


class PersistentId:
    """A reference to something outside the pickle: for torch, a storage."""

    __slots__ = ("pid",)

    def __init__(self, pid: object) -> None:
        self.pid = pid


class Located(bytes):
    """Bytes that stand in the pickle as they are."""

    offset: int
    """The first one within the pickle's data."""

    @classmethod
    def at(cls, offset: int, raw: bytes) -> Located:
        """The bytes that stand at an offset."""
        node = cls(raw)
        node.offset = offset
        return node


class Letter(str):
    """A string of one character or none, each one that a pickle wrote an object of its own.

    CPython would make one object of all equal ones, and how often one was written would be forgotten.
    """

    __slots__ = ()


class RawString:
    """A Python 2 `str`: bytes that may be text."""

    __slots__ = ("_text", "offset", "raw")

    def __init__(self, raw: bytes, offset: int | None = None) -> None:
        self.raw = raw
        self.offset = offset
        """The first byte within the pickle's data; None where they are escaped there."""
        self._text: str | None = None

    @property
    def text(self) -> str:
        """The bytes as text: UTF-8 where they are that, else Latin-1."""
        if self._text is None:  # made once: the node may be met a million times
            try:
                self._text = self.raw.decode()
            except UnicodeDecodeError:
                self._text = self.raw.decode("latin-1")
        return self._text


class ByteArray:
    """A bytearray (protocol 5)."""

    __slots__ = ("data",)

    def __init__(self, data: object) -> None:
        self.data = data


class Extension:
    """A code of copyreg's extension registry."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class OutOfBand:
    """A buffer that was pickled out of band (protocol 5)."""

    __slots__ = ("readonly",)

    def __init__(self) -> None:
        self.readonly = False


@dataclass(frozen=True, slots=True, eq=False)
class Inline:
    """A long string that stays in the file."""

    kind: str
    """`bytes`, `bytearray`, `str` (UTF-8), `escaped` (a str as a line, `raw-unicode-escape`) or `raw` (Python 2)."""
    offset: int
    """Its first byte within the pickle."""
    nbytes: int

    def unescaped(self, data: bytes | memoryview) -> bytes:
        """Return a long line of text of protocol 0 as the UTF-8 that later protocols have; `data` is the pickle."""
        raw = bytes(data[self.offset : self.offset + self.nbytes])
        return raw.decode("raw-unicode-escape").encode("utf-8", "surrogatepass")


class References(Sequence[PersistentId]):
    """The references of a pickle, each made of the call that has it as its first argument where that is a row."""

    __slots__ = ("nodes",)

    def __init__(self, nodes: Sequence[PersistentId | Call]) -> None:
        self.nodes = nodes
        """The references as they were read: in place of that of a row its call."""

    def __len__(self) -> int:
        return len(self.nodes)

    def __getitem__(self, index: Any) -> Any:
        node = self.nodes[index]
        return node.args[0] if type(node) is Call else node  # type: ignore[index]  # a row's arguments are a tuple


@dataclass(frozen=True, slots=True)
class Graph:
    """One pickle, read."""

    root: object
    protocol: int
    """The number of its PROTO opcode; 0 where it has none."""
    nbytes: int
    """Bytes up to and including STOP."""
    globals: tuple[Global, ...]
    """Every distinct name that it would import, in order of first use."""
    persistent: Sequence[PersistentId] = ()
    """Every reference to something outside, in order."""
    data: bytes | memoryview = b""
    """The bytes that it was read from; the offsets of nodes count from its first byte."""
    byte_strings: tuple[RawString | Inline, ...] = ()
    """The strings that Python 2 wrote and that are not ASCII; of long ones, all."""


def callee(func: object) -> object:
    """Return what a call calls: before the zip files, torch wrapped a module's class together with its source code."""
    if type(func) is PersistentId and type(func.pid) is tuple:
        return next((part for part in func.pid[:2] if type(part) is Global), func)
    return func


def children_of(node: Any) -> Sequence[object]:
    """The nodes that a node holds, in the order in which a pickle has them."""
    kind = type(node)
    if kind is tuple or kind is list:
        return node  # type: ignore[no-any-return]  # its type was compared
    if kind is Call:
        kwargs = [node.kwargs] if node.kwargs is not None else []
        return [node.func, node.args, *kwargs, *node.items, *node.pairs, *node.states]
    if kind is PersistentId:
        return [node.pid]
    if kind is Dict:
        return node.pairs  # type: ignore[no-any-return]  # likewise
    if kind is Set:
        return node.items  # type: ignore[no-any-return]  # likewise
    return [node.data] if kind is ByteArray else ()


def nodes_of(
    root: object, references: list[PersistentId | Call] | None = None, *, within_rows: bool = True
) -> Iterator[object]:
    """Every node of a graph once, in the order in which a pickler reaches them.

    `references` gets those that refer to something outside, and the calls that were read as rows, which have one each.
    Scalars other than bytes are left out, and so are tuples of nothing but these; unless `within_rows`, also the
    arguments of calls that were read as rows, which are plain data, names and one reference.
    A node's children are looked up after it was given, so they may be changed before the next one is asked for.
    """
    if type(root) in SCALARS:
        return
    seen: set[int] = set()
    agenda = [root]
    while agenda:
        node = agenda.pop()
        kind = type(node)
        if (kind is tuple and SCALARS.issuperset(map(type, node))) or id(node) in seen:  # type: ignore[call-overload]
            continue
        seen.add(id(node))
        is_row = kind is Call and node.row is not None  # type: ignore[attr-defined]  # its type was compared
        if references is not None and (is_row or kind is PersistentId):
            references.append(node)  # type: ignore[arg-type]  # likewise
        yield node
        if is_row and not within_rows and node.row is not None and not is_filled(node):  # type: ignore
            continue
        agenda += [child for child in reversed(children_of(node)) if type(child) not in SCALARS]


def is_filled(node: Call) -> bool:
    """True if something was done to the result of a call."""
    return bool(node.states or node.pairs or node.items)


SCALARS = frozenset([str, Letter, int, float, bool, type(None)])
"""The types of plain data that hold nothing and can be no one's identity."""

_LEAST: dict[type, int] = {bytes: 3, Located: 3, Set: 4, ByteArray: 5, OutOfBand: 5}
"""The lowest protocol that has opcodes for a node of each type; 2 for all others."""


def protocol_of(nodes: Iterable[Any]) -> int:
    """Return the lowest protocol that can say all of some nodes: from 2 to 5."""
    protocol = 2
    for node in nodes:
        kind = type(node)
        least = _LEAST.get(kind, 2)
        if kind is Call:
            least = 4 if node.opcode == "new_ex" else 2
        elif kind is Inline:
            least = 3 if node.kind == "bytes" else 2
        elif kind is Global and "." in node.name:
            least = 4
        if least > protocol:
            protocol = least
    return protocol
