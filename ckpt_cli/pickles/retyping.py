"""New values written as the type that the old ones have: scalars of numpy, and strings of Python 2."""

from __future__ import annotations

import struct

from ckpt_cli.errors import UnsupportedError, ValueRefusedError
from ckpt_cli.pickles.arguments import text_of
from ckpt_cli.pickles.graph import Call, Global, RawString
from ckpt_cli.pickles.numpy_calls import NumpyDType, is_scalar, numpy_dtype, packing_of


def retyped(name: str, value: object, old: object, *, cast: bool) -> object | None:
    """A plain value as a node of the type of an old node; None where plain data are right as they are.

    Raises ValueRefusedError where a numpy dtype cannot hold the value, unless `cast` converts it as numpy would.
    """
    if isinstance(old, RawString) and isinstance(value, str):
        return RawString(value.encode("utf-8", "surrogatepass"))
    if not isinstance(old, Call) or not is_scalar(old):
        return None
    found = numpy_dtype(old.args[0]) if isinstance(old.args, tuple) else None
    if found is None:
        return None
    if found.code[:1] == "U" and isinstance(value, str):
        return _text(name, value, old, found)
    layout = packing_of(found)
    if layout is None or not isinstance(value, bool | int | float):
        return None
    return _scalar(old, old.args[0], _packed(name, value, found, layout, cast=cast))


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
    text = str(value) if isinstance(value, float) or abs(value) < 1 << 128 else "so large an integer"
    return ValueRefusedError(
        f"numpy.{kind} cannot hold {text} ({name!r} is such a scalar)", hint="--cast converts it as numpy does"
    )


def _text(name: str, value: str, old: Call, found: NumpyDType) -> Call:
    """A numpy.str_, whose dtype has the length of its text."""
    dtype = old.args[0] if isinstance(old.args, tuple) else None
    raw = value.encode(f"utf-32-{'be' if found.order == '>' else 'le'}", "surrogatepass") or bytes(4)
    code = f"U{len(raw) // 4}"
    if code == found.code:
        return _scalar(old, dtype, raw)
    state = dtype.states[-1] if isinstance(dtype, Call) and dtype.states else None
    if not isinstance(dtype, Call) or not isinstance(dtype.args, tuple) or type(state) is not tuple or len(state) < 6:
        raise UnsupportedError(f"{name!r} is a numpy.str_ of another length, in a way that cannot be written")
    other = Call(dtype.opcode, dtype.func, (code, *dtype.args[1:]))
    other.states = [(*state[:5], len(raw), *state[6:])]
    return _scalar(old, other, raw)


def _scalar(old: Call, dtype: object, raw: bytes) -> Call:
    """The call of an old scalar with other bytes, which are written in the way of the old ones."""
    content: object = raw
    before = old.args[1] if isinstance(old.args, tuple) else None
    if isinstance(before, RawString):
        content = RawString(raw)
    elif isinstance(before, Call):  # protocols 0 to 2 have bytes as text
        is_encode = isinstance(before.func, Global) and before.func.name == "encode"
        func = before.func if is_encode else Global("_codecs", "encode")
        content = Call("reduce", func, (raw.decode("latin-1"), "latin1"))
    elif text_of(before) is not None:
        content = raw.decode("latin-1")
    return Call(old.opcode, old.func, (dtype, content))
