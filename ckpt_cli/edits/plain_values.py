"""Single values made plain: dates, paths, numbers of the standard library, bytes, and arrays of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from ckpt_cli import limits
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global
from ckpt_cli.pickles.tensors.arguments import is_count, text_of
from ckpt_cli.pickles.tensors.inline_bytes import buffer_of
from ckpt_cli.pickles.tensors.numpy import numpy_dtype


class Refusal(Exception):  # noqa: N818 - it becomes an error once its place is known
    """A value that has no plain form; the text says what it is."""


def bytes_node(raw: bytes, kind: str = "encode") -> Call:
    """Return the call that makes bytes, or a bytearray, as protocol 2 has them."""
    if kind == "bytearray":
        return Call("reduce", Global("builtins", "bytearray"), (raw.decode("latin-1"), "latin-1"))
    return Call("reduce", Global("_codecs", "encode"), (raw.decode("latin-1"), "latin1"))


def complex_node(value: complex) -> Call:
    """Return the call that makes a complex number."""
    return Call("reduce", Global("builtins", "complex"), (value.real, value.imag))


def nested_lists(shape: Sequence[int], items: Sequence[object]) -> object:
    """Return the items of an array, in row-major order, as `tolist` nests them."""
    nested = list(items)
    for size in reversed(shape[1:]):
        count = len(nested) // size if size else 0
        nested = [nested[at * size : (at + 1) * size] for at in range(count)]
    return nested if shape else nested[0]


def text_array(node: Call, data: bytes | memoryview) -> tuple[tuple[int, ...], list[object]] | None:
    """Return the shape and the items, in row-major order, of an array of text; None for any other call."""
    state = node.states[-1] if len(node.states) == 1 else None
    if type(state) is not tuple or len(state) not in (4, 5):
        return None
    shape, dtype, fortran, raw = state[-4:]
    found, buffer = numpy_dtype(dtype), buffer_of(raw, data)
    if found is None or buffer is None or found.code[:1] != "U" or not found.code[1:].isdecimal():
        return None
    if type(shape) is not tuple or not all(map(is_count, shape)) or fortran not in (False, 0):
        return None
    width = 4 * int(found.code[1:])
    content = buffer.decode() if buffer.codec else bytes(buffer.data)
    if not width or prod(shape) * width != len(content) or len(content) > limits.INFLATED_AT_ONCE or 0 in shape:
        return None
    codec = f"utf-32-{'be' if found.order == '>' else 'le'}"
    try:
        return shape, [
            content[at : at + width].decode(codec, "surrogatepass").rstrip("\0") for at in range(0, len(content), width)
        ]
    except UnicodeDecodeError:
        return None


# --- values of the standard library, each as text or a number ---------------------------------------------------------


def _arguments(node: Call) -> tuple[object, ...]:
    if node.states or node.items or node.pairs or type(node.args) is not tuple:
        raise Refusal(f"is {describe(node)}")
    return node.args


def _path(node: Call) -> object:
    """The text of a path."""
    from pathlib import PurePosixPath, PureWindowsPath

    parts = [text_of(part) for part in _arguments(node)]
    if any(part is None for part in parts):
        raise Refusal(f"is {describe(node)}")
    kind = PureWindowsPath if "Windows" in getattr(node.func, "name", "") else PurePosixPath
    return str(kind(*(part for part in parts if part is not None)))


def _date(node: Call, data: bytes | memoryview) -> object:
    """The text of a date, a time or both in ISO 8601."""
    import datetime

    name = getattr(node.func, "name", "")
    args = _arguments(node)
    buffer = buffer_of(args[0], data) if 0 < len(args) < 3 else None
    zone = _zone(args[1]) if len(args) == 2 else None
    if buffer is None or len(buffer.data) > 32 or (zone is None and len(args) == 2):
        raise Refusal(f"is {describe(node)}")
    raw = buffer.decode() if buffer.codec else bytes(buffer.data)
    try:
        made = getattr(datetime, name)(raw, *([zone] if zone is not None else []))
        return str(made.isoformat())
    except (TypeError, ValueError):
        raise Refusal(f"is {describe(node)}") from None


def _zone(node: object) -> object | None:
    """The zone of a time, where it is a plain distance from UTC."""
    import datetime

    args = node.args if type(node) is Call and getattr(node.func, "name", "") == "timezone" else None
    if type(args) is not tuple or len(args) != 1 or type(args[0]) is not Call:
        return None
    try:
        return datetime.timezone(datetime.timedelta(seconds=_seconds(args[0])))
    except (ValueError, OverflowError):
        return None


def _seconds(node: Call) -> float:
    """The seconds of a difference of times."""
    import datetime

    args = _arguments(node)
    if not 0 < len(args) <= 3 or not all(type(arg) is int for arg in args):
        raise Refusal(f"is {describe(node)}")
    try:
        return datetime.timedelta(*args).total_seconds()  # type: ignore[arg-type]  # integers, as was just seen
    except (ValueError, OverflowError):
        raise Refusal(f"is {describe(node)}") from None


def _text(node: Call) -> object:
    """The text that a number of the standard library is made of."""
    args = _arguments(node)
    text = text_of(args[0]) if len(args) == 1 else None
    if text is None:
        raise Refusal(f"is {describe(node)}")
    return text


def _fraction(node: Call) -> object:
    """The text of a fraction, which is made of text or, before Python 3.12, of two numbers."""
    args = _arguments(node)
    if len(args) == 2 and all(type(arg) is int for arg in args):
        return f"{args[0]}/{args[1]}"
    return _text(node)


def _uuid(node: Call) -> object:
    """The text of a UUID, whose state is its number."""
    import uuid

    state = node.states[0] if len(node.states) == 1 else None
    pairs = state.pairs if type(state) is Dict else []
    number = next((value for key, value in zip(pairs[::2], pairs[1::2], strict=True) if key == "int"), None)
    if type(number) is not int or not 0 <= number < 1 << 128:
        raise Refusal(f"is {describe(node)}")
    return str(uuid.UUID(int=number))


_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")

_MADE: Mapping[str, Callable[[Call], object]] = {
    **{f"{module}.{name}": _path for module in ("pathlib", "pathlib._local") for name in _PATHS},
    "datetime.timedelta": _seconds,
    "decimal.Decimal": _text,
    "fractions.Fraction": _fraction,
    "uuid.UUID": _uuid,
}

_DATES = ("datetime.datetime", "datetime.date", "datetime.time")

ONE_VALUE = frozenset((*_MADE, *_DATES))
"""The classes of the standard library whose objects are one value."""


def one_value(node: Call, name: str, data: bytes | memoryview) -> object:
    """Return the plain value of an object of one of these classes: text, or seconds for a difference of times.

    Raises Refusal where its arguments are not those of such an object.
    """
    return _date(node, data) if name in _DATES else _MADE[name](node)
