"""A pickle with all its changes carried out, and the storages that it then refers to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import MalformedError, RefusedError
from ckpt_cli.model.changes import Changes, Write, difference, entries_after
from ckpt_cli.model.checkpoint import Entry, Storage, Tensor
from ckpt_cli.model.names import Holders
from ckpt_cli.pickles.edit.apply import Editing
from ckpt_cli.pickles.edit.flat import edit_flat
from ckpt_cli.pickles.edit.relocate import relocate
from ckpt_cli.pickles.edit.retarget import Retargeting
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Call, Graph, PersistentId, References, nodes_of, protocol_of
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.references import referred, storage_key
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.tensors.storages import StorageFinder
from ckpt_cli.pickles.write import write_pickle


class _TooLongError(Exception):
    """A pickle that does not fit where it was to be put."""


class EditedPickle:
    """The graph of a checkpoint's pickle, changed; nothing is written. The old graph is used up."""

    def __init__(
        self, graph: Graph, finder: StorageFinder, place: PicklePlace | None, entries: Sequence[Entry], changes: Changes
    ) -> None:
        self.data = graph.data
        """The old pickle, which long strings of the new one are copied from."""
        tensors = [entry for entry in entries if isinstance(entry, Tensor)]
        self._old = _storages_of(tensors)
        self._names = {} if changes.added else changes.names
        """The new names of the entries that are wanted; nothing where these have them."""
        staying = [entry for entry in entries if entry.name not in changes.values] if changes.values else entries
        self._wanted = entries_after(staying, replace(changes, names={}) if self._names else changes)
        new = changes.new_tensors
        self._wanted += new.values()
        self._added = [name for name in changes.added if name not in new]
        self._added += [changes.names.get(name, name) for name in changes.values]
        self._emptied = Holders(changes.dropped)
        self._rebuilder = Rebuilder(CALLS, graph, finder, WalkBudget(graph.nbytes))
        self._finder = finder
        only_names = not (changes.dropped or changes.dropped_prefixes or changes.root or changes.tensors
                          or changes.values or changes.added)  # fmt: skip
        old_keys = set() if only_names else self._old_keys(graph)
        self.root = graph.root
        """The new pickle's root."""
        self.new: dict[int, Storage] = {}
        """The storage of each reference that is new, by its identity."""
        if not edit_flat(graph, entries, changes, self._rebuilder.is_tensor):
            editing = Editing(graph, finder, place, entries)
            retargeting = Retargeting(editing, self._rebuilder, tensors)
            retargeting.carry_out(changes)
            editing.carry_out(changes, {name: retargeting.made(tensor) for name, tensor in new.items()})
            self._wanted = [entry for entry in self._wanted if entry.name not in editing.filled]
            self.root, self.new = editing.root, retargeting.storages
        if changes.device is not None:
            relocate(self.root, changes.device)
        self._references: list[PersistentId | Call] = []
        self._protocol = protocol_of(nodes_of(self.root, self._references, within_rows=False))
        self.old_keys = _keys_of(self._references) if only_names else old_keys
        """The keys of all storages that the old pickle refers to."""

    def references(self) -> Iterator[tuple[PersistentId | Call, str, Storage]]:
        """Every reference to a storage in the order in which a pickler reaches them, with its key and storage.

        In place of the reference of a row its call, as `rekey` takes it.
        """
        for reference in self._references:
            key = storage_key(reference)
            if key is None:
                continue
            storage = self.new.get(id(reference)) or self._old.get(key)
            if storage is None:  # of a tensor in an object that does not open up to entries
                storage = self._old[key] = self._rebuilder.storages.of(referred(reference))[0]
            yield reference, key, storage

    def _old_keys(self, graph: Graph) -> set[str]:
        """Return the keys of all storages that can be reached in the old pickle.

        Every reference of the pickle is known; only where one is to no entry's storage it may have been thrown away.
        """
        read = graph.persistent.nodes if isinstance(graph.persistent, References) else graph.persistent
        keys = {node.key if type(node) is Call else storage_key(node) for node in read} - {None}
        if keys <= self._old.keys():
            return {key for key in keys if key is not None}
        references: list[PersistentId | Call] = []
        for _ in nodes_of(graph.root, references, within_rows=False):
            pass
        return _keys_of(references)

    def write(self, write: Write) -> None:
        """Write the new pickle, a bounded piece at a time."""
        write_pickle(self.root, self.data, write, self._protocol)

    def size(self) -> int:
        """Bytes of the new pickle."""
        counted = 0

        def count(piece: bytes | memoryview) -> None:
            nonlocal counted
            counted += len(piece)

        self.write(count)
        return counted

    def verified(self, most: int) -> bytes | None:
        """The new pickle, read back and compared with what was meant; None where it has more than `most` bytes.

        For one that refers to the old storages only.
        """
        written = bytearray()

        def write(piece: bytes | memoryview) -> None:
            if len(written) + len(piece) > most:
                raise _TooLongError
            written.extend(piece)

        try:
            self.write(write)
        except _TooLongError:
            return None
        pickle = bytes(written)
        written.clear()
        graph = read_pickle(pickle)
        entries = entries_of(graph, _KnownStorages(self._old, self._finder), place=PicklePlace(0))
        self._require_same(graph)
        del graph  # before more is held
        self._require_wanted(entries)
        return pickle

    def verify(self, graph: Graph, entries: Sequence[Entry]) -> None:
        """Compare what was read back with what was meant.

        Raises MalformedError where the pickle is another one, RefusedError where an edit did more than was asked
        because several names are kept in one object.
        """
        self._require_same(graph)
        self._require_wanted(entries)

    def _require_same(self, graph: Graph) -> None:
        if not same_graphs(self.root, self.data, graph.root, graph.data):
            raise MalformedError("its pickle is another one")

    def _require_wanted(self, entries: Sequence[Entry]) -> None:
        fault = difference(self._wanted, entries, self._added, self._emptied, self._names)
        if fault:
            raise RefusedError(f"that cannot be done here, as several names are kept in one object: {fault} then")


def _keys_of(references: Iterable[PersistentId | Call]) -> set[str]:
    """Return the keys of the storages that some references are to."""
    return {key for key in map(storage_key, references) if key is not None}


class _KnownStorages:
    """The storages of the old pickle, for one that refers to the same."""

    def __init__(self, storages: Mapping[str, Storage], finder: StorageFinder) -> None:
        self.big_endian = finder.big_endian
        self._storages = storages
        self._finder = finder

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """Return the storage of a key; raises FormatError where it is missing or too short."""
        known = self._storages.get(key)
        same = known is not None and known.nbytes == nbytes and known.location == location
        return known if known is not None and same else self._finder.find(key, nbytes, location)


def _storages_of(tensors: Sequence[Tensor]) -> dict[str, Storage]:
    """The storages of some tensors and of their parts, by their keys."""
    found: dict[str, Storage] = {}
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if tensor.storage is not None:
            found[tensor.storage.key] = tensor.storage
        pending.extend(tensor.parts)
    return found
