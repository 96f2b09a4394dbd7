"""New values written as the type that the old ones have: scalars of numpy, and strings of Python 2."""

from __future__ import annotations

import struct

from ckpt_cli.errors import UnsupportedError, ValueRefusedError
from ckpt_cli.pickles.graph import Call, Global, RawString
from ckpt_cli.pickles.tensors.numpy import NumpyDType, numpy_dtype, packing_of, scalar_parts

_ELSIZE = 5
"""The index of the element's bytes in the state of a dtype (numpy's descriptor.c, `arraydescr_reduce`)."""


def retyped(name: str, value: object, old: object, *, cast: bool) -> object | None:
    """A plain value as a node of the type of an old node; None where plain data are right as they are.

    Raises ValueRefusedError where a numpy dtype cannot hold the value, unless `cast` converts it as numpy would.
    """
    if isinstance(old, RawString) and isinstance(value, str):
        return RawString(value.encode("utf-8", "surrogatepass"))
    parts = scalar_parts(old) if isinstance(old, Call) else None
    if not isinstance(old, Call) or parts is None:
        return None
    dtype, before = parts
    found = numpy_dtype(dtype)
    if found is None:
        return None
    if found.code[:1] == "U" and isinstance(value, str):
        raw = value.encode(f"utf-32-{'be' if found.order == '>' else 'le'}", "surrogatepass") or bytes(4)
        return Call(old.opcode, old.func, (_resized(name, dtype, found, len(raw)), _content(before, raw)))
    layout = packing_of(found)
    if layout is None or not isinstance(value, bool | int | float):
        return None
    return Call(old.opcode, old.func, (dtype, _content(before, _packed(name, value, found, layout, cast=cast))))


def _packed(name: str, value: float, found: NumpyDType, layout: str, *, cast: bool) -> bytes:
    """The bytes of a number in a dtype."""
    kind = found.dtype.name if found.dtype else ""
    try:
        if kind == "bool":
            return struct.pack(layout, bool(value))
        if kind.startswith(("int", "uint")):
            whole = int(value)
            return struct.pack(layout, _wrapped(whole, layout) if cast else whole)
        raw = struct.pack(layout, value)
    except (struct.error, OverflowError):
        if not cast:
            raise _cannot_hold(name, value, kind) from None
        return struct.pack(layout, float("inf") if value > 0 else float("-inf"))
    if value and not cast and not any(struct.unpack(layout, raw)):
        raise _cannot_hold(name, value, kind)
    return raw


def _wrapped(value: int, layout: str) -> int:
    """An integer cut to the bits of a dtype, as numpy and torch cast it."""
    bits = 8 * struct.calcsize(layout)
    low = value & ((1 << bits) - 1)
    return low - (1 << bits) if layout[-1].islower() and low >> (bits - 1) else low


def _cannot_hold(name: str, value: float, kind: str) -> ValueRefusedError:
    text = str(value) if abs(value) < 1e300 else "so large a number"
    return ValueRefusedError(
        f"numpy.{kind} cannot hold {text} ({name!r} is such a scalar)", hint="--cast converts it as numpy does"
    )


def _resized(name: str, dtype: object, found: NumpyDType, nbytes: int) -> object:
    """The dtype of a numpy.str_ of another length."""
    code = f"U{nbytes // 4}"
    if code == found.code:
        return dtype
    if isinstance(dtype, Call) and isinstance(dtype.args, tuple) and dtype.states:
        state = dtype.states[-1]
        if isinstance(state, tuple) and len(state) > _ELSIZE:
            other = Call(dtype.opcode, dtype.func, (code, *dtype.args[1:]))
            other.states = [(*state[:_ELSIZE], nbytes, *state[_ELSIZE + 1 :])]
            return other
    raise UnsupportedError(f"{name!r} is a numpy.str_ of another length, in a way that cannot be written")


def _content(before: object, raw: bytes) -> object:
    """The node of a scalar's new bytes, written in the way of the old ones."""
    if isinstance(before, RawString):
        return RawString(raw)
    if isinstance(before, Call):  # protocols 0 to 2 have bytes as text
        is_encode = isinstance(before.func, Global) and before.func.name == "encode"
        func = before.func if is_encode else Global("_codecs", "encode")
        return Call("reduce", func, (raw.decode("latin-1"), "latin1"))
    return raw
