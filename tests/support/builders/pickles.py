"""Pickles, opcode by opcode.

Everything that pushes one value is an `Ops`. `value` makes one of plain data; the other functions make those of calls,
names and torch's objects, and take plain data or `Ops` as their parts:

    pickled({"weight": tensor("0", (2, 3)), "epoch": 7})
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

STOP = b"."


class Ops(bytes):
    """Opcodes that together push one value."""


def pickled(root: Any, protocol: int | None = 2) -> bytes:
    """A whole pickle of one value; without a PROTO opcode where `protocol` is None."""
    return (b"" if protocol is None else b"\x80" + bytes((protocol,))) + value(root) + STOP


def value(item: Any) -> Ops:
    """Plain data by protocol 2's opcodes; `Ops` are taken as they are."""
    if isinstance(item, Ops):
        return item
    if item is None or isinstance(item, bool):
        return Ops({None: b"N", True: b"\x88", False: b"\x89"}[item])
    if isinstance(item, int):
        return integer(item)
    if isinstance(item, float):
        return Ops(b"G" + struct.pack(">d", item))
    if isinstance(item, str):
        raw = item.encode("utf-8", "surrogatepass")
        return Ops(b"X" + struct.pack("<I", len(raw)) + raw)
    if isinstance(item, bytes):
        return Ops(b"B" + struct.pack("<I", len(item)) + item)
    if isinstance(item, tuple):
        return marked(b"t", item)
    if isinstance(item, list):
        return Ops(b"]" + marked(b"e", item))
    if isinstance(item, dict):
        return Ops(b"}" + marked(b"u", flat(item.items())))
    raise TypeError(f"no opcodes for a {type(item).__name__}")


def integer(number: int) -> Ops:
    """The shortest opcode that holds a number."""
    if 0 <= number < 256:
        return Ops(b"K" + bytes((number,)))
    if -(1 << 31) <= number < 1 << 31:
        return Ops(b"J" + struct.pack("<i", number))
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return Ops((b"\x8a" + bytes((len(raw),)) if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw))) + raw)


def marked(code: bytes, items: Iterable[Any]) -> Ops:
    """MARK, the items, and the opcode that takes them."""
    return Ops(b"(" + b"".join(map(value, items)) + code)


def flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Key, value, key, value…"""
    return [item for pair in pairs for item in pair]


def raw_string(raw: bytes) -> Ops:
    """A `str` of Python 2."""
    return Ops(b"T" + struct.pack("<i", len(raw)) + raw)


def put(slot: int, item: Any) -> Ops:
    """A value that the memo keeps."""
    return Ops(value(item) + b"r" + struct.pack("<I", slot))


def get(slot: int) -> Ops:
    """A value that the memo kept."""
    return Ops(b"j" + struct.pack("<I", slot))


# --- names and calls -------------------------------------------------------------------------------------------------


def named(qualified: str) -> Ops:
    """A global by its dotted name; the last part is what the module before it has."""
    module, _, name = qualified.rpartition(".")
    return Ops(b"c" + module.encode() + b"\n" + name.encode() + b"\n")


def call(func: str | Ops, *args: Any) -> Ops:
    """What a function or class returns for some arguments."""
    return Ops(_callee(func) + value(args) + b"R")


def new(kind: str | Ops, *args: Any) -> Ops:
    """An object made without `__init__` (protocol 2)."""
    return Ops(_callee(kind) + value(args) + b"\x81")


def built(target: Ops, state: Any) -> Ops:
    """An object that is given its state."""
    return Ops(target + value(state) + b"b")


def filled(target: Ops, pairs: Iterable[tuple[Any, Any]]) -> Ops:
    """A mapping that is given its items."""
    return Ops(target + marked(b"u", flat(pairs)))


def persistent(pid: Any) -> Ops:
    """A reference to something outside the pickle."""
    return Ops(value(pid) + b"Q")


def _callee(func: str | Ops) -> Ops:
    return func if isinstance(func, Ops) else named(func)


# --- torch's objects -------------------------------------------------------------------------------------------------

ITEMSIZE = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
            "Bool": 1, "ComplexFloat": 8, "ComplexDouble": 16}  # fmt: skip
"""Bytes of an element of each typed storage."""


def ordered_dict(pairs: Iterable[tuple[Any, Any]] = (), state: Any = None) -> Ops:
    """An OrderedDict, with its attributes where it has some: `{"_metadata": …}` of a state_dict."""
    made = call("collections.OrderedDict")
    pairs = list(pairs)
    made = filled(made, pairs) if pairs else made
    return made if state is None else built(made, state)


def storage(key: str, numel: int, kind: str = "Float", location: str = "cpu") -> Ops:
    """A reference to a storage; `Untyped` is the one whose elements are bytes."""
    module = "torch.storage" if kind == "Untyped" else "torch"
    return persistent(("storage", named(f"{module}.{kind}Storage"), key, location, numel))


def tensor(
    key: str,
    shape: Sequence[int],
    kind: str = "Float",
    *,
    stride: Sequence[int] | None = None,
    offset: int = 0,
    numel: int | None = None,
    requires_grad: bool = False,
    version: int = 2,
) -> Ops:
    """A view of a typed storage (`version` 1 or 2), contiguous and as large as the storage unless said otherwise."""
    at = storage(key, prod(shape) if numel is None else numel, kind)
    view = (at, offset, tuple(shape), tuple(row_major(shape) if stride is None else stride))
    if version == 1:
        return call("torch._utils._rebuild_tensor", *view)
    return call("torch._utils._rebuild_tensor_v2", *view, requires_grad, ordered_dict())


def tensor_v3(key: str, shape: Sequence[int], dtype: str, nbytes: int) -> Ops:
    """A contiguous view of an untyped storage of so many bytes."""
    at = storage(key, nbytes, "Untyped")
    view = (at, 0, tuple(shape), tuple(row_major(shape)))
    return call("torch._utils._rebuild_tensor_v3", *view, False, ordered_dict(), named(f"torch.{dtype}"))


def parameter(data: Ops, *, requires_grad: bool = True) -> Ops:
    """A torch.nn.Parameter."""
    return call("torch._utils._rebuild_parameter", data, requires_grad, ordered_dict())


def row_major(shape: Sequence[int]) -> list[int]:
    """The stride of a contiguous tensor."""
    return [prod(max(size, 1) for size in shape[place + 1 :]) for place in range(len(shape))]
