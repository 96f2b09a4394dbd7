"""What `ls --waste` answers: storages larger than the views of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_cli.model import Checkpoint, Tensor
from ckpt_cli.ops.names import refuse_index, select_one
from ckpt_cli.ops.shared import all_strided, by_storage, needed_nbytes


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
    chosen = {id(view.storage) for view in all_strided(_selected(checkpoint, names))}
    found = []
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        used = needed_nbytes(storage, views)
        if used < storage.nbytes and id(storage) in chosen:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    if not names:
        found += [Waste(key, nbytes, 0, ()) for key, nbytes in unreferenced(checkpoint).items()]
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)


def unreferenced(checkpoint: Checkpoint) -> Mapping[str, int]:
    """The storages in a torch zip file that its pickle does not refer to, by their keys, with their bytes."""
    if checkpoint.format != "zip":
        return {}
    from ckpt_cli.formats.zip_storages import unreferenced_records

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
