"""A graph written as a pickle again: what CPython's pickler would write for the objects that the graph stands for.

Opcodes are those of protocol 2 wherever it can say the same, because torch's weights_only loader takes only these, and
in the order and with the memo of CPython's C pickler (Modules/_pickle.c): a graph that torch.save wrote comes out byte
for byte. Containers and calls are memoized before their contents, so that cycles end; the walk does not recurse.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from ckpt_cli.errors import UnsupportedError
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
    nodes_of,
    protocol_of,
)

Write = Callable[["bytes | memoryview"], object]
"""Takes the next bytes of the pickle."""

_BATCH = 1000
"""Items that CPython puts between a MARK and its SETITEMS or APPENDS."""

_COPIED = 1 << 20
"""Bytes of a long string that are copied at a time."""

_HELD = 1 << 16
"""Bytes gathered before they are written."""


def write_pickle(root: object, data: bytes | memoryview, write: Write, protocol: int | None = None) -> None:
    """Write the pickle of a node; `data` is the pickle that the graph was read from, for strings left in it.

    `protocol` is what `protocol_of` says of the root's nodes, where that is known already.
    Raises UnsupportedError for an integer that no opcode can hold.
    """
    emitter = _Emitter(data, write)
    emitter.run(protocol or protocol_of(nodes_of(root, within_rows=False)), root)


class _Then:
    """Opcodes to be written once what stands above them on the agenda is."""

    __slots__ = ("code",)

    def __init__(self, code: bytes) -> None:
        self.code = code


class _Made:
    """The end of a tuple or a call whose parts are written: its opcode, or what the memo has of it by now."""

    __slots__ = ("code", "node")

    def __init__(self, node: object, code: bytes) -> None:
        self.node = node
        self.code = code


_BEGIN, _BUILD, _PERSISTENT = _Then(b"("), _Then(b"b"), _Then(b"Q")
_MARK, _POP = b"(", b"0"
_NEW = {"reduce": b"R", "new": b"\x81", "new_ex": b"\x92"}
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")
"""The opcode that ends a tuple of up to three items, which needs no MARK."""

_BYTES = [bytes((number,)) for number in range(256)]
_PUTS = [b"q" + byte for byte in _BYTES]
_GETS = [b"h" + byte for byte in _BYTES]
_WIDE = struct.Struct("<cI").pack
"""An opcode and an argument of four bytes."""


class _Emitter:
    """One pickle in the making."""

    def __init__(self, data: bytes | memoryview, write: Write) -> None:
        self._data = data
        self._write = write
        self._held = bytearray()
        self._memo: dict[int, int] = {}
        """The slot of each node by its identity; all of them live as long as the graph."""
        self._slots = 0
        """Slots that are filled; `_memo` lacks those of what rows have in them, which nothing else can refer to."""
        self._rows: dict[object, tuple[Callable[..., bytes], tuple[bytes, ...]]] = {}
        """How to pack the rows of each template whose storage keys are of one length."""
        self._agenda: list[Iterator[object]] = []
        """The nodes still to be written, the next things last."""

    def flush(self) -> None:
        """Hand on what is gathered."""
        self._write(bytes(self._held))
        self._held.clear()

    def run(self, protocol: int, root: object) -> None:
        """Write a whole pickle: the node with all that it holds."""
        agenda, held, memo = self._agenda, self._held, self._memo
        held += b"\x80" + bytes((protocol,))
        agenda.append(iter((root,)))
        while agenda:
            if len(held) >= _HELD:
                self.flush()
            for node in agenda[-1]:
                kind = type(node)
                if kind is int:
                    held += _integer(node)  # type: ignore[arg-type]  # its type was compared
                elif (key := id(node)) in memo:
                    self._get(memo[key])
                elif kind in _SIMPLE:
                    held += _SIMPLE[kind](node)
                else:
                    waiting = len(agenda)
                    self._save(node)
                    if len(agenda) > waiting or len(held) >= _HELD:
                        break  # what it holds comes first
            else:
                agenda.pop()
        held += b"."
        self.flush()

    def _save(self, node: object) -> None:
        """Write a node that is met for the first time, or put on the agenda what it takes."""
        save = _SAVERS.get(type(node))
        if save is None:
            raise TypeError(f"a pickle's graph cannot hold a {type(node).__name__}")
        save(self, node)

    def _put(self, node: object) -> None:
        slot = self._memo[id(node)] = self._slots
        self._slots = slot + 1
        self._held += _PUTS[slot] if slot < 256 else _WIDE(b"r", slot)

    def _get(self, slot: int) -> None:
        self._held += _GETS[slot] if slot < 256 else _WIDE(b"j", slot)

    # --- strings -----------------------------------------------------------------------------------------------------

    def _str(self, node: str) -> None:
        raw = node.encode("utf-8", "surrogatepass")
        self._held += _WIDE(b"X", len(raw))
        self._long(raw)
        self._put(node)

    def _bytes(self, node: bytes) -> None:
        self._held += _bytes_head(len(node))
        self._long(node)
        self._put(node)

    def _raw_string(self, node: RawString) -> None:
        self._held += _raw_head(len(node.raw)) + node.raw
        self._put(node)

    def _inline(self, node: Inline) -> None:
        """A string that was left in the pickle it was read from, copied from there."""
        if node.kind == "escaped":
            raw = node.unescaped(self._data)
            self._held += _str_head(len(raw))
            self._long(raw)
            self._put(node)
            return
        self._held += {"bytes": _bytes_head, "raw": _raw_head, "str": _str_head}[node.kind](node.nbytes)
        self._copy(node)
        self._put(node)

    def _bytearray(self, node: ByteArray) -> None:
        data = node.data
        if isinstance(data, Inline):
            self._held += b"\x96" + struct.pack("<Q", data.nbytes)
            self._copy(data)
        elif isinstance(data, bytes):
            self._held += b"\x96" + struct.pack("<Q", len(data)) + data
        self._put(node)

    def _copy(self, node: Inline) -> None:
        for begin in range(node.offset, node.offset + node.nbytes, _COPIED):
            self._long(self._data[begin : min(begin + _COPIED, node.offset + node.nbytes)])

    def _long(self, raw: bytes | memoryview) -> None:
        """Write bytes that need not be gathered first."""
        if len(raw) < _HELD:
            self._held += raw
        else:
            self.flush()
            self._write(raw)

    # --- containers --------------------------------------------------------------------------------------------------

    def _tuple(self, node: tuple[object, ...]) -> None:
        if self._flat(node):
            return
        code = _TUPLES[len(node)] if len(node) <= 3 else b"t"
        if code == b"t":
            self._held += _MARK
        self._agenda.append(chain(node, (_Made(node, code) if node else _Then(code),)))

    def _flat(self, node: tuple[object, ...]) -> bool:
        """Write a short tuple of things that hold nothing, such as a reference to a storage; False for another one."""
        count, memo = len(node), self._memo
        if not 0 < count <= _SHORT or not _LEAVES.issuperset(kinds := [*map(type, node)]):
            return False
        held = self._held
        if count > 3:
            held += _MARK
        for item, kind in zip(node, kinds, strict=True):
            if kind is int:
                held += _integer(item)  # type: ignore[arg-type]  # its type was compared
            elif (slot := memo.get(id(item))) is not None:
                held += _GETS[slot] if slot < 256 else _WIDE(b"j", slot)
            else:
                _SAVERS[kind](self, item)
        held += _TUPLES[count] if count <= 3 else b"t"
        self._put(node)
        return True

    def _list(self, node: list[object]) -> None:
        self._held += b"]"
        self._put(node)
        self._batches(node, 1, b"a", b"e", exact=True)

    def _dict(self, node: Dict) -> None:
        self._held += b"}"
        self._put(node)
        self._batches(node.pairs, 2, b"s", b"u", exact=True)

    def _set(self, node: Set) -> None:
        if node.frozen:
            self._held += _MARK
            self._agenda.append(chain(node.items, (_Made(node, b"\x91"),)))
            return
        self._held += b"\x8f"
        self._put(node)
        for begin in reversed(range(0, len(node.items), _BATCH)):
            self._agenda.append(chain((_BEGIN,), node.items[begin : begin + _BATCH], (_Then(b"\x90"),)))

    def _batches(self, items: Sequence[object], width: int, one: bytes, many: bytes, *, exact: bool) -> None:
        """Put items on the agenda in CPython's batches, each item of `width` nodes.

        A dict or list itself (`exact`) is written by another loop of CPython's than what an iterator gives: only a
        single item of all goes without a MARK there, and a dict of a multiple of 1,000 items ends with an empty batch.
        """
        count = len(items) // width
        if not count:
            return
        begins = list(range(0, count, _BATCH))
        if exact and width == 2 and count > 1 and count % _BATCH == 0:
            begins.append(count)
        for begin in reversed(begins):
            batch = items[begin * width : min(begin + _BATCH, count) * width]
            alone = count == 1 if exact else len(batch) == width
            end = (_Then(one if alone else many),)
            self._agenda.append(chain(batch, end) if alone else chain((_BEGIN,), batch, end))

    # --- names and calls ---------------------------------------------------------------------------------------------

    def _global(self, node: Global) -> None:
        module, name = (part.encode("utf-8", "surrogateescape") for part in (node.module, node.name))
        if b"." in name:  # which only STACK_GLOBAL can import
            for raw in (module, name):
                self._held += _str_head(len(raw)) + raw
            self._held += b"\x93"
        else:
            self._held += b"c" + module + b"\n" + name + b"\n"
        self._put(node)

    def _row(self, node: Call, row: Any) -> bool:
        """Write a call that was read as a row; False for one whose nodes are to be written one by one."""
        key = row, len(node.key)
        if key not in self._rows:
            nodes = (row.func, row.word, row.kind, row.location, row.hooks)
            slots = [self._memo.get(id(each), -1) for each in nodes]
            gets = [_GETS[slot] if slot < 256 else _WIDE(b"j", slot) for slot in slots]
            if min(slots) < 0:  # the first of its kind, which puts them into the memo
                return False
            self._rows[key] = row.packing(gets, key[1])
        slot = self._slots
        if slot < 256:  # whose opcodes are shorter
            return False
        pack, parts = self._rows[key]
        raw = node.key.encode()
        if row.size:
            func, word, location, view, stride, tail, args, call = parts
            self._held += pack(func, raw, word, slot, location, slot + 1, view, slot + 2, stride, slot + 3, tail,
                               slot + 4, args, slot + 5, call, slot + 6)  # fmt: skip
        else:
            func, word, location, view, args, call = parts
            self._held += pack(
                func, raw, word, slot, location, slot + 1, view, slot + 2, args, slot + 3, call, slot + 4
            )
        self._slots = slot + row.slots
        self._memo[id(node)] = self._slots - 1
        self._fill(node)
        return True

    def _call(self, node: Call) -> None:
        if node.row is not None and self._row(node, node.row):
            return
        if node.opcode == "inst":
            arguments = node.args if isinstance(node.args, tuple) else ()
            self._held += _MARK
            self._agenda.append(iter((node.func, *arguments, _Made(node, b"o"))))
            return
        if node.opcode == "reduce" and node.args == () and (slot := self._memo.get(id(node.func))) is not None:
            self._get(slot)  # an empty OrderedDict, which every tensor has for its hooks
            self._held += b")R"
            self._put(node)
            self._fill(node)
            return
        made = _Made(node, _NEW[node.opcode])
        more = (node.kwargs, made) if node.opcode == "new_ex" else (made,)
        self._agenda.append(iter((node.func, node.args, *more)))

    def _made(self, made: _Made) -> None:
        """The opcode of a tuple or call, unless writing its parts has written it: then those parts are dropped."""
        node = made.node
        slot = self._memo.get(id(node))
        if slot is None:
            self._held += made.code
            self._put(node)
            if isinstance(node, Call):
                self._fill(node)
        else:
            parts = len(node) if isinstance(node, tuple) and len(node) <= 3 else 1
            parts = 2 + (node.opcode == "new_ex") if isinstance(node, Call) and node.opcode != "inst" else parts
            self._held += b"1" if made.code in (b"t", b"o", b"\x91") else _POP * parts
            self._get(slot)

    def _fill(self, node: Call) -> None:
        """Write what was done to a call's result: its items, its pairs, its states."""
        for state in reversed(node.states):
            self._agenda.append(iter((state, _BUILD)))
        if node.pairs:
            self._batches(node.pairs, 2, b"s", b"u", exact=False)
        if node.items:
            self._batches(node.items, 1, b"a", b"e", exact=False)

    def _persistent(self, node: PersistentId) -> None:
        pid = node.pid
        if type(pid) is tuple and id(pid) not in self._memo and self._flat(pid):
            self._held += _PERSISTENT.code
        else:
            self._agenda.append(iter((pid, _PERSISTENT)))

    def _out_of_band(self, node: OutOfBand) -> None:
        self._held += b"\x97\x98" if node.readonly else b"\x97"

    def _extension(self, node: Extension) -> None:
        code = node.code
        if 0 <= code < 256:
            self._held += b"\x82" + bytes((code,))
        else:
            self._held += b"\x83" + struct.pack("<H", code) if 0 <= code < 65536 else b"\x84" + struct.pack("<i", code)


_SMALL = [b"K" + byte for byte in _BYTES]
"""The encoding of each integer of one byte."""

_LEAVES, _SHORT = frozenset([int, str, Letter, Global]), 8
"""The types of nodes that hold nothing, and the items of a tuple of these that is written in one go."""


def _integer(number: int) -> bytes:
    if 0 <= number < 256:
        return _SMALL[number]
    if 0 <= number < 65536:
        return b"M" + struct.pack("<H", number)
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    raw = _shortest(number)
    if len(raw) < 256:
        return b"\x8a" + bytes((len(raw),)) + raw
    if len(raw) >= 1 << 31:
        raise UnsupportedError("an integer is too large to be pickled")
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def _shortest(number: int) -> bytes:
    """Two's complement in as few bytes as it takes (CPython's `pickle.encode_long`)."""
    size = number.bit_length() // 8 + 1
    raw = number.to_bytes(size, "little", signed=True)
    return raw[:-1] if number < 0 and size > 1 and raw[-1] == 0xFF and raw[-2] & 0x80 else raw


def _str_head(nbytes: int) -> bytes:
    return b"X" + struct.pack("<I", nbytes) if nbytes < 1 << 32 else b"\x8d" + struct.pack("<Q", nbytes)


def _bytes_head(nbytes: int) -> bytes:
    if nbytes < 256:
        return b"C" + bytes((nbytes,))
    return b"B" + struct.pack("<I", nbytes) if nbytes < 1 << 32 else b"\x8e" + struct.pack("<Q", nbytes)


def _raw_head(nbytes: int) -> bytes:
    return b"U" + bytes((nbytes,)) if nbytes < 256 else b"T" + struct.pack("<i", nbytes)


_SIMPLE: dict[type, Callable[..., bytes]] = {
    type(None): lambda _: b"N",
    bool: lambda node: b"\x88" if node else b"\x89",
    int: _integer,
    float: lambda node: b"G" + struct.pack(">d", node),
    _Then: lambda node: node.code,
}
"""The nodes that are written in one go and never memoized."""

_SAVERS: dict[type, Callable[..., None]] = {
    str: _Emitter._str,
    Letter: _Emitter._str,
    tuple: _Emitter._tuple,
    _Made: _Emitter._made,
    Call: _Emitter._call,
    PersistentId: _Emitter._persistent,
    Global: _Emitter._global,
    Dict: _Emitter._dict,
    list: _Emitter._list,
    bytes: _Emitter._bytes,
    Located: _Emitter._bytes,
    RawString: _Emitter._raw_string,
    Inline: _Emitter._inline,
    Set: _Emitter._set,
    ByteArray: _Emitter._bytearray,
    Extension: _Emitter._extension,
    OutOfBand: _Emitter._out_of_band,
}
