"""Assignments, `NAME[INDEX]=VALUE`: how they are split, and their values: numbers, lists, arrays in files."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import exists, is_file, size_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OPERATORS = "+-*/"
_INTEGER = r"[+-]?\d{1,4000}$"
_NESTING = 64


@dataclass(frozen=True, slots=True)
class Assignment:
    """One `NAME[…]=VALUE`, split."""

    target: str
    """The name, with its index in brackets if there is one."""
    operator: str
    """Empty, or one of `+ - * /`."""
    value: str


def parse_assignment(text: str) -> Assignment:
    """Split at the first `=` outside brackets and quotes; raises UsageError where there is no `=`."""
    quote, depth = "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and position == 0:
            quote = char
        elif char in "[]":
            depth += 1 if char == "[" else -1
        elif char == "=" and depth == 0 and position:
            operator = text[position - 1] if text[position - 1] in _OPERATORS else ""
            if operator == "*" and text[: position - 1].strip()[-1:] in ("", "."):
                operator = ""  # `layers.*=0` and `*=0` are globs: no name ends in a dot
            target = text[: position - len(operator)].strip()
            if target:
                return Assignment(target, operator, text[position + 1 :].strip())
            break
    raise UsageError(f"{text!r} is not an assignment", hint="write NAME=VALUE, NAME[INDEX]=VALUE or NAME+=VALUE")


def parse_value(text: str) -> NDArray[Any]:
    """Return the values that the right side of an assignment spells.

    Integers and booleans come as Python objects, so that 64-bit ones stay exact; real numbers as float64, complex
    ones as complex128; `@FILE.npy` as its array, mapped and never unpickled. Raises UsageError.
    """
    if text.startswith("@"):
        return _array_in(text[1:])
    if text.startswith("["):
        return _list(text)
    return _array_of(_scalar(text), ())


def _array_in(path: str) -> NDArray[Any]:
    import numpy as np

    if exists(path) and not is_file(path):  # a pipe would be waited for
        raise UsageError("is not a regular file, and only a regular file can be mapped", path=path)
    try:
        loaded = np.lib.format.open_memmap(path, mode="r")  # which, unlike numpy.load, never offers to unpickle
    except (ValueError, EOFError):
        raise UsageError(
            "not a numpy array of numbers", path=path, hint="write one with numpy.save (an .npz holds several)"
        ) from None
    if loaded.dtype.kind not in "biufc":
        raise UsageError(f"its values are {loaded.dtype}, not numbers", path=path)
    if size_of(path) > loaded.offset + loaded.nbytes:
        raise UsageError("holds more than one array, and it is not clear which one is meant", path=path)
    return loaded


def _list(text: str) -> NDArray[Any]:
    try:
        nested = json.loads(text, parse_float=_real)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{_short(text)} is not a list of numbers: {error}") from None
    leaves: list[object] = []
    shape = _shape(nested, leaves)
    return _array_of([_scalar(leaf) if isinstance(leaf, str) else leaf for leaf in leaves], shape)


def _shape(nested: list[object], leaves: list[object]) -> tuple[int, ...]:
    """Return the shape of nested lists and append their leaves in row-major order; raises UsageError where ragged."""
    shape: list[int] = []
    level: list[object] = [nested]
    while level and all(isinstance(item, list) for item in level):
        lists = [item for item in level if isinstance(item, list)]
        shape.append(len(lists[0]))
        if any(len(item) != shape[-1] for item in lists) or len(shape) > _NESTING:
            raise UsageError("the lists within the list have different lengths")
        level = [item for inner in lists for item in inner]
    for leaf in level:
        if isinstance(leaf, list | dict) or leaf is None:
            raise UsageError(f"a list of numbers cannot hold {json.dumps(leaf)[:40]}")
    leaves.extend(level)
    return tuple(shape)


def _scalar(text: str) -> object:
    """One number or truth value."""
    word = text.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    if re.match(_INTEGER, word):
        return int(word)
    try:
        return complex(word) if word.endswith("j") else _real(word)
    except ValueError:
        raise UsageError(
            f"{_short(text)} is not a value for a tensor",
            hint="values are numbers, nan, inf, true, false, 1+2j, a list like [1,2,3], or @FILE.npy",
        ) from None


def _real(text: str) -> float:
    """Return a real number; raises UsageError for digits that are beyond every float."""
    value = float(text)
    if math.isinf(value) and any(char.isdigit() for char in text):
        raise UsageError(f"{_short(text)} is larger than any float", hint="write inf for infinity")
    return value


def _array_of(leaves: object, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of Python numbers in the narrowest kind that keeps each of them exactly."""
    import numpy as np

    flat = leaves if isinstance(leaves, list) else [leaves]
    if all(isinstance(leaf, int) for leaf in flat):  # bool is an int
        array = np.empty(len(flat), object)
        array[:] = flat
        return array.reshape(shape)
    kind = np.complex128 if any(isinstance(leaf, complex) for leaf in flat) else np.float64
    try:
        return np.array(flat, kind).reshape(shape)
    except OverflowError:
        raise UsageError("an integer among the values is too large to stand beside real numbers") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
