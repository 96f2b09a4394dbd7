"""The storages of one pickle: those that it refers to, and those whose bytes stand within it.

Sources: torch/serialization.py (`persistent_load`), torch/storage.py (`_load_from_bytes`).
"""

from __future__ import annotations

from typing import Protocol

from ckpt_cli.budget import WalkBudget
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import MalformedError
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles.graph import Call, Global, Graph
from ckpt_cli.pickles.references import reference_of
from ckpt_cli.pickles.tensors.arguments import is_count, odd_storage, storage_dtype
from ckpt_cli.pickles.tensors.inline_bytes import Buffer, InlineBytes, PicklePlace, buffer_of

_SAVE_STEPS = 100
"""The cost of reading a save within the pickle, in steps of the budget."""


class StorageFinder(Protocol):
    """A format's own way to the storages that a pickle refers to."""

    big_endian: bool
    """True where typed storages were written on a big-endian machine."""

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage called `key`; raises FormatError where its bytes are missing or too few."""


class Storages:
    """Finds the storage that each reference of a pickle is to; each storage is one object."""

    def __init__(
        self, graph: Graph, finder: StorageFinder, budget: WalkBudget, place: PicklePlace | None = None
    ) -> None:
        self._data = graph.data
        self._finder = finder
        self._budget = budget
        self._place = place
        """The place of the pickle; None where storages within it are not to be had."""
        self.views: dict[int, tuple[int, int]] = {}
        """The part of a storage that a reference is to, where it is not to all: the first element, and how many."""
        self._known: dict[str, tuple[Storage, DType | None]] = {}
        """The storage found by each key, so that a storage is one object, with the dtype by which it is known."""
        self._kinds: dict[Global, tuple[DType, int]] = {}
        """The dtype of each storage class, and the bytes of one of its elements."""
        self._embedded: dict[int, Storage] = {}
        """The storages within the pickle, by the identity of the node that their bytes are in."""
        self._loaded: dict[int, tuple[Storage, DType]] = {}
        """The same for those that were pickled as a save of their own."""
        self._preface = b""
        """The bytes that the last of these had before its main pickle: nearly every one has the same."""

    def of(self, node: object, *, bare: bool = False) -> tuple[Storage, DType]:
        """Return the storage that a persistent id refers to, and the dtype of its class (uint8 for untyped ones).

        A `bare` reference, to a storage by itself, may be of another class than those of tensors.
        Raises MalformedError for anything that torch does not write, FormatError where bytes are missing.
        """
        reference = reference_of(node)
        if reference is None:
            return self._load(node)
        key = reference.key
        dtype, itemsize = self.kind_of(reference.kind)
        nbytes = reference.numel * itemsize
        if reference.view is not None:
            self.views[id(node)] = _part_of(reference.view, reference.numel)
        found = self._known.get(key)
        if found is None:
            found = self._finder.find(key, nbytes, reference.location), dtype
            self._known[key] = (found[0], None) if bare else found
        elif found[1] is None or bare:
            known, found = found[1], (found[0], dtype)
            self._known[key] = (found[0], known if bare else dtype)
        elif found[1] is not dtype:
            raise MalformedError(f"storage {key!r} is {found[1]} in one place and {dtype} in another")
        if found[0].nbytes < nbytes:
            raise MalformedError(f"storage {key!r} has {found[0].nbytes} bytes in one place and {nbytes} in another")
        return found[0], dtype

    def at(self, key: str, dtype: DType, nbytes: int, location: str) -> Storage | None:
        """Return the storage of a key as `of` does; None where it is known otherwise."""
        found = self._known.get(key)
        if found is None:
            storage = self._finder.find(key, nbytes, location)
            self._known[key] = storage, dtype
            return storage
        return found[0] if found[1] is dtype and found[0].nbytes >= nbytes else None

    def embedded(self, node: object, buffer: Buffer, begin: int, nbytes: int, location: str = "cpu") -> Storage | None:
        """Return the storage that a range of a node's bytes is; None where it is not known where the pickle stands."""
        if self._place is None:
            return None
        found = self._embedded.get(id(node))
        if found is None or found.nbytes != nbytes:
            at = None if buffer.offset is None else (self._place.begin or 0) + buffer.offset + begin
            key = f"text {len(self._embedded)}" if at is None else f"@{at}"
            found = Storage(key, nbytes, location, InlineBytes(key, begin, buffer, self._place))
            self._embedded[id(node)] = found
        return found

    def _load(self, node: object) -> tuple[Storage, DType]:
        """Return the storage that plain pickle.dump wrote: `_load_from_bytes` of a whole legacy save."""
        func = node.func if type(node) is Call else None
        args = node.args if type(node) is Call else None
        if not isinstance(func, Global) or func.name != "_load_from_bytes" or type(args) is not tuple or len(args) != 1:
            raise odd_storage()
        found = self._loaded.get(id(args[0]))
        if found is None:
            found = self._loaded[id(args[0])] = self._loaded_from(args[0])
        return found

    def _loaded_from(self, node: object) -> tuple[Storage, DType]:
        buffer = buffer_of(node, self._data)
        if buffer is None:
            raise odd_storage()
        from ckpt_cli.files.memory import MemorySource
        from ckpt_cli.pickles.legacy_save import HEAD, read_save

        self._budget.steps(_SAVE_STEPS)
        head = buffer.data
        if buffer.codec:
            head = str(head[:HEAD], buffer.codec, "ignore").encode("latin-1", "ignore")
        save = read_save(MemorySource(head, size=len(buffer.data)), 0, self._preface)
        self._preface = bytes(head[: save.begin])
        reference = reference_of(save.graph.root)
        if reference is None or reference.key not in save.places:
            raise MalformedError("the pickle has a storage as a save of its own, and that holds something else")
        begin, nbytes = save.places[reference.key]
        found = self.embedded(node, buffer, begin, nbytes, reference.location)
        return found or Storage(f"save {len(self._loaded)}", nbytes, reference.location), reference.dtype

    def kind_of(self, kind: Global) -> tuple[DType, int]:
        """Return the dtype of a storage class, and the bytes of an element; raises MalformedError for another class."""
        found = self._kinds.get(kind)
        if found is None:
            dtype = storage_dtype(kind)
            found = self._kinds[kind] = dtype, max(dtype.bits // 8, 1)
        return found


def _part_of(view: object, numel: int) -> tuple[int, int]:
    """Return the range of elements of a view of a storage, as torch 0.3 wrote it: (key, offset, size)."""
    if type(view) is not tuple or len(view) != 3 or not is_count(view[1]) or not is_count(view[2]):
        raise odd_storage()
    if view[1] + view[2] > numel:
        raise MalformedError(f"a view of elements {view[1]}–{view[1] + view[2]} of a storage that has {numel}")
    return view[1], view[2]
