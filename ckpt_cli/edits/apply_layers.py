"""Tensors of other files that a recipe takes, and layers that it stacks: which tensor goes to which name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ckpt_cli import limits
from ckpt_cli.edits.expression_sources import Sources
from ckpt_cli.edits.recipe import RecipeStep
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError, about
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.rename_patterns import Pattern, is_pattern
from ckpt_cli.ops.select import close_names, select_to_edit

Wanted = Mapping[str, tuple[Checkpoint, Tensor]]
"""The tensor that goes to each name, and the checkpoint that it is of."""

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?(?:/(-?\d{1,6}))?")


def taken(now: Checkpoint, of: Sources, step: RecipeStep) -> Wanted:
    """Return the tensors that a step takes of another file, by their new names; raises NameNotFoundError for none."""
    other = of.other(step.get("take"))
    found: dict[str, tuple[Checkpoint, Tensor]] = {}
    for text in step.get("names", ["*"]):
        some = _by_pattern(other, text) if is_pattern(text) else _selected(other, text)
        if not some:
            raise NameNotFoundError(text.partition("=")[0], close_names(text, other.names), path=other.path)
        for new, tensor in some:
            before = found.setdefault(new, (other, tensor))
            if before[1] is not tensor:
                raise RefusedError(f"{before[1].name!r} and {tensor.name!r} would both be called {new!r}")
    for _, tensor in found.values():
        _require(of, other, tensor)
    del now
    return found


def _by_pattern(other: Checkpoint, text: str) -> list[tuple[str, Tensor]]:
    pattern = Pattern(text)
    pairs = [(pattern.match(tensor.name), tensor) for tensor in other.tensors]
    return [(new, tensor) for new, tensor in pairs if new is not None]


def _selected(other: Checkpoint, text: str) -> list[tuple[str, Tensor]]:
    """Return what a NAME selects, under its own names; `OLD=NEW` renames one, or a prefix."""
    old, equals, new = text.partition("=")
    found = []
    with about(other.path):
        for selection in select_to_edit(other, old):
            entry = selection.entry
            if selection.index is not None:
                raise UsageError(f"{old!r} is a part of a tensor", hint="a step with new makes tensors of parts")
            if isinstance(entry, Tensor):
                found.append((new + entry.name[len(old) :] if equals else entry.name, entry))
    if equals and ("*" in old or "?" in old):
        raise UsageError(f"{text!r} has a star and no number", hint="'layers.{n}.*=h.{n}.*' is a pattern")
    return found


def _require(of: Sources, checkpoint: Checkpoint, tensor: Tensor) -> None:
    """Raise where the elements of a tensor cannot be copied."""
    if of.tensor(checkpoint, tensor.name) is None:
        raise NameNotFoundError(tensor.name, path=checkpoint.path)


def wanted_layers(now: Checkpoint, of: Sources, step: RecipeStep) -> tuple[Wanted, Sequence[str]]:
    """Return the tensors of slices of layers by their new names, and the names of all layers that are there.

    The layers get numbers from 0 on, in the order of the slices; with `interleave`, one of each slice in turn.
    """
    text = step.get("layers")
    if text.count("{n}") != 1 or not text.endswith(".*") or "*" in text[:-2]:
        raise UsageError(f"layers = {text!r} is not PREFIX.{{n}}.*", hint="layers = 'model.layers.{n}.*'")
    pattern = Pattern(f"{text}={text}")
    tables: dict[int, tuple[Checkpoint, Mapping[int, Sequence[Tensor]]]] = {}
    order: list[list[tuple[Checkpoint, int]]] = []
    for each in step.get("slices"):
        checkpoint = of.other(each["from"]) if each.get("from") else now
        if id(checkpoint) not in tables:
            tables[id(checkpoint)] = checkpoint, _layers(checkpoint, text, pattern)
        numbers = _numbers(each["range"])
        layers = tables[id(checkpoint)][1]
        missing = next((number for number in numbers if number not in layers), None)
        if missing is not None:
            raise UsageError(f"there is no layer {missing} of {text}", path=checkpoint.path)
        order.append([(checkpoint, number) for number in numbers])
    if sum(map(len, order)) > limits.RECIPE_STEPS:
        raise UsageError("far too many layers")
    found: dict[str, tuple[Checkpoint, Tensor]] = {}
    prefix, rest = text.split("{n}")
    for place, (checkpoint, number) in enumerate(_in_order(order, interleave=step.get("interleave", False))):
        old = f"{prefix}{number}{rest[:-1]}"
        for tensor in tables[id(checkpoint)][1][number]:
            found[f"{prefix}{place}{rest[:-1]}{tensor.name[len(old) :]}"] = checkpoint, tensor
            _require(of, checkpoint, tensor)
    return found, [tensor.name for tensor in now.tensors if pattern.match(tensor.name) is not None]


def _layers(checkpoint: Checkpoint, text: str, pattern: Pattern) -> Mapping[int, Sequence[Tensor]]:
    """Return the tensors of each layer, by its number."""
    begin = text.index("{n}")
    found: dict[int, list[Tensor]] = {}
    for tensor in checkpoint.tensors:
        if pattern.match(tensor.name) is not None:
            found.setdefault(int(tensor.name[begin:].partition(".")[0]), []).append(tensor)
    if not found:
        raise UsageError(f"no name is like {text}", path=checkpoint.path)
    return found


def _numbers(text: str) -> Sequence[int]:
    """Return the numbers of `8-23`, `0-30/2` or `7`; a step below 0 counts down."""
    found = _RANGE.fullmatch(text.replace(" ", ""))
    step = int(found[3] or 1) if found is not None else 0
    if found is None or not step:
        raise UsageError(f"range = {text!r} is not FIRST-LAST or FIRST-LAST/STEP")
    first, last = int(found[1]), int(found[2] or found[1])
    numbers = range(first, last + 1, step) if step > 0 else range(last, first - 1, step)
    if not numbers or len(numbers) > limits.RECIPE_STEPS:
        raise UsageError(f"range = {text!r} has {len(numbers):,} layers")
    return numbers


def _in_order(
    slices: Sequence[Sequence[tuple[Checkpoint, int]]], *, interleave: bool
) -> Sequence[tuple[Checkpoint, int]]:
    if not interleave:
        return [layer for some in slices for layer in some]
    most = max(map(len, slices))
    return [some[place] for place in range(most) for some in slices if place < len(some)]
