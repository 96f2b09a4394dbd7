"""References to storages: the persistent ids that torch writes, read, listed and numbered.

Source: torch/serialization.py (`persistent_id` of `_save` and `_legacy_save`): a tuple of the word `storage`, the
storage's class, its key, its location and its elements; torch 0.3 added which part of another storage it is a view of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles.graph import Call, Global, PersistentId, nodes_of
from ckpt_cli.pickles.tensors.arguments import is_count, odd_storage, storage_dtype, text_of


class Reference:
    """The parts of a reference to a storage."""

    __slots__ = ("key", "kind", "location", "numel", "view")

    def __init__(self, key: str, kind: Global, numel: int, location: str, view: object) -> None:
        self.key = key
        self.kind = kind
        """The class of the storage, which has its dtype."""
        self.numel = numel
        """Elements of that dtype; bytes of an untyped storage."""
        self.location = location
        self.view = view
        """The part of another storage that it is a view of, as torch 0.3 wrote it; else None."""

    @property
    def dtype(self) -> DType:
        """The dtype of its class, uint8 for untyped ones; raises MalformedError for a class that is not torch's."""
        return storage_dtype(self.kind)

    @property
    def itemsize(self) -> int:
        """Bytes of one element of its class."""
        return max(self.dtype.bits // 8, 1)


def _parts_of(node: object) -> tuple[Any, ...] | None:
    """Return the parts of a persistent id that is a storage's; None for any other node."""
    pid = node.pid if type(node) is PersistentId else None
    if type(pid) is not tuple or len(pid) < 5:
        return None
    tag = pid[0]
    return pid if tag == "storage" or (type(tag) is not str and text_of(tag) == "storage") else None


def is_storage(node: object) -> bool:
    """True if a node refers to a storage outside of the pickle."""
    return type(node) is PersistentId and _parts_of(node) is not None


def storage_key(node: object) -> str | None:
    """Return the key of the storage that a node, or the arguments of a row, refer to; None for anything else."""
    if type(node) is Call and node.row is not None:
        return node.key
    pid = _parts_of(node)
    return None if pid is None else text_of(pid[2])


def reference_of(node: object) -> Reference | None:
    """Return what a reference to a storage says; None for any other node.

    Raises MalformedError where its parts are not of the kinds that torch writes.
    """
    pid = _parts_of(node)
    if pid is None:
        return None
    _, kind, key, location, numel, *more = pid
    if type(key) is not str or type(location) is not str:  # Python 2 wrote bytes; a key of one digit is a Letter
        key, location = text_of(key), text_of(location)
    if type(kind) is not Global or key is None or location is None or not is_count(numel):
        raise odd_storage()
    return Reference(key, kind, numel, location, more[0] if more else None)


def references_of(root: object) -> Iterator[PersistentId]:
    """Every reference to something outside the pickle, in the order in which a pickler reaches them."""
    return (node for node in nodes_of(root) if type(node) is PersistentId)


def storage_references(root: object) -> list[PersistentId]:
    """Every reference to a storage, in the order of the pickle; raises UnsupportedError for one to anything else."""
    found = list(references_of(root))
    for reference in found:
        pid = _parts_of(reference)
        if pid is None:
            raise UnsupportedError("its pickle refers to something outside that is not a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise UnsupportedError(
                f"storage {storage_key(reference)!r} is a view of another one, which a zip cannot have"
            )
    return found


def number_storages(root: object, storages: Mapping[int, Storage]) -> list[Storage]:
    """Give each reference the number of its storage as key, as torch.save numbers them.

    `storages` has the storage by the reference's identity. Returns the storages by their numbers.
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


def referred(reference: PersistentId | Call) -> PersistentId:
    """Return a reference itself, or the one that a row has as its first argument."""
    return reference if type(reference) is PersistentId else reference.args[0]  # type: ignore[union-attr, index]


def rekey(reference: PersistentId | Call, key: str, *more: object) -> None:
    """Point a reference to another key; `more` is what follows the five parts that every reference has."""
    if type(reference) is Call and reference.row is not None and len(key) > 1 and not more:
        reference.key = key
        return
    node = referred(reference)
    pid = node.pid
    if isinstance(pid, tuple):
        node.pid = (*pid[:2], key, *(pid[3:5] if more else pid[3:]), *more)
