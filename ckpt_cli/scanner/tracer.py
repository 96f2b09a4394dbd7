"""The machine that traces a pickle: opcodes that are followed further than a reader would, and noted."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ckpt_cli.errors import MalformedError
from ckpt_cli.pickles.graph import ByteArray, Call, Extension, Global, Inline, PersistentId, RawString
from ckpt_cli.pickles.machine import SHORT, Handler, Machine, Table, entering
from ckpt_cli.pickles.read import OPCODES
from ckpt_cli.scanner.joblib import Enclosing, array_after, is_wrapper, without_changes
from ckpt_cli.scanner.packed import decoding_costs, may_hide

_NAME_COSTS = 12
"""Opcodes in whose time a name is read and noted."""

_TEXTS = 20_000
"""Strings of one pickle that may hide another and are kept to be searched."""


class Tracer(Machine):
    """A machine that remembers what passes through it, and goes on where CPython's would."""

    __slots__ = ("calls", "changes", "computed", "extensions", "innocent", "outer", "pushed", "storages", "texts",
                 "unsearched", "used", "weighed")  # fmt: skip

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__(data)
        self.calls: list[Call] = []
        self.changes: list[tuple[str, object, object]] = []
        self.computed: list[Global] = []
        self.extensions: list[int] = []
        self.texts: list[object] = []
        self.storages: list[PersistentId] = []
        self.unsearched = self.weighed = 0
        self.innocent: set[str] = set()
        """Short strings in which nothing has room: nearly all tensors have the same ones."""
        self.outer = Enclosing()
        self.pushed: dict[Global, int] = {}
        """The number of times that each name was put on the stack; names are hashed by identity."""
        self.used: dict[Global, int] = {}
        """The number of times that each was taken from it to be called."""

    def memoize(self) -> None:
        """Memoize the top of the stack under the number of things memoized, as CPython counts them."""
        unset = 1 if self.memo and type(self.memo[0]) is object else 0
        self.put(len(self.memo) - unset + len(self.sparse))

    def put(self, slot: int) -> None:
        """Memoize the top of the stack."""
        if self.sparse and slot == len(self.memo):
            self.sparse.pop(str(slot), None)
        super().put(slot)

    def note_push(self) -> None:
        """Count the name on top of the stack, if that is what it is."""
        top = self.stack[-1]
        if type(top) is Global:
            self.pushed[top] = self.pushed.get(top, 0) + 1

    def note_call(self, call: Call) -> None:
        """Remember a call."""
        self.calls.append(call)
        if type(call.func) is Global:
            self.used[call.func] = self.used.get(call.func, 0) + 1

    def change(self, doing: str, argument: object) -> None:
        """Remember what is done to the top of the stack."""
        self.changes.append((doing, self.stack[-1], argument))


# --- opcodes that are followed further than a reader would ---------------------------------------------------------

_OVER: Table = {}

_enter = entering(_OVER)


def _after(code: bytes, note: Callable[[Machine], None]) -> None:
    """Enter an opcode that does what it does for a reader, and is then noted."""
    handler = OPCODES[code[0]]

    @_enter(code)
    def run(m: Machine, pos: int) -> int:
        pos = handler(m, pos)
        note(m)
        return pos


def _note_push(m: Machine) -> None:
    assert isinstance(m, Tracer)
    m.weighed += _NAME_COSTS
    m.note_push()


def _note_call(m: Machine) -> None:
    assert isinstance(m, Tracer)
    call = m.stack[-1]
    assert isinstance(call, Call)
    m.note_call(call)


def _note_text(m: Machine) -> None:
    """Remember a string in which a pickle that imports something has room."""
    assert isinstance(m, Tracer)
    top = m.stack[-1]
    text = top.data if isinstance(top, ByteArray) else top
    plain = text.raw if isinstance(text, RawString) else text
    if type(plain) is str and len(plain) <= SHORT and plain in m.innocent:
        return
    m.weighed += decoding_costs(plain)
    if not isinstance(text, Inline) and not may_hide(plain):
        if type(plain) is str and len(plain) <= SHORT and len(m.innocent) < _TEXTS:
            m.innocent.add(plain)
        return
    if len(m.texts) < _TEXTS:
        m.texts.append(text)
    else:
        m.unsearched += 1


def _note_inst(m: Machine) -> None:
    """An INST is a call that never had its name on the stack."""
    assert isinstance(m, Tracer)
    _note_call(m)
    func = m.calls[-1].func
    if type(func) is Global:
        m.pushed[func] = m.pushed.get(func, 0) + 1


def _note_extension(m: Machine) -> None:
    assert isinstance(m, Tracer)
    node = m.stack[-1]
    if isinstance(node, Extension):
        m.extensions.append(node.code)


def _note_storage(m: Machine) -> None:
    assert isinstance(m, Tracer)
    node = m.stack[-1]
    if isinstance(node, PersistentId):
        m.storages.append(node)


for _code in (b"c", b"h", b"j", b"g", b"2"):
    _after(_code, _note_push)
for _code in (b"R", b"\x81", b"\x92", b"o"):
    _after(_code, _note_call)
_after(b"i", _note_inst)
for _code in (b"X", b"\x8c", b"\x8d", b"U", b"T", b"C", b"B", b"\x8e", b"\x96", b"V", b"S"):
    _after(_code, _note_text)
for _code in (b"P", b"Q"):
    _after(_code, _note_storage)
for _code in (b"\x82", b"\x83", b"\x84"):
    _after(_code, _note_extension)


@_enter(b"q")
def _binput(m: Machine, pos: int) -> int:
    m.put(m.data[pos])
    return pos + 1


@_enter(b"r")
def _long_binput(m: Machine, pos: int) -> int:
    m.put(struct.unpack_from("<I", m.data, pos)[0])
    return pos + 4


@_enter(b"\x80")
def _proto(m: Machine, pos: int) -> int:
    m.protocol = m.data[pos]
    return pos + 1


@_enter(b"\x95")
def _frame(m: Machine, pos: int) -> int:
    assert isinstance(m, Tracer)
    after = OPCODES[0x95](m, pos)
    m.outer.frame(after, struct.unpack_from("<Q", m.data, pos)[0])
    return after


@_enter(b"\x93")
def _stack_global(m: Machine, pos: int) -> int:
    assert isinstance(m, Tracer)
    name, module = m.stack.pop(), m.stack[-1]
    if isinstance(name, str | RawString) and isinstance(module, str | RawString):
        m.stack[-1] = m.name(*(text if isinstance(text, str) else text.text for text in (module, name)))
    else:
        from ckpt_cli.pickles.describe import describe

        computed = Global(describe(module), describe(name))
        m.computed.append(computed)
        m.stack[-1] = computed
    m.note_push()
    return pos


def _changing(code: bytes, doing: str) -> None:
    """Enter an opcode that changes its target: one that is not plain data is noted, where a reader would give up."""
    handler = OPCODES[code[0]]

    @_enter(code)
    def run(m: Machine, pos: int) -> int:
        assert isinstance(m, Tracer)
        argument = m.stack[-1] if m.stack else None
        try:
            pos = handler(m, pos)
        except MalformedError:
            m.change(doing, argument)
        return pos


for _code, _doing in (
    (b"b", "gives state to"),
    (b"a", "appends to"),
    (b"e", "appends to"),
    (b"s", "sets items of"),
    (b"u", "sets items of"),
    (b"\x90", "adds items to"),
):
    _changing(_code, _doing)

_build = _OVER[b"b"]


@_enter(b"b")
def _build_of_joblib(m: Machine, pos: int) -> int:
    """After the state of an array of joblib its bytes follow, in which another unpickler goes on with opcodes."""
    assert isinstance(m, Tracer)
    pos = _build(m, pos)
    wrapper = m.stack[-1]
    if not isinstance(wrapper, Call) or not is_wrapper(wrapper):
        return pos
    if m.outer.frame_end > pos:
        raise MalformedError("has an array of joblib within a frame, behind which joblib reads it")
    array = array_after(wrapper, m.data, pos)
    if not array.aligned and not array.pickled:
        other = Tracer(m.data)
        m.outer.follow(m, other, _ON, pos)
        if other.calls and (other.globals or other.computed):
            raise MalformedError("calls names in what joblib reads as an array")
    m.stack[-1] = None
    if array.pickled:
        m.stack.pop()
        m.outer.enter(m)
    return array.end


TRACED: list[Handler] = [_OVER.get(bytes((code,)), OPCODES[code]) for code in range(256)]
"""Every opcode, as it is traced."""

_ON = without_changes(TRACED)
