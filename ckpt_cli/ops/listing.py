"""What `ls` answers: the entries of a checkpoint, chosen, sorted and folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model import Checkpoint, Entry, Tensor
from ckpt_cli.ops.names import select
from ckpt_cli.ops.shared import all_strided, by_storage, spans_used, stored_nbytes, tied_names, unique_numel


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries with what they add up to."""

    path: str
    format: str
    entries: Sequence[Entry]
    tensors: int
    """Tensors among the entries."""
    parameters: int
    """Elements of these tensors, those of tied ones counted once."""
    nbytes: int
    """Bytes of the storages behind these tensors, each counted once."""
    tied: dict[str, list[str]] = field(default_factory=dict)
    """For each tied name of the whole checkpoint, the names that it is tied with."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Tensors whose names differ only in numbers, and whose dtype and shape do not differ."""

    name: str
    """The common name with the numbers in braces, as a shell expands them: `layers.{0..31}.weight`."""
    first: Tensor
    count: int
    nbytes: int
    """Bytes of all of them."""


@dataclass(frozen=True, slots=True)
class Waste:
    """A storage that is larger than the views of it need."""

    storage: str
    nbytes: int
    """Bytes of the storage."""
    used: int
    """Bytes between the first and last element of its views."""
    names: tuple[str, ...]
    """The tensors that are views of it."""


def list_entries(
    checkpoint: Checkpoint, names: Sequence[str] = (), *, values: bool = False, sort: str | None = None
) -> Listing:
    """The tensors, and with `values` the other entries too, that `names` select; no name selects all.

    An entry that is named exactly is listed whatever it is. `sort` is `name`, `size` (largest first) or `file` (in
    the order of the bytes); without it they come in the document's order.
    """
    chosen = {
        id(selection.entry): selection.entry
        for selection in select(checkpoint, names)
        if values or selection.exact or isinstance(selection.entry, Tensor)
    }
    entries = _sorted(checkpoint, list(chosen.values()), sort)
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    return Listing(
        path=checkpoint.path,
        format=checkpoint.format,
        entries=entries,
        tensors=len(tensors),
        parameters=unique_numel(tensors),
        nbytes=stored_nbytes(tensors),
        tied=tied_names(checkpoint.tensors),
    )


def _sorted(checkpoint: Checkpoint, entries: list[Entry], sort: str | None) -> list[Entry]:
    if sort == "name":
        return sorted(entries, key=lambda entry: entry.name)
    if sort == "size":
        return sorted(entries, key=lambda entry: entry.nbytes if isinstance(entry, Tensor) else 0, reverse=True)
    if sort == "file":
        return sorted(entries, key=lambda entry: _place(checkpoint, entry))
    return entries


def _place(checkpoint: Checkpoint, entry: Entry) -> tuple[bool, int, int]:
    """Where an entry's first byte stands: what has no bytes first, what is compressed last."""
    if not isinstance(entry, Tensor) or entry.storage is None:
        return (False, -1, -1)
    try:
        extent = checkpoint.container.extent(entry.storage)
    except UnsupportedError:
        return (True, 0, 0)
    return (False, extent.file, extent.offset + entry.span[0])


def fold(entries: Iterable[Entry]) -> list[Entry | Fold]:
    """Entries with numbered tensors of one dtype and shape folded into one row each.

    One numbered part after another is folded, the last one first, so that every row is an exact brace expansion of
    the names it stands for.
    """
    rows: list[_Row] = []
    others: list[tuple[int, Entry]] = []
    for position, entry in enumerate(entries):
        if isinstance(entry, Tensor) and any(part.isdecimal() for part in entry.name.split(".")):
            rows.append(_Row(position, tuple(entry.name.split(".")), entry, 1, entry.nbytes))
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
        is_number = place < len(row.parts) and row.parts[place].isdecimal()
        rest = (row.parts[:place], None, row.parts[place + 1 :]) if is_number else (row.parts,)
        groups.setdefault((rest, row.first.dtype.name, row.first.shape, row.first.layout), []).append(row)
    return [_merged(group, place) if len(group) > 1 else group[0] for group in groups.values()]


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


def list_waste(checkpoint: Checkpoint) -> list[Waste]:
    """The storages with bytes that no view uses, most wasteful first."""
    found = []
    for storage, views in by_storage(all_views(checkpoint)):
        used = spans_used(views)
        if used < storage.nbytes:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)


def all_views(checkpoint: Checkpoint) -> list[Tensor]:
    """Every tensor with a storage, parts of composed tensors included."""
    return all_strided(checkpoint.tensors)
