"""The engine of `ls`: the entries of a checkpoint, chosen, sorted and folded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint, Deferred, Entry, Tensor, Value
from ckpt_cli.ops.aliasing import all_strided, by_storage, needed_nbytes, stored_nbytes, tied_names, unique_numel
from ckpt_cli.ops.select import left, refuse_index, select_one, whole_tensors


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
    of_model: int | None = None
    """Elements of those tensors that are parameters of a model, where others, such as Adam's moments, are not; found
    only if it is asked for."""
    tied: dict[str, list[str]] = field(default_factory=dict)
    """For each tied name of the whole checkpoint, all the names of its group, its own too; they share one list."""


def list_entries(
    checkpoint: Checkpoint,
    names: Sequence[str] = (),
    *,
    values: bool = False,
    sort: str | None = None,
    exclude: Sequence[str] = (),
    parted: bool = False,
) -> Listing:
    """The tensors, and with `values` the other entries too, that `names` select, all without one, less `exclude`.

    A name that selects no tensor lists what it does select: an entry, or all that lies below a prefix. `sort` is
    `name`, `size` (largest first) or `file` (in the order of the bytes); without it they come in the document's order.
    `parted` also tells the parameters of a model from other elements.
    """
    chosen = left(checkpoint, _chosen(checkpoint, names, values=values), exclude)
    entries = [_as_read(entry) for entry in _sorted(checkpoint, chosen, sort)]
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    return Listing(
        path=checkpoint.path,
        format=checkpoint.format,
        entries=entries,
        tensors=len(tensors),
        parameters=unique_numel(tensors),
        nbytes=stored_nbytes(tensors),
        of_model=_of_model(checkpoint, tensors) if parted else None,
        tied=tied_names(checkpoint.tensors if names or exclude else tensors),
    )


def _of_model(checkpoint: Checkpoint, tensors: Sequence[Tensor]) -> int | None:
    from ckpt_cli.ops.parts import parameters_of

    return parameters_of(checkpoint, tensors)


def _as_read(entry: Entry) -> Entry:
    """Return the entry with a deferred value read, so that it outlives the open file."""
    return (
        replace(entry, content=entry.value)
        if isinstance(entry, Value) and isinstance(entry.content, Deferred)
        else entry
    )


def _chosen(checkpoint: Checkpoint, names: Sequence[str], *, values: bool) -> list[Entry]:
    """The entries that NAMEs select, each once: tensors, and values too where they are asked for or nothing else is."""
    if not names:
        return list(checkpoint.entries if values else [each for each in checkpoint.own if isinstance(each, Tensor)])
    chosen: dict[int, Entry] = {}
    for name in names:
        selections = select_one(checkpoint, name)
        refuse_index(checkpoint, name, selections, "ls")
        selected = [selection.entry for selection in selections]
        tensors = [entry for entry in selected if isinstance(entry, Tensor)]
        chosen.update((id(entry), entry) for entry in (tensors if tensors and not values else selected))
    return list(chosen.values())


def _sorted(checkpoint: Checkpoint, entries: list[Entry], sort: str | None) -> list[Entry]:
    """Sort entries by `name`, by `size` (bytes, most first) or by their place in the files; None keeps their order."""
    if sort == "name":
        return sorted(entries, key=lambda entry: entry.name)
    if sort == "size":
        return sorted(entries, key=lambda entry: entry.nbytes if isinstance(entry, Tensor) else 0, reverse=True)
    if sort == "file":
        numbers = {file: number for number, file in enumerate(checkpoint.container.files)}
        return sorted(entries, key=lambda entry: _place(entry, numbers))
    return entries


def _place(entry: Entry, numbers: Mapping[SourceFile, int]) -> tuple[bool, int, int]:
    """Return the place of an entry's first byte, or its first part's: entries without bytes first, compressed last."""
    views = all_strided([entry]) if isinstance(entry, Tensor) else []
    if not views or views[0].storage is None:
        return (False, -1, -1)
    try:
        begin, end = views[0].span
        extents = views[0].storage.extents(begin, end - begin)
    except UnsupportedError:
        return (True, 0, 0)
    return (False, numbers[extents[0].file], extents[0].offset) if extents else (False, -1, -1)


@dataclass(frozen=True, slots=True)
class Waste:
    """A storage that is larger than the views of it need."""

    storage: str
    nbytes: int
    """Bytes of the storage."""
    used: int
    """Bytes that its views need, which are those that `compact` keeps."""
    names: tuple[str, ...]
    """The tensors that are views of it; none, where nothing in the file refers to it."""


def list_waste(checkpoint: Checkpoint, names: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Waste]:
    """The storages with bytes that no view uses, most wasteful first; with `names`, those behind what they select."""
    chosen = {view.storage for view in all_strided(left(checkpoint, whole_tensors(checkpoint, names, "ls"), exclude))}
    found = []
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        used = needed_nbytes(storage, views)
        if used < storage.nbytes and storage in chosen:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    if not names and not exclude:
        found += [Waste(key, nbytes, 0, ()) for key, nbytes in unreferenced(checkpoint).items()]
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)


def unreferenced(checkpoint: Checkpoint) -> Mapping[str, int]:
    """The storages in a torch zip file that its pickle does not refer to, by their keys, with their bytes.

    Of a distributed checkpoint, the files that have bytes of no item; of a run, those of all its parts.
    """
    if checkpoint.is_set:
        from ckpt_cli.formats.runs.read import RunFiles

        if isinstance(checkpoint.container, RunFiles):
            parts = checkpoint.container.parts
            return {part.outer(key): n for part in parts for key, n in unreferenced(part.checkpoint).items()}
    if format_of(checkpoint).is_distributed:
        from ckpt_cli.formats.dcp.container import unreferenced_bytes

        return unreferenced_bytes(checkpoint.container)
    if not format_of(checkpoint).has_records:
        return {}
    from ckpt_cli.formats.zip.container import unreferenced_records

    return unreferenced_records(checkpoint.container, checkpoint.document)


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
    members: Sequence[Tensor] = ()
    """All of them, in their order."""


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
            rows.append(_Row(position, parts, [entry], entry.nbytes))
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
    members: list[Tensor]
    nbytes: int

    @property
    def first(self) -> Tensor:
        """The first of them."""
        return self.members[0]

    def result(self) -> Entry | Fold:
        """The tensor itself where the row stands for one, else the row."""
        if len(self.members) == 1:
            return self.first
        return Fold(".".join(self.parts), self.first, len(self.members), self.nbytes, self.members)


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
    """One row for several that differ only in the number at one place of their names."""
    first = group[0]
    spelled = _braces([row.parts[place] for row in group])
    return _Row(
        first.position,
        (*first.parts[:place], spelled, *first.parts[place + 1 :]),
        [member for row in group for member in row.members],
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
