"""The engine of `ls`: the entries of a checkpoint, chosen, sorted and folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.checkpoint import Checkpoint, Deferred, Entry, Tensor, Value
from ckpt_cli.ops.aliasing import all_strided, by_storage, needed_nbytes, stored_nbytes, tied_names, unique_numel
from ckpt_cli.ops.select import refuse_index, select_one


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
    """For each tied name of the whole checkpoint, all the names of its group, its own too; they share one list."""


def list_entries(
    checkpoint: Checkpoint, names: Sequence[str] = (), *, values: bool = False, sort: str | None = None
) -> Listing:
    """The tensors, and with `values` the other entries too, that `names` select; no name selects all.

    A name that selects no tensor lists what it does select: an entry, or all that lies below a prefix. `sort` is
    `name`, `size` (largest first) or `file` (in the order of the bytes); without it they come in the document's order.
    """
    entries = [_as_read(entry) for entry in _sorted(checkpoint, _chosen(checkpoint, names, values=values), sort)]
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    return Listing(
        path=checkpoint.path,
        format=checkpoint.format,
        entries=entries,
        tensors=len(tensors),
        parameters=unique_numel(tensors),
        nbytes=stored_nbytes(tensors),
        tied=tied_names(checkpoint.tensors if names else tensors),
    )


def _as_read(entry: Entry) -> Entry:
    """Return the entry with a deferred value read, so that it outlives the open file."""
    return Value(entry.name, entry.value) if isinstance(entry, Value) and isinstance(entry.content, Deferred) else entry


def _chosen(checkpoint: Checkpoint, names: Sequence[str], *, values: bool) -> list[Entry]:
    if not names:
        return list(checkpoint.entries if values else checkpoint.tensors)
    chosen: dict[int, Entry] = {}
    for name in names:
        selections = select_one(checkpoint, name)
        refuse_index(checkpoint, name, selections, "ls")
        selected = [selection.entry for selection in selections]
        tensors = [entry for entry in selected if isinstance(entry, Tensor)]
        chosen.update((id(entry), entry) for entry in (tensors if tensors and not values else selected))
    return list(chosen.values())


def _sorted(checkpoint: Checkpoint, entries: list[Entry], sort: str | None) -> list[Entry]:
    if sort == "name":
        return sorted(entries, key=lambda entry: entry.name)
    if sort == "size":
        return sorted(entries, key=lambda entry: entry.nbytes if isinstance(entry, Tensor) else 0, reverse=True)
    if sort == "file":
        return sorted(entries, key=lambda entry: _place(checkpoint, entry))
    return entries


def _place(checkpoint: Checkpoint, entry: Entry) -> tuple[bool, int, int]:
    """Return the place of an entry's first byte, or its first part's: entries without bytes first, compressed last."""
    views = all_strided([entry]) if isinstance(entry, Tensor) else []
    if not views or views[0].storage is None:
        return (False, -1, -1)
    try:
        begin, end = views[0].span
        extents = checkpoint.container.extents(views[0].storage, begin, end - begin)
    except UnsupportedError:
        return (True, 0, 0)
    return (False, extents[0].file, extents[0].offset) if extents else (False, -1, -1)


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


def list_waste(checkpoint: Checkpoint, names: Sequence[str] = ()) -> list[Waste]:
    """The storages with bytes that no view uses, most wasteful first; with `names`, those behind what they select."""
    chosen = {view.storage for view in all_strided(_selected(checkpoint, names))}
    found = []
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        used = needed_nbytes(storage, views)
        if used < storage.nbytes and storage in chosen:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    if not names:
        found += [Waste(key, nbytes, 0, ()) for key, nbytes in unreferenced(checkpoint).items()]
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)


def unreferenced(checkpoint: Checkpoint) -> Mapping[str, int]:
    """The storages in a torch zip file that its pickle does not refer to, by their keys, with their bytes."""
    if not format_of(checkpoint).has_records:
        return {}
    from ckpt_cli.formats.zip.container import unreferenced_records

    return unreferenced_records(checkpoint.container, checkpoint.document)


def _selected(checkpoint: Checkpoint, names: Sequence[str]) -> list[Tensor]:
    """The tensors that `names` select."""
    if not names:
        return checkpoint.tensors
    found: list[Tensor] = []
    for name in names:
        selections = select_one(checkpoint, name)
        refuse_index(checkpoint, name, selections, "ls")
        found.extend(selection.entry for selection in selections if isinstance(selection.entry, Tensor))
    return found
