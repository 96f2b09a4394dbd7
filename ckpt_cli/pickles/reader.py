"""A pickle's opcodes, interpreted symbolically: nothing is imported, called or hashed.

Every opcode of protocols 0 to 5 (CPython's pickletools is the reference) is one small function in a table. Lengths
are checked against the data before a slice is taken; opcodes, memory and text meet the limits of `limits`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import NoReturn

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError
from ckpt_cli.pickles.graph import (
    ByteArray,
    Call,
    Dict,
    Extension,
    Global,
    Graph,
    Inline,
    OutOfBand,
    PersistentId,
    RawString,
    Set,
)

_CHECK_EVERY = 1 << 14
"""Opcodes between two looks at the limits."""

_SHORT = 255
"""Bytes up to which a string needs no accounting: its opcode pays for it."""


class _State:
    """The machine: its data, stack, marks and memo."""

    __slots__ = ("data", "globals", "marks", "memo", "nodes", "pos", "protocol", "sparse_memo", "stack", "text")

    def __init__(self, data: bytes | memoryview, pos: int) -> None:
        self.data = data
        self.pos = pos
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: list[object] = []
        self.sparse_memo: dict[int, object] = {}
        """Memo slots that were not filled in order."""
        self.globals: dict[tuple[str, str], Global] = {}
        self.protocol = 0
        self.text = 0
        self.nodes = 0

    def take(self, nbytes: int) -> bytes:
        """The next bytes of the data."""
        begin = self.pos
        end = begin + nbytes
        if nbytes < 0 or end > len(self.data):
            raise TruncatedError(f"the pickle ends within an argument of {nbytes} bytes at byte {begin}")
        self.pos = end
        piece = self.data[begin:end]
        return piece if type(piece) is bytes else bytes(piece)

    def line(self) -> bytes:
        """The next line, without its newline."""
        begin = self.pos
        data = self.data
        if type(data) is bytes:
            end = data.find(b"\n", begin)
        else:
            end = next((at for at in range(begin, min(len(data), begin + limits.INLINE_BYTES)) if data[at] == 10), -1)
        if end < 0:
            raise TruncatedError(f"the pickle has no end of the line that begins at byte {begin}")
        if end - begin > limits.INLINE_BYTES:
            raise LimitError(f"the pickle has a line of {end - begin} bytes")
        self.pos = end + 1
        return bytes(data[begin:end])

    def number(self, code: struct.Struct) -> int:
        """The next integer of a fixed width."""
        pos = self.pos
        if pos + code.size > len(self.data):
            raise TruncatedError(f"the pickle ends within a number at byte {pos}")
        self.pos = pos + code.size
        value: int = code.unpack_from(self.data, pos)[0]
        return value

    def string(self, kind: str, nbytes: int) -> object:
        """The next `nbytes` bytes as a node; a long one is left where it is."""
        if nbytes > _SHORT:
            if nbytes > limits.INLINE_BYTES:
                begin = self.pos
                if begin + nbytes > len(self.data):
                    raise TruncatedError(f"the pickle ends within a string of {nbytes} bytes at byte {begin}")
                self.pos = begin + nbytes
                return Inline(kind, begin, nbytes)
            self.text += nbytes
            if self.text > limits.PICKLE_TEXT:
                raise LimitError(f"the pickle holds more than {limits.PICKLE_TEXT} bytes of text")
        raw = self.take(nbytes)
        if kind == "str":
            return raw.decode("utf-8", "surrogatepass")
        return RawString(raw) if kind == "raw" else raw

    def since_mark(self) -> list[object]:
        """Pop what was pushed since the last MARK."""
        if not self.marks:
            raise MalformedError(f"the pickle has no mark for the opcode before byte {self.pos}")
        mark = self.marks.pop()
        stack = self.stack
        if mark > len(stack):
            self.underflow()
        items = stack[mark:]
        del stack[mark:]
        return items

    def underflow(self) -> NoReturn:
        """Raise for an opcode that finds too little on the stack."""
        raise MalformedError(f"the pickle's stack is empty at byte {self.pos}")

    def remember(self, slot: int, node: object) -> None:
        """Put into the memo."""
        memo = self.memo
        if slot == len(memo):
            memo.append(node)
        elif 0 <= slot < len(memo):
            memo[slot] = node
        else:
            self.sparse_memo[slot] = node

    def recall(self, slot: int) -> None:
        """Push from the memo."""
        if 0 <= slot < len(self.memo):
            self.stack.append(self.memo[slot])
        elif slot in self.sparse_memo:
            self.stack.append(self.sparse_memo[slot])
        else:
            raise MalformedError(f"the pickle asks for memo {slot}, which it never put")

    def name(self, module: str, name: str) -> Global:
        """The node of a global, one for each name."""
        key = (module, name)
        node = self.globals.get(key)
        if node is None:
            node = self.globals[key] = Global(module, name)
        return node


_Handler = Callable[[_State], None]
_OPCODES: list[_Handler | None] = [None] * 256

_U8, _U16, _U32, _I32, _U64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<i", "<Q"))
_F64 = struct.Struct(">d")


def _opcode(code: bytes) -> Callable[[_Handler], _Handler]:
    """Enter a function into the table."""

    def enter(handler: _Handler) -> _Handler:
        _OPCODES[code[0]] = handler
        return handler

    return enter


# --- the opcodes that fill a torch pickle, fastest paths first -------------------------------------------------------


@_opcode(b"q")
def _binput(s: _State) -> None:
    slot = s.data[s.pos]
    s.pos += 1
    memo = s.memo
    if slot == len(memo):
        memo.append(s.stack[-1])
    else:
        s.remember(slot, s.stack[-1])


@_opcode(b"r")
def _long_binput(s: _State) -> None:
    slot: int = _U32.unpack_from(s.data, s.pos)[0]
    s.pos += 4
    memo = s.memo
    if slot == len(memo):
        memo.append(s.stack[-1])
    else:
        s.remember(slot, s.stack[-1])


@_opcode(b"h")
def _binget(s: _State) -> None:
    slot = s.data[s.pos]
    s.pos += 1
    if slot < len(s.memo):
        s.stack.append(s.memo[slot])
    else:
        s.recall(slot)


@_opcode(b"j")
def _long_binget(s: _State) -> None:
    s.recall(s.number(_U32))


@_opcode(b"(")
def _mark(s: _State) -> None:
    s.marks.append(len(s.stack))


@_opcode(b"K")
def _binint1(s: _State) -> None:
    s.stack.append(s.data[s.pos])
    s.pos += 1


@_opcode(b"X")
def _binunicode(s: _State) -> None:
    s.stack.append(s.string("str", s.number(_U32)))


@_opcode(b"t")
def _tuple(s: _State) -> None:
    items = tuple(s.since_mark())
    s.stack.append(items)


@_opcode(b"Q")
def _binpersid(s: _State) -> None:
    s.stack[-1] = PersistentId(s.stack[-1])


@_opcode(b"R")
def _reduce(s: _State) -> None:
    args = s.stack.pop()
    s.stack[-1] = Call("reduce", s.stack[-1], args)
    s.nodes += 1


@_opcode(b"\x85")
def _tuple1(s: _State) -> None:
    s.stack[-1] = (s.stack[-1],)


@_opcode(b"\x86")
def _tuple2(s: _State) -> None:
    last = s.stack.pop()
    s.stack[-1] = (s.stack[-1], last)


@_opcode(b"\x87")
def _tuple3(s: _State) -> None:
    last = s.stack.pop()
    middle = s.stack.pop()
    s.stack[-1] = (s.stack[-1], middle, last)


@_opcode(b")")
def _empty_tuple(s: _State) -> None:
    s.stack.append(())


@_opcode(b"\x89")
def _newfalse(s: _State) -> None:
    s.stack.append(False)


@_opcode(b"\x88")
def _newtrue(s: _State) -> None:
    s.stack.append(True)


@_opcode(b"M")
def _binint2(s: _State) -> None:
    s.stack.append(s.number(_U16))


@_opcode(b"J")
def _binint(s: _State) -> None:
    s.stack.append(s.number(_I32))


# --- containers ------------------------------------------------------------------------------------------------------


@_opcode(b"}")
def _empty_dict(s: _State) -> None:
    s.stack.append(Dict([]))
    s.nodes += 1


@_opcode(b"]")
def _empty_list(s: _State) -> None:
    s.stack.append([])
    s.nodes += 1


@_opcode(b"\x8f")
def _empty_set(s: _State) -> None:
    s.stack.append(Set([], frozen=False))
    s.nodes += 1


@_opcode(b"d")
def _dict(s: _State) -> None:
    pairs = s.since_mark()
    _even(s, pairs)
    s.stack.append(Dict(pairs))
    s.nodes += 1


@_opcode(b"l")
def _list(s: _State) -> None:
    items = s.since_mark()
    s.stack.append(items)
    s.nodes += 1


@_opcode(b"\x91")
def _frozenset(s: _State) -> None:
    items = s.since_mark()
    s.stack.append(Set(items, frozen=True))
    s.nodes += 1


def _even(s: _State, pairs: list[object]) -> None:
    if len(pairs) % 2:
        raise MalformedError(f"the pickle has a key without a value at byte {s.pos}")


def _pairs_of(s: _State) -> list[object]:
    target = s.stack[-1]
    if isinstance(target, Dict | Call):
        return target.pairs
    raise MalformedError(f"the pickle sets items of a {type(target).__name__} at byte {s.pos}")


def _items_of(s: _State) -> list[object]:
    target = s.stack[-1]
    if type(target) is list:
        return target
    if isinstance(target, Call):
        return target.items
    raise MalformedError(f"the pickle appends to a {type(target).__name__} at byte {s.pos}")


@_opcode(b"u")
def _setitems(s: _State) -> None:
    pairs = s.since_mark()
    _even(s, pairs)
    _pairs_of(s).extend(pairs)


@_opcode(b"s")
def _setitem(s: _State) -> None:
    value = s.stack.pop()
    key = s.stack.pop()
    _pairs_of(s).extend((key, value))


@_opcode(b"e")
def _appends(s: _State) -> None:
    items = s.since_mark()
    _items_of(s).extend(items)


@_opcode(b"a")
def _append(s: _State) -> None:
    item = s.stack.pop()
    _items_of(s).append(item)


@_opcode(b"\x90")
def _additems(s: _State) -> None:
    items = s.since_mark()
    target = s.stack[-1]
    if not isinstance(target, Set | Call):
        raise MalformedError(f"the pickle adds items to a {type(target).__name__} at byte {s.pos}")
    target.items.extend(items)


# --- names and calls -------------------------------------------------------------------------------------------------


@_opcode(b"c")
def _global(s: _State) -> None:
    module = s.line().decode("utf-8", "surrogateescape")
    s.stack.append(s.name(module, s.line().decode("utf-8", "surrogateescape")))


@_opcode(b"\x93")
def _stack_global(s: _State) -> None:
    name = _text(s, s.stack.pop())
    s.stack[-1] = s.name(_text(s, s.stack[-1]), name)


def _text(s: _State, node: object) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, RawString):
        return node.text
    raise MalformedError(f"the pickle names a global by a {type(node).__name__} at byte {s.pos}")


@_opcode(b"\x81")
def _newobj(s: _State) -> None:
    args = s.stack.pop()
    s.stack[-1] = Call("new", s.stack[-1], args)
    s.nodes += 1


@_opcode(b"\x92")
def _newobj_ex(s: _State) -> None:
    kwargs = s.stack.pop()
    args = s.stack.pop()
    s.stack[-1] = Call("new_ex", s.stack[-1], args, kwargs)
    s.nodes += 1


@_opcode(b"i")
def _inst(s: _State) -> None:
    module = s.line().decode("utf-8", "surrogateescape")
    name = s.line().decode("utf-8", "surrogateescape")
    args = tuple(s.since_mark())
    s.stack.append(Call("inst", s.name(module, name), args))
    s.nodes += 1


@_opcode(b"o")
def _obj(s: _State) -> None:
    func, *args = s.since_mark() or s.underflow()
    s.stack.append(Call("inst", func, tuple(args)))
    s.nodes += 1


@_opcode(b"b")
def _build(s: _State) -> None:
    state = s.stack.pop()
    target = s.stack[-1]
    if not isinstance(target, Call):
        raise MalformedError(f"the pickle gives state to a {type(target).__name__} at byte {s.pos}")
    target.states.append(state)


@_opcode(b"P")
def _persid(s: _State) -> None:
    s.stack.append(PersistentId(s.line().decode("utf-8", "surrogateescape")))


@_opcode(b"\x82")
def _ext1(s: _State) -> None:
    s.stack.append(Extension(s.number(_U8)))


@_opcode(b"\x83")
def _ext2(s: _State) -> None:
    s.stack.append(Extension(s.number(_U16)))


@_opcode(b"\x84")
def _ext4(s: _State) -> None:
    s.stack.append(Extension(s.number(_I32)))


# --- plain values ----------------------------------------------------------------------------------------------------


@_opcode(b"N")
def _none(s: _State) -> None:
    s.stack.append(None)


@_opcode(b"G")
def _binfloat(s: _State) -> None:
    s.stack.append(s.number(_F64))


@_opcode(b"F")
def _float(s: _State) -> None:
    s.stack.append(float(s.line()))


@_opcode(b"I")
def _int(s: _State) -> None:
    line = s.line()
    s.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line, 0))


@_opcode(b"L")
def _long(s: _State) -> None:
    s.stack.append(int(s.line().removesuffix(b"L"), 0))


@_opcode(b"\x8a")
def _long1(s: _State) -> None:
    s.stack.append(int.from_bytes(s.take(s.number(_U8)), "little", signed=True))


@_opcode(b"\x8b")
def _long4(s: _State) -> None:
    nbytes = s.number(_I32)
    if nbytes > limits.INLINE_BYTES:
        raise LimitError(f"the pickle has an integer of {nbytes} bytes")
    s.stack.append(int.from_bytes(s.take(nbytes), "little", signed=True))


@_opcode(b"V")
def _unicode(s: _State) -> None:
    s.stack.append(s.line().decode("raw-unicode-escape"))


@_opcode(b"\x8c")
def _short_binunicode(s: _State) -> None:
    s.stack.append(s.string("str", s.number(_U8)))


@_opcode(b"\x8d")
def _binunicode8(s: _State) -> None:
    s.stack.append(s.string("str", s.number(_U64)))


@_opcode(b"S")
def _string(s: _State) -> None:
    import codecs

    line = s.line().strip()
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[:1] != line[-1:]:
        raise MalformedError(f"the pickle has a string without quotes before byte {s.pos}")
    s.stack.append(RawString(codecs.escape_decode(line[1:-1])[0]))


@_opcode(b"T")
def _binstring(s: _State) -> None:
    s.stack.append(s.string("raw", s.number(_I32)))


@_opcode(b"U")
def _short_binstring(s: _State) -> None:
    s.stack.append(s.string("raw", s.number(_U8)))


@_opcode(b"B")
def _binbytes(s: _State) -> None:
    s.stack.append(s.string("bytes", s.number(_U32)))


@_opcode(b"C")
def _short_binbytes(s: _State) -> None:
    s.stack.append(s.string("bytes", s.number(_U8)))


@_opcode(b"\x8e")
def _binbytes8(s: _State) -> None:
    s.stack.append(s.string("bytes", s.number(_U64)))


@_opcode(b"\x96")
def _bytearray8(s: _State) -> None:
    s.stack.append(ByteArray(s.string("bytes", s.number(_U64))))
    s.nodes += 1


@_opcode(b"\x97")
def _next_buffer(s: _State) -> None:
    s.stack.append(OutOfBand())


@_opcode(b"\x98")
def _readonly_buffer(s: _State) -> None:
    if isinstance(s.stack[-1], OutOfBand):
        s.stack[-1].readonly = True


# --- the machine itself ----------------------------------------------------------------------------------------------


@_opcode(b"\x80")
def _proto(s: _State) -> None:
    s.protocol = s.number(_U8)
    if s.protocol > 5:
        raise MalformedError(f"the pickle says protocol {s.protocol}; 5 is the newest")


@_opcode(b"\x95")
def _frame(s: _State) -> None:
    nbytes = s.number(_U64)
    if s.pos + nbytes > len(s.data):
        raise TruncatedError(f"the pickle ends within a frame of {nbytes} bytes at byte {s.pos}")


@_opcode(b"0")
def _pop(s: _State) -> None:
    if s.marks and s.marks[-1] == len(s.stack):
        s.marks.pop()
    else:
        s.stack.pop()


@_opcode(b"1")
def _pop_mark(s: _State) -> None:
    s.since_mark()


@_opcode(b"2")
def _dup(s: _State) -> None:
    s.stack.append(s.stack[-1])


@_opcode(b"g")
def _get(s: _State) -> None:
    s.recall(int(s.line()))


@_opcode(b"p")
def _put(s: _State) -> None:
    s.remember(int(s.line()), s.stack[-1])


@_opcode(b"\x94")
def _memoize(s: _State) -> None:
    s.remember(len(s.memo) + len(s.sparse_memo), s.stack[-1])


def read_pickle(data: bytes | memoryview, *, offset: int = 0) -> Graph:
    """Read the pickle that begins at byte `offset`, running nothing.

    Raises MalformedError, TruncatedError or LimitError; their text says where in the pickle, the caller says which
    file.
    """
    state = _State(data, offset)
    try:
        _run(state)
    except CkptError:
        raise
    except IndexError:
        if state.pos >= len(data):
            raise TruncatedError("the pickle ends before its STOP opcode") from None
        state.underflow()
    except struct.error:
        raise TruncatedError(f"the pickle ends within a number at byte {state.pos}") from None
    except (ValueError, OverflowError) as error:  # text that is no number, bytes that are no UTF-8
        raise MalformedError(f"the pickle has a bad argument before byte {state.pos}: {error}") from None
    if state.marks or not state.stack:
        raise MalformedError("the pickle stops in the middle of a value")
    root = state.stack.pop()
    if state.stack:
        raise MalformedError(f"the pickle leaves {len(state.stack)} values behind when it stops")
    return Graph(root, state.protocol, state.pos - offset, tuple(state.globals.values()), state.nodes)


def _run(state: _State) -> None:
    """Interpret opcodes up to STOP."""
    data, table = state.data, _OPCODES
    blocks = sys.getallocatedblocks() + limits.PICKLE_BLOCKS
    for _ in range(0, limits.PICKLE_OPCODES, _CHECK_EVERY):
        for _ in range(_CHECK_EVERY):
            code = data[state.pos]
            state.pos += 1
            handler = table[code]
            if handler is None:
                if code == 46:  # STOP
                    return
                raise MalformedError(f"the pickle has an unknown opcode {code:#04x} at byte {state.pos - 1}")
            handler(state)
        if sys.getallocatedblocks() > blocks or len(state.sparse_memo) > _CHECK_EVERY * 16:
            raise LimitError("the pickle builds far more objects than a checkpoint of its kind needs")
    raise LimitError(f"the pickle has more than {limits.PICKLE_OPCODES} opcodes")
