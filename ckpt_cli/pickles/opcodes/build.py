"""Opcodes that move values on the stack, and that make containers and calls of them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ckpt_cli.errors import MalformedError
from ckpt_cli.pickles.graph import Call, Dict, RawString, Set
from ckpt_cli.pickles.machine import LATER, Machine, Table, entering

BUILDERS: Table = {}

_enter = entering(BUILDERS)
_u32 = struct.Struct("<I").unpack_from


# --- the memo and the stack ------------------------------------------------------------------------------------------


@_enter(b"q")
def _binput(m: Machine, pos: int) -> int:
    slot = m.data[pos]
    if slot == len(m.memo):
        m.memo.append(m.stack[-1])
    else:
        m.put(slot)
    return pos + 1


@_enter(b"r")
def _long_binput(m: Machine, pos: int) -> int:
    memo = m.memo
    slot: int = _u32(m.data, pos)[0]
    if slot == len(memo):
        memo.append(m.stack[-1])
    else:
        m.put(slot)
    return pos + 4


@_enter(b"p")
def _put(m: Machine, pos: int) -> int:
    line = m.line(pos)
    m.put(int(line))
    return pos + len(line) + 1


@_enter(b"\x94")
def _memoize(m: Machine, pos: int) -> int:
    m.memoize()
    return pos


@_enter(b"h")
def _binget(m: Machine, pos: int) -> int:
    slot = m.data[pos]
    memo = m.memo
    if 0 < slot < len(memo) and (node := memo[slot]) is not LATER:
        m.stack.append(node)
    else:
        m.get(slot)
    return pos + 1


@_enter(b"j")
def _long_binget(m: Machine, pos: int) -> int:
    m.get(_u32(m.data, pos)[0])
    return pos + 4


@_enter(b"g")
def _get(m: Machine, pos: int) -> int:
    line = m.line(pos)
    m.get(int(line))
    return pos + len(line) + 1


@_enter(b"(")
def _mark(m: Machine, pos: int) -> int:
    m.below.append(m.stack)
    m.stack = []
    return pos


@_enter(b"0")
def _pop(m: Machine, pos: int) -> int:
    if m.stack or not m.below:
        m.stack.pop()
    else:
        m.since_mark()
    return pos


@_enter(b"1")
def _pop_mark(m: Machine, pos: int) -> int:
    m.since_mark()
    return pos


@_enter(b"2")
def _dup(m: Machine, pos: int) -> int:
    m.stack.append(m.stack[-1])
    return pos


# --- tuples, lists, dicts, sets --------------------------------------------------------------------------------------


@_enter(b"\x85")
def _tuple1(m: Machine, pos: int) -> int:
    stack = m.stack
    stack[-1] = (stack[-1],)
    return pos


@_enter(b"\x86")
def _tuple2(m: Machine, pos: int) -> int:
    stack = m.stack
    last = stack.pop()
    stack[-1] = (stack[-1], last)
    return pos


@_enter(b"\x87")
def _tuple3(m: Machine, pos: int) -> int:
    stack = m.stack
    last = stack.pop()
    middle = stack.pop()
    stack[-1] = (stack[-1], middle, last)
    return pos


@_enter(b"t")
def _tuple(m: Machine, pos: int) -> int:
    items = tuple(m.since_mark())
    m.stack.append(items)
    return pos


@_enter(b"]")
def _empty_list(m: Machine, pos: int) -> int:
    m.stack.append([])
    return pos


@_enter(b"l")
def _list(m: Machine, pos: int) -> int:
    items = m.since_mark()
    m.stack.append(items)
    return pos


@_enter(b"}")
def _empty_dict(m: Machine, pos: int) -> int:
    m.stack.append(Dict([]))
    return pos


@_enter(b"d")
def _dict(m: Machine, pos: int) -> int:
    pairs = _pairs(m)
    m.stack.append(Dict(pairs))
    return pos


@_enter(b"\x8f")
def _empty_set(m: Machine, pos: int) -> int:
    m.stack.append(Set([], frozen=False))
    return pos


@_enter(b"\x91")
def _frozenset(m: Machine, pos: int) -> int:
    items = m.since_mark()
    m.stack.append(Set(items, frozen=True))
    return pos


@_enter(b"a")
def _append(m: Machine, pos: int) -> int:
    item = m.stack.pop()
    _append_to(m, [item])
    return pos


@_enter(b"e")
def _appends(m: Machine, pos: int) -> int:
    _append_to(m, m.since_mark())
    return pos


@_enter(b"s")
def _setitem(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    key = m.stack.pop()
    _set_in(m, [key, value])
    return pos


@_enter(b"u")
def _setitems(m: Machine, pos: int) -> int:
    _set_in(m, _pairs(m))
    return pos


@_enter(b"\x90")
def _additems(m: Machine, pos: int) -> int:
    items = m.since_mark()
    target = m.stack[-1]
    if isinstance(target, Set):
        target.items.extend(items)
    elif isinstance(target, Call):
        target.items = _more(target.items, items)
    elif items:
        m.unexpected("adds items to")
    return pos


def _append_to(m: Machine, items: list[object]) -> None:
    target = m.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif isinstance(target, Call):
        target.items = _more(target.items, items)
    elif items:
        m.unexpected("appends to")


def _set_in(m: Machine, pairs: list[object]) -> None:
    target = m.stack[-1]
    if isinstance(target, Dict):
        target.pairs.extend(pairs)
    elif isinstance(target, Call):
        target.pairs = _more(target.pairs, pairs)
    elif pairs:
        m.unexpected("sets items of")


def _more(had: Sequence[object], items: list[object]) -> list[object]:
    """Return what a call was given before and now: most are given nothing, so the list is made when it is needed."""
    if isinstance(had, list):
        had.extend(items)
        return had
    return items


def _pairs(m: Machine) -> list[object]:
    pairs = m.since_mark()
    if len(pairs) % 2:
        raise MalformedError("has a key without a value")
    return pairs


# --- names and calls -------------------------------------------------------------------------------------------------


@_enter(b"c")
def _global(m: Machine, pos: int) -> int:
    node, pos = m.named(pos)
    m.stack.append(node)
    return pos


@_enter(b"\x93")
def _stack_global(m: Machine, pos: int) -> int:
    name = m.stack.pop()
    m.stack[-1] = m.name(_text(m.stack[-1]), _text(name))
    return pos


@_enter(b"R")
def _reduce(m: Machine, pos: int) -> int:
    stack = m.stack
    args = stack.pop()
    stack[-1] = Call("reduce", stack[-1], args)
    return pos


@_enter(b"\x81")
def _newobj(m: Machine, pos: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = Call("new", m.stack[-1], args)
    return pos


@_enter(b"\x92")
def _newobj_ex(m: Machine, pos: int) -> int:
    kwargs = m.stack.pop()
    args = m.stack.pop()
    m.stack[-1] = Call("new_ex", m.stack[-1], args, kwargs)
    return pos


@_enter(b"i")
def _inst(m: Machine, pos: int) -> int:
    node, pos = m.named(pos)
    args = m.since_mark()
    m.stack.append(Call("inst", node, tuple(args)))
    return pos


@_enter(b"o")
def _obj(m: Machine, pos: int) -> int:
    items = m.since_mark()
    m.stack.append(Call("inst", items[0], tuple(items[1:])))
    return pos


@_enter(b"b")
def _build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Call):
        target.states = _more(target.states, [state])
    elif state is not None:
        m.unexpected("gives state to")
    return pos


@_enter(b"Q")
def _binpersid(m: Machine, pos: int) -> int:
    m.stack[-1] = m.refer(m.stack[-1])
    return pos


def _text(node: object) -> str:
    if isinstance(node, str):
        return node
    if isinstance(node, RawString):
        return node.text
    raise MalformedError(f"names a global by a {type(node).__name__}")
