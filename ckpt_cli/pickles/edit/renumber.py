"""The storages of a pickle numbered in the order in which it reaches them, as torch.save numbers them."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles.edit.retarget import references_of, storage_key
from ckpt_cli.pickles.graph import PersistentId


def storage_references(root: object) -> list[PersistentId]:
    """Every reference to a storage, in the order of the pickle; raises UnsupportedError for one to anything else."""
    found = list(references_of(root))
    for reference in found:
        pid = reference.pid
        if storage_key(reference) is None or not isinstance(pid, tuple):
            raise UnsupportedError("its pickle refers to something outside that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise UnsupportedError(
                f"storage {storage_key(reference)!r} is a view of another one, which a zip cannot have"
            )
    return found


def number_storages(root: object, storages: Mapping[int, Storage]) -> list[Storage]:
    """Give each reference the number of its storage as key; `storages` has the storage by the reference's identity.

    Returns the storages by their numbers.
    """
    numbers: dict[Storage, str] = {}
    ordered: list[Storage] = []
    for reference in storage_references(root):
        storage = storages[id(reference)]
        if storage not in numbers:
            numbers[storage] = str(len(ordered))
            ordered.append(storage)
        pid = reference.pid
        if isinstance(pid, tuple):
            reference.pid = ("storage", pid[1], numbers[storage], *pid[3:5])
    return ordered
