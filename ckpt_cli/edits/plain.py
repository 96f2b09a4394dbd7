"""A graph made plain: only what `torch.load(weights_only=True)` takes, as dicts, lists, numbers, text and tensors.

Nothing is imported: numpy's scalars, enums, paths, OmegaConf's containers and the like are read from the pickle that
they are in. The walk does not recurse, and what is shared or cyclic stays so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.edits.plain_objects import KNOWN, Step, omegaconf, require_hashable, unknown
from ckpt_cli.edits.plain_values import (
    ONE_VALUE,
    Refusal,
    bytes_node,
    one_value,
)
from ckpt_cli.errors import LimitError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.containers import key_text
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import (
    SCALARS,
    ByteArray,
    Call,
    Dict,
    Global,
    Inline,
    Located,
    PersistentId,
    RawString,
    Set,
    callee,
)
from ckpt_cli.pickles.tensors.inline_bytes import buffer_of
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.judge import modern

_NOT_OF_TEXT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Bytes that no text in Latin-1 has: control characters other than tabs and ends of lines."""

MakeTensor = Callable[[str, Call], "object | None"]
"""Makes the call of a new tensor for an array whose bytes stand in the pickle; None for any other call."""


@dataclass(frozen=True, slots=True)
class PlainValue:
    """One value that became another kind of value."""

    name: str
    """The dotted name of its place; empty for the whole."""
    was: str
    """The class that it had."""
    now: str
    """The type that it has now."""


class Plain:
    """Makes a graph plain.

    Raises UnsupportedError for an object that has no plain form, with its place.
    """

    def __init__(self, data: bytes | memoryview, budget: WalkBudget, make_tensor: MakeTensor) -> None:
        self.changes: list[PlainValue] = []
        """What became another kind of value, in the order of the pickle."""
        self.data = data
        """The pickle that long strings of the graph are ranges of."""
        self._budget = budget
        self._make_tensor = make_tensor
        self._keys: list[str] = []
        """The keys on the way to what is made plain at the moment."""
        self._made: dict[int, object] = {}
        """The plain node of each node, by its identity."""
        self._open: set[int] = set()
        """The nodes whose plain ones cannot be had yet, by their identity."""
        self._kept: list[object] = []
        """Nodes that were made on the way, and that must not go while they are known by their identity."""

    def run(self, root: object) -> object:
        """Return the plain graph of a root."""
        running: list[tuple[Step, object]] = [(self._convert(root), root)]
        sent: object = None
        while running:
            step, node = running[-1]
            try:
                child, key = step.send(sent)
            except StopIteration as done:
                running.pop()
                self._made[id(node)] = sent = done.value
                self._kept.append(node)
                self._open.discard(id(node))
                if running:
                    self._keys.pop()
                continue
            except Refusal as refused:
                raise self._refused(str(refused)) from None
            sent = None
            if type(child) in SCALARS:
                sent = child
            elif id(child) in self._made:
                sent = self._made[id(child)]
            elif id(child) in self._open:
                raise self._refused("is an object or a tuple that contains itself")
            else:
                if len(running) > limits.PLAIN_NESTING:
                    raise LimitError(f"its containers nest deeper than {limits.PLAIN_NESTING}", fixed=True)
                self._keys.append(key)
                self._open.add(id(child))
                running.append((self._convert(child), child))
        return sent

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _convert(self, node: object) -> Step:
        """Return the steps of one node, by its type."""
        kind = type(node)
        if kind in SCALARS:
            return _as_is(node)
        if kind is tuple and SCALARS.issuperset(map(type, node)):  # type: ignore[call-overload]  # its type was compared
            return _as_is(node)
        return _NODES.get(kind, Plain._other)(self, node)

    def _dict(self, node: Dict) -> Step:
        made = Dict([])
        self.begin(node, made)
        yield from self.fill(made.pairs, node.pairs)
        return made

    def _list(self, node: list[object]) -> Step:
        made: list[object] = []
        self.begin(node, made)
        for at, item in enumerate(node):
            made.append((yield item, str(at)))
        return made

    def _tuple(self, node: tuple[object, ...]) -> Step:
        made = []
        for at, item in enumerate(node):
            made.append((yield item, str(at)))
        return tuple(made)

    def _set(self, node: Set) -> Step:
        """A set, as protocol 2 has it: torch knows no opcode for it."""
        items = yield from self.items(node.items)
        if node.frozen:
            self.changed("frozenset", "set")
        require_hashable(items)
        return Call("reduce", Global("builtins", "set"), (items,))

    def _persistent(self, node: PersistentId) -> Step:
        yield from ()
        return node

    def _raw(self, node: RawString) -> Step:
        """A string of Python 2."""
        yield from ()
        return self._text_or_bytes(node.raw)

    def _text_or_bytes(self, raw: bytes) -> object:
        """Return a string of Python 2 as text where it is UTF-8, or else Latin-1 that could be text; bytes otherwise.

        In Latin-1 every byte is a character, but 0x7F to 0x9F and those before the space are not of text.
        """
        try:
            return raw.decode()
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        if _NOT_OF_TEXT.search(raw):
            return self.changed("str of Python 2", "bytes", bytes_node(raw))
        return self.changed("str of Python 2", "str", text)

    def _bytes(self, node: bytes) -> Step:
        yield from ()
        return bytes_node(bytes(node))

    def _bytearray(self, node: ByteArray) -> Step:
        yield from ()
        return bytes_node(self._bytes_of(node), "bytearray")

    def _inline(self, node: Inline) -> Step:
        yield from ()
        if node.kind in ("str", "escaped"):
            return node
        raw = self._bytes_of(node)
        return self._text_or_bytes(raw) if node.kind == "raw" else bytes_node(raw)

    def _global(self, node: Global) -> Step:
        yield from ()
        module, name = modern(node.module, node.name)
        if f"{module}.{name}" in ALLOWED:
            return node
        raise Refusal(f"is the class or function {module}.{name}")

    def _other(self, node: object) -> Step:
        yield from ()
        raise Refusal(f"is {describe(node)}")

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, node: Call) -> Step:
        """An object: by the class or function that makes it."""
        func = callee(node.func)
        if type(func) is not Global or node.kwargs is not None:
            raise Refusal(f"is {describe(node)}")
        module, name = modern(func.module, func.name)
        full = f"{module}.{name}"
        tensor = self._make_tensor(".".join(self._keys), node)
        if tensor is not None:
            if module.startswith("numpy"):
                self.changed("numpy.ndarray", "tensor")
            return (yield from _as_is(tensor))
        if full in KNOWN:
            return (yield from KNOWN[full](self, node, full))
        if full in ALLOWED:
            return (yield from self._allowed(node, full))
        if module.partition(".")[0] == "omegaconf":
            return (yield from omegaconf(self, node, full))
        if full in ONE_VALUE:
            value = one_value(node, full, self.data)
            return self.changed(full, type(value).__name__, value)
        return (yield from unknown(self, node, module, name))

    def _allowed(self, node: Call, full: str) -> Step:
        """An object that torch knows, of plain parts."""
        made = Call("new" if node.opcode == "new" else "reduce", node.func, ())
        if full == "collections.OrderedDict" and not node.args:
            self.begin(node, made)
        args = yield node.args, ""
        made.args = args if type(args) is tuple else ()
        if full == "builtins.set" and made.args:
            require_hashable(made.args[0] if type(made.args[0]) is list else [])
        pairs: list[object] = []
        yield from self.fill(pairs, node.pairs)
        made.pairs = pairs
        if node.items:
            raise Refusal(f"is {describe(node)}")
        states = yield from self.items(node.states)
        made.states = states
        return made

    # --- parts -------------------------------------------------------------------------------------------------------

    def items(self, items: Sequence[object]) -> Generator[tuple[object, str], Any, list[object]]:
        """Make several nodes plain, each called by its place."""
        made = []
        for at, item in enumerate(items):
            made.append((yield item, str(at)))
        return made

    def fill(self, made: list[object], pairs: Sequence[object]) -> Generator[tuple[object, str], Any, None]:
        """Add plain pairs to others; refuse keys that cannot be keys, or that would be one key."""
        retyped = False
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            text = key if type(key) is str else key_text(key)
            if type(key) in SCALARS:
                new = key
            else:
                new = yield key, text
                retyped = retyped or new is not key
                require_hashable([new])
            made.append(new)
            made.append((yield value, text))
        if retyped:
            known = [key for key in made[::2] if isinstance(key, str | int | float | bool | type(None))]
            if len(set(known)) < len(known):
                raise Refusal("has several keys that would become one")

    def _bytes_of(self, node: object) -> bytes:
        buffer = buffer_of(node, self.data)
        if buffer is None:
            raise Refusal(f"is {describe(node)}")
        if len(buffer.data) > limits.INFLATED_AT_ONCE:
            raise LimitError(f"{len(buffer.data)} bytes in the pickle would have to be written as text")
        return bytes(buffer.data)

    def begin(self, node: object, made: object) -> None:
        """Give the plain node of a container before it is filled, so that it can contain itself."""
        self._made[id(node)] = made
        self._open.discard(id(node))

    def changed(self, was: str, now: str, value: object = None) -> object:
        """Note that the value here is of another kind from now on; returns it."""
        name = ".".join(filter(None, self._keys))
        self._budget.name(name)
        self.changes.append(PlainValue(name, was, now))
        return value

    def _refused(self, problem: str) -> UnsupportedError:
        name = ".".join(filter(None, self._keys))
        return UnsupportedError(
            f"{name or 'the whole'!r} {problem}, and has no plain form",
            hint="ckpt rm takes it out, ckpt keep keeps the rest; --tensors-only takes the tensors alone",
        )


def _as_is(node: object) -> Step:
    yield from ()
    return node


_NODES: dict[type, Callable[[Plain, Any], Step]] = {
    Dict: Plain._dict,
    list: Plain._list,
    tuple: Plain._tuple,
    Set: Plain._set,
    bytes: Plain._bytes,
    Located: Plain._bytes,
    PersistentId: Plain._persistent,
    RawString: Plain._raw,
    ByteArray: Plain._bytearray,
    Inline: Plain._inline,
    Global: Plain._global,
    Call: Plain._call,
}
