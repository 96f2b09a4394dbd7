"""The new value that `set` gives an entry which is not a tensor: an epoch, a learning rate, a name."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence

from ckpt_cli.edits.assignment import Assignment
from ckpt_cli.errors import UnsupportedError, UsageError, ValueRefusedError
from ckpt_cli.model.checkpoint import Opaque


def value_after(name: str, old: object, assignment: Assignment, *, cast: bool) -> object:
    """Return the new value of an entry; raises ValueRefusedError for one of another type, unless to be `cast`."""
    if assignment.value.startswith("@"):
        raise UsageError(
            f"{name!r} is not a tensor, so it takes no array of a file",
            hint=f"text that begins with @ is a JSON string: {shlex.quote(f'{name}={json.dumps(assignment.value)}')}",
        )
    if isinstance(old, Opaque):
        return _in_place_of_object(name, old, assignment, cast=cast)
    given = plain_value(assignment.value, old)
    if assignment.operator:
        given = _computed(name, old, assignment.operator, given)
    return _as_type_of(name, old, given, cast=cast)


def _in_place_of_object(name: str, old: Opaque, assignment: Assignment, *, cast: bool) -> object:
    """Return the replacement of an object: None, or with `cast` a plain value; others of its type cannot be written."""
    given = plain_value(assignment.value, None)
    if assignment.operator or (given is not None and not cast):
        raise UnsupportedError(
            f"{name!r} is an object ({old.text[:60]}), and another of its type cannot be written",
            hint="--cast puts a plain value in its place, None goes there without it",
        )
    return given


def _computed(name: str, old: object, operator: str, given: object) -> object:
    numbers = (int, float)
    if not isinstance(old, numbers) or not isinstance(given, numbers) or isinstance(old, bool):
        raise ValueRefusedError(f"{operator}= works on numbers, and {name!r} is {_kind(old)}")
    try:
        if operator == "/":
            return old / given if isinstance(old, float) or old % given else old // given
        return {"+": old + given, "-": old - given, "*": old * given}[operator]
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueRefusedError(f"{name!r}: {error}") from None


def _as_type_of(name: str, old: object, given: object, *, cast: bool) -> object:
    """Return a value converted to the type of the old one; None may become anything, and anything None."""
    if isinstance(old, list | tuple) and isinstance(given, list):
        items = [_like_item(old, number, item) for number, item in enumerate(given)]
        return tuple(items) if isinstance(old, tuple) else items
    if given is None or old is None or type(given) is type(old):
        return given
    if isinstance(old, float) and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if isinstance(old, int) and isinstance(given, float) and not isinstance(old, bool) and math.isfinite(given):
        if cast or given == int(given):
            return int(given)
    elif cast:
        return given
    raise ValueRefusedError(
        f"{name!r} is {_kind(old)}, {json.dumps(given)[:60]} is {_kind(given)}",
        hint="--cast changes the type as well, or cuts a number down to an integer",
    )


def _like_item(old: Sequence[object], number: int, given: object) -> object:
    """Return an item of a new list: a whole number becomes a float where the old item, or the last one, is a float."""
    like = old[min(number, len(old) - 1)] if old else None
    return float(given) if isinstance(like, float) and type(given) is int else given


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def plain_value(text: str, old: object) -> object:
    """Return the value on the right side of an assignment: JSON, a Python word, or the text itself where a text was."""
    word = text.strip()
    if word in _WORDS:
        return _WORDS[word]
    if isinstance(old, str) and not word.startswith('"'):
        return text
    try:
        value: object = json.loads(word)
    except RecursionError:
        raise UsageError("a value that nests too deeply") from None
    except ValueError:
        if old is None or isinstance(old, str):
            return text
        raise UsageError(
            f"{word[:60]!r} is not a value for what is {_kind(old)}",
            hint='values are JSON: numbers, true, null, "text", lists and objects',
        ) from None
    return value


_WORDS: dict[str, object] = {
    "None": None, "null": None, "True": True, "False": False, "true": True, "false": False,
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
}  # fmt: skip
"""Words that stand for a value, whatever the old one is; a text of these letters takes quotes."""
