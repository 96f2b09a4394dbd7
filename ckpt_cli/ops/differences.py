"""What `diff` finds: tensors, values, ties and metadata that differ between two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt_cli.facts import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that both have, and that is not the same in both."""

    name: str
    what: str
    """`layout`, `shape`, `dtype` or `value`: the first of these that differs."""
    a: object
    """The layout, shape or dtype in the first checkpoint, or its values at the places of `first`."""
    b: object
    numel: int
    differing: int | None = None
    """Elements that are not equal; None where they were not compared, because shapes or layouts differ."""
    max_abs: float | int | None = None
    """The greatest |a - b|."""
    max_rel: float | None = None
    """The greatest |a - b| / |b|."""
    first: Sequence[Sequence[int]] = ()
    """The indices of the first elements that differ."""
    mean_abs: float | None = None
    """The mean |a - b| of the places where both are finite."""
    relative_l2: float | None = None
    """The norm of a - b divided by that of b."""
    cosine: float | None = None
    """The cosine of the angle between both as vectors; None where one is 0 everywhere."""
    tensor: str = ""
    """The name of the tensor that it is a part of; empty for a tensor itself."""


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A changed tensor, or several of numbered layers."""

    name: str
    """With `[N]` for numbers that differ."""
    count: int
    what: str
    differing: int | None
    numel: int
    relative_l2: float | None
    """The greatest one of them."""


def _layer(pattern: str, what: str, group: Sequence[Change]) -> LayerChange:
    counts = [change.differing for change in group if change.differing is not None]
    norms = [change.relative_l2 for change in group if change.relative_l2 is not None]
    return LayerChange(
        pattern if len(group) > 1 else group[0].name,
        len(group),
        what,
        sum(counts) if counts else None,
        sum(change.numel for change in group),
        max(norms, default=None),
    )


@dataclass(frozen=True, slots=True)
class Fact:
    """Another difference: a non-tensor value, or a line of the metadata."""

    name: str
    a: object
    """None where only the second checkpoint has it."""
    b: object


@dataclass(frozen=True, slots=True)
class Tie:
    """Names that are one tensor in one checkpoint and not in the other."""

    names: Sequence[str]
    a: bool
    """True if they are tied in the first."""
    b: bool


@dataclass(frozen=True, slots=True)
class Diff:
    """The answer."""

    only_a: Sequence[str] = ()
    only_b: Sequence[str] = ()
    changed: Sequence[Change] = ()
    values: Sequence[Fact] = ()
    """Entries that are not tensors in one of them, and differ."""
    ties: Sequence[Tie] = ()
    metadata: Sequence[Fact] = ()
    """Differences of the metadata; compared only between checkpoints of one format."""
    tensors_equal: int = 0
    """Tensors of both that are the same."""

    tensors_only_a: int = 0
    tensors_only_b: int = 0

    @property
    def differing(self) -> set[str]:
        """The names of the tensors of both that are not the same."""
        return {change.tensor or change.name for change in self.changed}

    def by_layer(self) -> list[LayerChange]:
        """Return the changes with those of numbered tensors together, whose names differ only in numbers.

        The relative L2 of several is the greatest one.
        """
        groups: dict[tuple[str, str], list[Change]] = {}
        for change in self.changed:
            pattern = ".".join("[N]" if part.isdecimal() else part for part in change.name.split("."))
            groups.setdefault((pattern, change.what), []).append(change)
        rows = [_layer(pattern, what, group) for (pattern, what), group in groups.items()]
        sides = (("only in A", self.only_a), ("only in B", self.only_b))
        return rows + [LayerChange(name, 1, what, None, 0, None) for what, names in sides for name in names]

    @property
    def equal(self) -> bool:
        """True if there is no difference."""
        return not (self.only_a or self.only_b or self.changed or self.values or self.ties or self.metadata)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each difference, for a DataFrame: the facts that the table of `ckpt diff` has."""
        rows = [_row("only in a", name) for name in self.only_a] + [_row("only in b", name) for name in self.only_b]
        for change in self.changed:
            numbers = {key: getattr(change, key) for key in _NUMBERS}
            rows.append({**_row(change.what, change.name, change.a, change.b), **numbers})
        rows += [_row("entry", fact.name, fact.a, fact.b) for fact in self.values]
        rows += [_row("tie", ",".join(tie.names), tie.a, tie.b) for tie in self.ties]
        return rows + [_row("metadata", fact.name, fact.a, fact.b) for fact in self.metadata]


_NUMBERS = ("differing", "numel", "max_abs", "max_rel", "first", "mean_abs", "relative_l2", "cosine")
"""The facts of a changed tensor alone; of other differences they are None."""


def _row(what: str, name: str, a: object = None, b: object = None) -> dict[str, Any]:
    return {"what": what, "name": name, "a": a, "b": b, **dict.fromkeys(_NUMBERS)}
