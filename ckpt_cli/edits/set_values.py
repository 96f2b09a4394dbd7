"""The plan of `set` for non-tensor entries: an epoch, a learning rate, a name, and new ones."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.assignment import Assignment, parse_assignment
from ckpt_cli.edits.rename import is_name
from ckpt_cli.edits.set_new import new_tensor, require_room
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError, ValueRefusedError
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Storage, Tensor, Value
from ckpt_cli.ops.select import Selection, is_glob, select_to_edit, split_index


@dataclass(frozen=True, slots=True)
class Split:
    """Assignments by what they are to."""

    tensors: tuple[str, ...]
    """Those to elements of tensors, as they were written."""
    changes: Changes
    """The changes of the other assignments."""
    names: tuple[str, ...]
    """The names that the others are to."""


def split_assignments(
    checkpoint: Checkpoint,
    assignments: Sequence[str],
    *,
    new: bool = False,
    cast: bool = False,
    dtype: DType | None = None,
) -> Split:
    """Split assignments into those to tensors and those to other values, and plan the latter.

    With `new`, a name that is not there is added: as a tensor where its value is a file, or there is a `dtype`.
    Raises NameNotFoundError for it otherwise, ValueRefusedError for a value of another type than the old one.
    """
    tensors: list[str] = []
    values: dict[str, object] = {}
    added: dict[str, object] = {}
    contents: dict[Storage, Content] = {}
    for text in assignments:
        assignment = parse_assignment(text)
        name, index, _ = split_index(assignment.target, [entry.name for entry in checkpoint.entries])
        try:
            selected = select_to_edit(checkpoint, assignment.target)
        except NameNotFoundError as error:
            if not new or index is not None or assignment.operator:
                raise _hinting(error, new=new) from None
            require_room(checkpoint, _new_name(name), added)
            added[name], content = _new(name, assignment.value, dtype, cast=cast)
            contents.update(content)
            continue
        if new:
            _refuse_prefix(name, selected[0])
        if any(isinstance(selection.entry, Tensor) for selection in selected):
            tensors.append(text)
            continue
        if index is not None:
            raise UsageError(f"{name!r} is not a tensor, so it takes no index")
        for selection in selected:
            if isinstance(selection.entry, Value):
                old = values.get(selection.entry.name, selection.entry.value)
                values[selection.entry.name] = _value(selection.entry.name, old, assignment, cast=cast)
    if dtype is not None and not contents:
        raise UsageError("--dtype is that of new tensors, and nothing here is new")
    changes = Changes(values=values, added=added, contents=contents, cast=cast)
    return Split(tuple(tensors), changes, (*values, *added))


def _new(name: str, value: str, dtype: DType | None, *, cast: bool) -> tuple[object, dict[Storage, Content]]:
    """A new value, or a new tensor and the bytes of its storage."""
    if dtype is None and not value.startswith("@"):
        return _plain(value, None), {}
    tensor, content = new_tensor(name, value, dtype, cast=cast)
    return tensor, {tensor.storage: content} if tensor.storage is not None else {}


def _refuse_prefix(name: str, first: Selection) -> None:
    """Raise RefusedError for a prefix where names may be new: all below it would be set instead."""
    if not first.exact and not is_glob(name):
        raise RefusedError(
            f"{name!r} is what {first.entry.name!r} lies in, so nothing new can be called so",
            hint=f"{name.removesuffix('.')}.* is everything in it",
        )


def _hinting(error: NameNotFoundError, *, new: bool) -> NameNotFoundError:
    if not new and not error.close:
        error.hint = "--new adds an entry that is not there"
    return error


def _new_name(name: str) -> str:
    if not is_name(name) or ".." in name or is_glob(name):
        raise UsageError(f"{name!r} is not a name for a new entry")
    return name


def _value(name: str, old: object, assignment: Assignment, *, cast: bool) -> object:
    """The new value of an entry."""
    if assignment.value.startswith("@"):
        raise UsageError(
            f"{name!r} is not a tensor, so it takes no array of a file",
            hint=f"text that begins with @ is a JSON string: {shlex.quote(f'{name}={json.dumps(assignment.value)}')}",
        )
    if isinstance(old, Opaque):
        return _in_place_of_object(name, old, assignment, cast=cast)
    given = _plain(assignment.value, old)
    if assignment.operator:
        given = _computed(name, old, assignment.operator, given)
    return _as_type_of(name, old, given, cast=cast)


def _in_place_of_object(name: str, old: Opaque, assignment: Assignment, *, cast: bool) -> object:
    """Return the replacement of an object: None, or with `cast` a plain value; others of its type cannot be written."""
    given = _plain(assignment.value, None)
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
    """A value of the type that the old one has; None may become anything, and anything None."""
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
    """An item of a new list: a whole number is a float where the old item, or the last one, is a float."""
    like = old[min(number, len(old) - 1)] if old else None
    return float(given) if isinstance(like, float) and type(given) is int else given


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _plain(text: str, old: object) -> object:
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
