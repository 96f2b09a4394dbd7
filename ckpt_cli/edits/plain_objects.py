"""Objects made plain by the class or function that makes them: numpy's, OmegaConf's, and those of simple classes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ckpt_cli.edits.plain_values import Refusal, bytes_node, complex_node, nested_lists, text_array
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import SCALARS, Call, Dict, Global, Inline
from ckpt_cli.pickles.tensors.inline_bytes import buffer_of
from ckpt_cli.pickles.tensors.numpy import array_text, numpy_dtype, numpy_scalar, object_array, scalar_parts
from ckpt_cli.scanner.allowlist import ALLOWED
from ckpt_cli.scanner.calls import resolve
from ckpt_cli.scanner.judge import judge

Step = Generator["tuple[object, str]", Any, object]
"""Makes one node plain: yields each node that it holds, with the key of it, and is sent what became of that."""


class Walker(Protocol):
    """The walk that an object is a part of."""

    data: bytes | memoryview
    """The pickle."""

    def begin(self, node: object, made: object) -> None:
        """Give the plain node of a container before it is filled, so that it can contain itself."""

    def items(self, items: Sequence[object]) -> Generator[tuple[object, str], Any, list[object]]:
        """Make several nodes plain."""

    def fill(self, made: list[object], pairs: Sequence[object]) -> Generator[tuple[object, str], Any, None]:
        """Add plain pairs to others."""

    def changed(self, was: str, now: str, value: object = None) -> object:
        """Note that the value here is of another kind from now on; returns it."""


Known = Callable[[Walker, Call, str], Step]


def _subclass(plain: Walker, node: Call, _: str) -> Step:
    """A tensor of a subclass, or with attributes: one of torch.Tensor with these."""
    args = node.args
    if type(args) is not tuple or len(args) != 4 or type(args[1]) is not Global:
        raise Refusal(f"is {describe(node)}")
    kind: Global = args[1]
    if kind.qualified not in ALLOWED:
        plain.changed(kind.qualified, "tensor")
        kind = Global("torch", "Tensor")
    parts = yield from plain.items((args[0], kind, args[2], args[3]))
    return Call("reduce", node.func, tuple(parts))


def _scalar(plain: Walker, node: Call, _: str) -> Step:
    """A scalar of numpy."""
    yield from ()
    value = numpy_scalar(node, plain.data)
    parts = scalar_parts(node)
    found = numpy_dtype(parts[0]) if parts is not None else None
    was = f"numpy.{found.dtype if found is not None and found.dtype else found}"
    if isinstance(value, bool | int | float | str):
        return plain.changed(was, type(value).__name__, value)
    if isinstance(value, complex):
        return plain.changed(was, "complex", complex_node(value))
    raise Refusal(f"is a scalar of numpy ({found})")


def _dtype(plain: Walker, node: Call, _: str) -> Step:
    """A dtype of numpy: its name."""
    yield from ()
    found = numpy_dtype(node)
    if found is None or found.fields is not None:
        raise Refusal(f"is {describe(node)}")
    return plain.changed("numpy.dtype", "str", str(found.dtype) if found.dtype else found.code)


def _array(plain: Walker, node: Call, _: str) -> Step:
    """An array of numpy that no tensor can be: of objects or text."""
    objects = object_array(node)
    if objects is not None:
        items = yield from plain.items(objects[1])
        return plain.changed("numpy.ndarray of objects", "list", nested_lists(objects[0], items))
    found = text_array(node, plain.data)
    if found is None:
        raise Refusal(f"is {array_text(node) or describe(node)}")
    return plain.changed("numpy.ndarray of text", "list", nested_lists(*found))


def _attributes(plain: Walker, node: Call, full: str) -> Step:
    """An object that is nothing but its attributes: a dict."""
    made = Dict([])
    plain.begin(node, made)
    plain.changed(full, "dict")
    for state in node.states:
        if type(state) is not Dict:
            raise Refusal(f"is {full} with a state that is not a dict")
        yield from plain.fill(made.pairs, state.pairs)
    return made


def _mapping(plain: Walker, node: Call, full: str) -> Step:
    """A mapping of another class: a dict."""
    made = Dict([])
    plain.begin(node, made)
    plain.changed(full, "dict")
    yield from plain.fill(made.pairs, node.pairs)
    return made


def _sequence(plain: Walker, node: Call, full: str) -> Step:
    """A list of another class: a list."""
    made: list[object] = []
    plain.begin(node, made)
    plain.changed(full, "list")
    for at, item in enumerate(node.items):
        made.append((yield item, str(at)))
    return made


def _frozenset(plain: Walker, node: Call, _: str) -> Step:
    args = node.args
    listed = args[0] if type(args) is tuple and len(args) == 1 else None
    if type(listed) is not list:
        raise Refusal(f"is {describe(node)}")
    items = yield from plain.items(listed)
    require_hashable(items)
    return plain.changed("frozenset", "set", Call("reduce", Global("builtins", "set"), (items,)))


def _of_bytes(plain: Walker, node: Call, _: str) -> Step:
    """Empty bytes, or those of protocol 0: a call of the class."""
    yield from ()
    raw = buffer_of(node, plain.data)
    if raw is None:
        raise Refusal(f"is {describe(node)}")
    return bytes_node(raw.decode() if raw.codec else bytes(raw.data))


def omegaconf(plain: Walker, node: Call, full: str) -> Step:
    """A container or a value of OmegaConf: what its `to_container` gives without resolving."""
    state = node.states[-1] if len(node.states) == 1 else None
    said = _state_of(state)
    if "_content" in said:
        content = said["_content"]
        now = "dict" if type(content) is Dict else "list" if type(content) is list else "value"
        plain.changed(full, now)
        return (yield content, "")
    if "_val" in said:
        return (yield said["_val"], "")
    raise Refusal(f"is an object of class {full}")


def unknown(plain: Walker, node: Call, module: str, name: str) -> Step:
    """An object of a class that is not known, where the pickle shows that it is one of a few simple kinds."""
    full = f"{module}.{name}"
    member = resolve(node)
    if member is not None and member != (module, name):
        return (yield from _member(plain, *member))
    verdict = judge(module, name).verdict
    if verdict not in ("unknown", "harmless"):
        raise Refusal(f"is {full}(…), which is not data")
    args = node.args if type(node.args) is tuple else ()
    if verdict == "harmless" or _has_attributes(node) or (node.pairs and node.items):
        raise Refusal(f"is an object of class {full}")
    if node.pairs:
        return (yield from _mapping(plain, node, full))
    if node.items:
        return (yield from _sequence(plain, node, full))
    if node.opcode == "reduce" and len(args) == 1 and not node.states:
        value = yield args[0], ""
        return plain.changed(f"{full} (an enum)", "value", value)
    if node.opcode == "new" and args and not node.states:
        parts = yield from plain.items(args)
        alone = len(parts) == 1  # a number or text of another class; a named tuple has several
        return plain.changed(full, "value" if alone else "tuple", parts[0] if alone else tuple(parts))
    raise Refusal(f"is an object of class {full}")


def _member(plain: Walker, module: str, name: str) -> Step:
    """A member of an enum by its name, as Python 3.11.0 to 3.11.3 pickles it: without its value."""
    yield from ()
    kind, _, member = name.rpartition(".")
    if not kind or judge(module, kind).verdict not in ("unknown", "harmless", "allowed"):
        raise Refusal(f"is {module}.{name}, which is not data")
    return plain.changed(f"{module}.{kind} (an enum, of which the file has no values)", "its name", member)


def _has_attributes(node: Call) -> bool:
    """True for a state other than nothing, or than the mapping itself that many dicts with attributes have."""
    return any(state is not None and state is not node and _state_size(state) for state in node.states)


def _state_of(state: object) -> Mapping[str, object]:
    """The attributes of an object's state, by their names."""
    pairs = state.pairs if type(state) is Dict else []
    return {key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True) if isinstance(key, str)}


def _state_size(state: object) -> int:
    if type(state) is Dict:
        return len(state.pairs)
    return any(map(_state_size, state)) if type(state) is tuple and len(state) == 2 else state is not None


def require_hashable(items: Sequence[object]) -> None:
    """Raise where an item of a set, or a key, cannot be one in Python."""
    agenda = list(items)
    while agenda:
        item = agenda.pop()
        if type(item) is tuple:
            agenda.extend(item)
        elif type(item) not in SCALARS and not _is_hashable(item):
            raise Refusal(f"has {describe(item)} as a key or an item of a set, which it cannot be")


def _is_hashable(item: object) -> bool:
    if type(item) is Call and type(item.func) is Global:
        return item.func.name in ("encode", "complex", "device", "Size", "_get_layout")
    return type(item) in (Global, Inline)


def _known() -> Iterator[tuple[str, Known]]:
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        yield f"{module}.scalar", _scalar
        yield f"{module}._reconstruct", _array
    for module in ("numpy.core.numeric", "numpy._core.numeric"):
        yield f"{module}._frombuffer", _array
    yield "numpy.dtype", _dtype
    yield "argparse.Namespace", _attributes
    yield "types.SimpleNamespace", _attributes
    yield "collections.defaultdict", _mapping
    yield "collections.deque", _sequence
    yield "builtins.frozenset", _frozenset
    yield "builtins.bytes", _of_bytes
    yield "torch._tensor._rebuild_from_type_v2", _subclass


KNOWN: Mapping[str, Known] = dict(_known())
"""How to make plain what a class or function makes, by its name."""
