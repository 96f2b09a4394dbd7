"""What `ls --waste` answers: storages larger than the views of them."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_cli.model import Checkpoint
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


def list_waste(checkpoint: Checkpoint) -> list[Waste]:
    """The storages with bytes that no view uses, most wasteful first."""
    found = []
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        used = spans_used(views)
        if used < storage.nbytes:
            found.append(Waste(storage.key, storage.nbytes, used, tuple(view.name for view in views)))
    return sorted(found, key=lambda waste: waste.used - waste.nbytes)
