"""The engine of `ls --fold`: numbered layers in one row each."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Entry, Tensor

_PARTS = 64
"""Parts of a name up to which it is folded: every one of them costs a walk over all names."""

_DIGITS = 18
"""Digits of a number that is folded."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Tensors whose names differ only in numbers and whose facts differ only in where their bytes are."""

    name: str
    """The common name with the numbers in braces, as a shell expands them: `layers.{0..31}.weight`."""
    first: Tensor
    count: int
    nbytes: int
    """Bytes of all of them."""


def fold(entries: Iterable[Entry]) -> list[Entry | Fold]:
    """Entries with numbered tensors of one dtype and shape folded into one row each.

    One numbered part after another is folded, the last one first, so that every row is an exact brace expansion of
    the names it stands for.
    """
    rows: list[_Row] = []
    others: list[tuple[int, Entry]] = []
    for position, entry in enumerate(entries):
        parts = tuple(entry.name.split("."))
        if isinstance(entry, Tensor) and len(parts) <= _PARTS and any(map(_is_number, parts)):
            rows.append(_Row(position, parts, entry, 1, entry.nbytes))
        else:
            others.append((position, entry))
    for place in range(max((len(row.parts) for row in rows), default=0) - 1, -1, -1):
        rows = _fold_place(rows, place)
    folded: list[tuple[int, Entry | Fold]] = [(row.position, row.result()) for row in rows]
    return [entry for _, entry in sorted([*others, *folded], key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor or some folded ones; the parts of their name are spelled with braces where they differ."""

    position: int
    parts: tuple[str, ...]
    first: Tensor
    count: int
    nbytes: int

    def result(self) -> Entry | Fold:
        if self.count == 1:
            return self.first
        return Fold(".".join(self.parts), self.first, self.count, self.nbytes)


def _fold_place(rows: list[_Row], place: int) -> list[_Row]:
    """Fold the rows that differ only in the number at one place of their names."""
    groups: dict[tuple[object, ...], list[_Row]] = {}
    for row in rows:
        is_number = place < len(row.parts) and _is_number(row.parts[place])
        rest = (row.parts[:place], None, row.parts[place + 1 :]) if is_number else (row.parts,)
        groups.setdefault((rest, *_alike(row.first)), []).append(row)
    return [_merged(group, place) if len(group) > 1 else group[0] for group in groups.values()]


def _is_number(part: str) -> bool:
    """True if a part of a name is a number that layers may have."""
    return len(part) <= _DIGITS and part.isdecimal()


def _alike(tensor: Tensor) -> tuple[object, ...]:
    """Return the key that the tensors of one row have in common."""
    return (
        *(tensor.dtype.name, tensor.shape, tensor.stride, tensor.layout),
        *(tensor.kind, tensor.requires_grad, tensor.device),
    )


def _merged(group: list[_Row], place: int) -> _Row:
    first = group[0]
    spelled = _braces([row.parts[place] for row in group])
    return _Row(
        first.position,
        (*first.parts[:place], spelled, *first.parts[place + 1 :]),
        first.first,
        sum(row.count for row in group),
        sum(row.nbytes for row in group),
    )


def _braces(numbers: list[str]) -> str:
    """`{0..31}` for consecutive numbers, `{0,2,5}` for others."""
    values = [int(number) for number in numbers]
    low, high = min(values), max(values)
    plain = [str(value) for value in values] == numbers
    if plain and len(set(values)) == len(values) and high - low == len(values) - 1 and len(values) > 2:
        return f"{{{low}..{high}}}"
    return f"{{{','.join(numbers)}}}"
