"""What `ls --waste` answers: storages larger than the views of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckpt_cli.model import Checkpoint, Tensor
from ckpt_cli.ops.names import refuse_index, select_one
from ckpt_cli.ops.shared import all_strided, by_storage, spans_used


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


def list_waste(checkpoint: Checkpoint, names: Sequence[str] = ()) -> list[Waste]:
    """The storages with bytes that no view uses, most wasteful first; with `names`, those behind what they select."""
    chosen = {id(view.storage) for view in all_strided(_selected(checkpoint, names))}
    found = []
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        used = spans_used(views)
        if used < storage.nbytes and id(storage) in chosen:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)


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
