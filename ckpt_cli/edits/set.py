"""The plan of `set`: elements of tensors, other values, and new entries, in one edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.assignment import Assignment, parse_assignment
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.rename import is_name
from ckpt_cli.edits.set_new import new_tensor, require_room
from ckpt_cli.edits.set_tensors import ElementEdit, Target, also_changed, element_edit, patch_elements, targets_of
from ckpt_cli.edits.set_values import plain_value, value_after
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.patches import Overlay
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, Value
from ckpt_cli.ops.select import Selection, is_glob, select_to_edit, split_index


def plan_set(
    checkpoint: Checkpoint,
    assignments: Sequence[str],
    *,
    cast: bool = False,
    new: bool = False,
    dtype: DType | None = None,
) -> EditPlan:
    """Assign to elements of tensors and to other values.

    With `new`, a name that is not there is added: as a tensor where its value is a file, or there is a `dtype`.
    Raises NameNotFoundError for it otherwise, ValueRefusedError for a value that its place cannot hold.
    """
    split = _split(checkpoint, assignments, new=new, cast=cast, dtype=dtype)
    if checkpoint.is_set and split.elements and split.added:
        raise UsageError(
            "elements of tensors and new entries of a set of shards are set one after the other",
            hint="run ckpt set twice",
        )
    verb, names = Verb("set", "set"), (*split.values, *split.added)
    changes = (
        Changes(values=split.values, added=split.added, contents=split.contents, cast=cast) if names else Changes()
    )
    check = (lambda: None) if split.contents else None  # a dry run makes new tensors, to find values that do not fit
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


def _split(checkpoint: Checkpoint, assignments: Sequence[str], *, new: bool, cast: bool, dtype: DType | None) -> _Split:
    """Parse assignments, select their entries, and split them by what these are."""
    split = _Split()
    for assignment in map(parse_assignment, assignments):
        name, index, _ = split_index(assignment.target, checkpoint.names)
        try:
            selected = select_to_edit(checkpoint, assignment.target)
        except NameNotFoundError as error:
            if not new or index is not None or assignment.operator:
                raise _hinting(error, new=new) from None
            require_room(checkpoint, _new_name(name), split.added)
            split.added[name], content = _new(name, assignment.value, dtype, cast=cast)
            split.contents.update(content)
            continue
        if new:
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
    if dtype is not None and not split.contents:
        raise UsageError("--dtype is that of new tensors, and nothing here is new")
    return split


def _new(name: str, value: str, dtype: DType | None, *, cast: bool) -> tuple[object, dict[Storage, Content]]:
    """Return a new value, or a new tensor and the bytes of its storage."""
    if dtype is None and not value.startswith("@"):
        return plain_value(value, None), {}
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
