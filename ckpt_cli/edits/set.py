"""The plan of `set`: elements of tensors, other values, and new entries, in one edit."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.assignment import Assignment, parse_assignment
from ckpt_cli.edits.expression import begins_with_call
from ckpt_cli.edits.new_names import name_of_new, require_room
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.set_new import new_tensor
from ckpt_cli.edits.set_tensors import ElementEdit, Target, also_changed, element_edit, patch_elements, targets_of
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError, ValueRefusedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.patches import Overlay
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Opaque, Storage, Tensor, Value
from ckpt_cli.ops.select import Selection, is_glob, select_to_edit, split_index

if TYPE_CHECKING:
    from ckpt_cli.edits.expression_tensors import Sources


def plan_set(
    checkpoint: Checkpoint,
    assignments: Sequence[str | Assignment],
    *,
    cast: bool = False,
    new: bool = False,
    dtype: DType | None = None,
    of: Sources | None = None,
) -> EditPlan:
    """Assign to elements of tensors and to other values.

    With `new`, a name that is not there is added: as a tensor where its value is a file, there is a `dtype`, or where
    the value is an expression, if `of` is given: the checkpoints that its tensors are from.
    Raises NameNotFoundError for it otherwise, ValueRefusedError for a value that its place cannot hold.
    """
    split = _split(checkpoint, assignments, _New(dtype, of, cast) if new else None, cast=cast)
    if checkpoint.is_set and split.elements and (split.added or split.values):
        what = f"{'new entries' if split.added else 'other values'} of a set of files"
        raise UsageError(f"elements of tensors and {what} are set one after the other", hint="run ckpt set twice")
    verb, names = Verb("set", "set"), (*split.values, *split.added)
    changes = (
        Changes(values=split.values, added=split.added, contents=split.contents, cast=cast) if names else Changes()
    )
    check = split.check if split.contents else None  # a dry run makes new tensors, to find values that do not fit
    if not split.elements:
        return EditPlan(verb, names, changes=changes, check=check)
    with about(checkpoint.path):
        keeps = format_of(checkpoint).is_pickle
        edits = [element_edit(assignment, found, cast=cast, keeps_values=keeps) for assignment, found in split.elements]
        targets = [
            target
            for edit, (_, found) in zip(edits, split.elements, strict=True)
            for target in targets_of(checkpoint, edit, found)
        ]

    def patch(opened: Checkpoint, overlay: Overlay) -> None:
        with about(opened.path):
            patch_elements(opened, overlay, targets if opened is checkpoint else _targets_in(opened, edits))

    changed = tuple(dict.fromkeys(target.tensor.name for target in targets))
    also = also_changed(checkpoint, targets, changed)
    return EditPlan(verb, (*changed, *names), also, changes, patch=patch, check=check)


def _targets_in(checkpoint: Checkpoint, edits: Sequence[ElementEdit]) -> list[Target]:
    """Find the targets of edits in another checkpoint with the same names: the rewritten copy."""
    return [
        target
        for edit in edits
        for target in targets_of(checkpoint, edit, select_to_edit(checkpoint, edit.assignment.target))
    ]


@dataclass(frozen=True, slots=True)
class _Split:
    """Assignments by the kind of their targets."""

    elements: list[tuple[Assignment, list[Selection]]] = field(default_factory=list)
    """Those to elements of tensors, and the entries that each selects."""
    values: dict[str, object] = field(default_factory=dict)
    """The new value of each entry that is not a tensor."""
    added: dict[str, object] = field(default_factory=dict)
    """Plain data or tensors, under their new names."""
    contents: dict[Storage, Content] = field(default_factory=dict)
    """The bytes of new tensors."""
    checks: list[Callable[[], None]] = field(default_factory=list)
    """What raises where a new tensor must not stand, once it was made."""

    def check(self) -> None:
        """Carry out all checks."""
        for each in self.checks:
            each()


@dataclass(frozen=True, slots=True)
class _New:
    """How entries are made that are not there."""

    dtype: DType | None
    of: Sources | None
    cast: bool


def _split(checkpoint: Checkpoint, assignments: Sequence[str | Assignment], new: _New | None, *, cast: bool) -> _Split:
    """Parse assignments, select their entries, and split them by what these are."""
    split = _Split()
    for given in assignments:
        assignment = parse_assignment(given) if isinstance(given, str) else given
        name, index, _ = split_index(assignment.target, checkpoint.names)
        try:
            selected = select_to_edit(checkpoint, assignment.target)
        except NameNotFoundError as error:
            if new is None or index is not None or assignment.operator:
                raise _hinting(error, new=new is not None) from None
            require_room(checkpoint, name_of_new(name), split.added)
            _add(checkpoint, split, name, assignment.value, new)
            continue
        if new is not None:
            _refuse_prefix(name, selected[0])
        if any(isinstance(selection.entry, Tensor) for selection in selected):
            split.elements.append((assignment, selected))
            continue
        if index is not None:
            raise UsageError(f"{name!r} is not a tensor, so it takes no index")
        for selection in selected:
            if isinstance(selection.entry, Value):
                old = split.values.get(selection.entry.name, selection.entry.value)
                split.values[selection.entry.name] = value_after(selection.entry.name, old, assignment, cast=cast)
    if new is not None and new.dtype is not None and not split.contents:
        raise UsageError("--dtype is that of new tensors, and nothing here is new")
    return split


def _add(checkpoint: Checkpoint, split: _Split, name: str, value: str, new: _New) -> None:
    """Add a new value, or a new tensor and the bytes of its storage."""
    if new.of is not None and _is_expression(checkpoint, value, new.of):
        from ckpt_cli.edits.expression_tensors import Expression, new_by_expression

        tensor, content, check = new_by_expression(
            checkpoint, Expression(value, name, allow=new.cast), new.of, new.dtype
        )
        split.checks.extend((check, new.of.require_unchanged))
    elif new.dtype is None and not value.startswith("@"):
        split.added[name] = plain_value(value, None)
        return
    else:
        tensor, content = new_tensor(name, value, new.dtype, cast=new.cast)
    split.added[name] = tensor
    if tensor.storage is not None:
        split.contents[tensor.storage] = content


def _is_expression(checkpoint: Checkpoint, value: str, of: Sources) -> bool:
    """True for a value that makes a tensor of others, rather than a text, a number, a list or a file."""
    if value[:1] in ("", "@", "{") or begins_with_call(value):
        return begins_with_call(value)
    if value[0] in '"[' and _is_json(value):
        return False
    from ckpt_cli.edits.expression_tensors import is_expression

    return is_expression(checkpoint, value, of)


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


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
