"""Read a pickle that ends too early: what was complete when it ended, and nothing that was not.

A pickle says what a value belongs to only after the value. What is certain at the end of a cut pickle is which
containers were being filled: their marks are open. Each is taken with the items that are known to be complete, those
that another one follows; a value at the very end, of which more might have come, is left out. Nothing is run.
"""

from __future__ import annotations

import struct

from ckpt_cli.errors import FormatError, LimitError, TruncatedError
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString, References
from ckpt_cli.pickles.machine import Machine
from ckpt_cli.pickles.read import OPCODES, read_pickle

_KEYS = (str, int, RawString)
"""The types of keys of containers that open up to entries."""

_BATCH = 1000
"""Items that a pickler puts after one mark (CPython's Lib/pickle.py `_BATCHSIZE`)."""


def read_cut_pickle(data: bytes | memoryview) -> tuple[Graph, bool]:
    """Read a pickle that may end too early; returns the graph, and True if it is whole.

    Raises MalformedError or LimitError, as `read_pickle` does, for one that is wrong before its end.
    """
    try:
        return read_pickle(data), True
    except TruncatedError:
        pass
    machine = Machine(data)
    position = 0
    try:
        while position < machine.size:
            position = OPCODES[data[position]](machine, position + 1)
    except LimitError:
        raise
    except (FormatError, ValueError, OverflowError, IndexError, struct.error):
        pass  # within an argument: `read_pickle` said that it is only the end that is missing
    root = _root(machine)
    names, persistent = tuple(machine.globals.values()), References(machine.persistent)
    return Graph(root, machine.protocol, len(data), names, persistent, data), False


def _root(machine: Machine) -> object:
    """Close every open mark, the innermost first, and return the outermost value; an empty dict where it is unknown."""
    closed: object = None  # the container that was closed last: it is on top of the stack
    stack = machine.stack
    while machine.below:
        items = _with_state(stack, closed)
        stack = machine.below.pop()
        target = stack[-1] if stack else None
        closed = _filled(target, items, closed)
        if closed is None and isinstance(target, Global | Dict | Call | list):
            stack.pop()  # what was about to be called, or is not known to have any item
    return _outermost(_with_state(stack, closed))


def _filled(target: object, items: list[object], closed: object) -> object:
    """Give a container the items after its mark that are certain; None where it has none, or is not a container."""
    if isinstance(target, Dict | Call):
        if len(target.pairs) % (2 * _BATCH) or not _takes_pairs(target):
            return None
        target.pairs = [*target.pairs, *_certain_pairs(items, closed)]
        return target if target.pairs else None
    if type(target) is list and len(target) % _BATCH == 0:
        target.extend(items if items and _is_closed(items[-1], closed) else items[:-1])
        return target if any(_opens(item) for item in target) else None
    return None


def _takes_pairs(target: Dict | Call) -> bool:
    """True for a dict, or an object of a class that is called one and has nothing else yet."""
    if isinstance(target, Dict):
        return True
    name = target.func.name if isinstance(target.func, Global) else ""
    return name.lower().endswith("dict") and not target.items and not target.states


def _with_state(stack: list[object], closed: object) -> list[object]:
    """Return a stack whose last dict, if it was closed last and an object precedes it, became the object's state."""
    if closed is not None and len(stack) > 1 and stack[-1] is closed and isinstance(closed, Dict):
        target = stack[-2]
        if isinstance(target, Call) and not target.states and not target.pairs:
            target.states = [closed]
            return stack[:-1]
    return stack


def _certain_pairs(items: list[object], closed: object) -> list[object]:
    """Return the keys and values, one after another, that are known to be complete."""
    pairs: list[object] = []
    for number in range(0, len(items) - 1, 2):
        key, value, *behind = items[number : number + 3]
        if not isinstance(key, _KEYS) or isinstance(value, Global):
            break
        if not (isinstance(behind[0], _KEYS) if behind else _is_closed(value, closed) or _has_items(value)):
            break
        pairs += (key, value)
    if len(pairs) > 2 and _is_closed(pairs[-1], closed) and _is_empty(pairs[-3]):
        del pairs[-4:]  # a dict of one item has no mark: whether this is its item, only what follows would say
    return pairs


def _is_closed(value: object, closed: object) -> bool:
    """True if a value is the container that was closed last, or the object whose state that is."""
    if closed is None:
        return False
    return value is closed or (isinstance(value, Call) and len(value.states) == 1 and value.states[0] is closed)


def _has_items(value: object) -> bool:
    """True for a dict that was given items: nothing but these is still to come."""
    return isinstance(value, Dict) and bool(value.pairs)


def _is_empty(value: object) -> bool:
    return isinstance(value, Dict | Call) and _takes_pairs(value) and not value.pairs


def _opens(item: object) -> bool:
    """True if an item is more than a scalar, so that a list with it opens up to entries."""
    return not isinstance(item, str | int | float | RawString | type(None))


def _outermost(stack: list[object]) -> object:
    """Return the first value of a stack without marks, each container on it an item of the one before.

    So are all containers of protocol 0, and those of later ones that have one item.
    """
    rest = iter(stack)
    root = target = next(rest, None)
    for item in rest:
        value: object = item
        if isinstance(target, Dict):
            value = next(rest, None)
            if not isinstance(item, _KEYS) or not isinstance(value, Dict | Call | list):
                break
            target.pairs = [*target.pairs, item, value]
        elif isinstance(target, Call) and isinstance(item, Dict) and not target.states:
            target.states = [item]
        elif isinstance(target, list) and isinstance(item, Dict | Call | list):
            target.append(item)
        else:
            break
        target = value
    return root if isinstance(root, Dict | Call | list) else Dict([])
