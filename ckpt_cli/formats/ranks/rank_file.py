"""One rank's file: its pickle as a graph, of which only what is asked for becomes tensors and entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import MalformedError, about
from ckpt_cli.files.places import name_of
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.plain import KnownStorages
from ckpt_cli.formats.sharded.read import ReadOne
from ckpt_cli.formats.signatures import beginning, is_zip
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor
from ckpt_cli.pickles.containers import key_text
from ckpt_cli.pickles.flatten import entries_of, objects_of
from ckpt_cli.pickles.graph import Call, Dict, Graph, Set
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.tensors.storages import StorageFinder


class RankFile:
    """A file of torch.save that one rank wrote."""

    def __init__(self, file: SourceFile, read_one: ReadOne) -> None:
        """Read the pickle; raises a FormatError where it cannot be read, MalformedError where the file has none."""
        self.path = file.path
        self.name = name_of(file.path)
        self._place: PicklePlace | None = None
        with about(file.path):
            self.graph, self._finder = self._zip(file) if is_zip(beginning(file)) else _other(read_one(file))
            self._budget = WalkBudget(self.graph.nbytes)
            self._rebuilder = Rebuilder(CALLS, self.graph, self._finder, self._budget, self._place)
        self._storages: dict[Storage, Storage] = {}
        """The storages under keys that say which file they are in."""
        self.root = self.pairs(self.graph.root)
        """What the file holds, by key."""

    def _zip(self, file: SourceFile) -> tuple[Graph, StorageFinder]:
        records = ZipRecords(file)
        saved = SavedPickle(ZipStorages(records), records, prefix_of(records))
        graph = saved.graph()
        self._place = saved.place()
        return graph, saved

    @property
    def objects(self) -> list[str]:
        """The names that its pickle would import, without those of plain tensors."""
        return objects_of(self.graph)

    def pay(self, steps: int) -> None:
        """Count items that are looked at; raises LimitError for more than any honest file would need."""
        with about(self.path):
            self._budget.steps(steps)

    def pairs(self, node: object) -> dict[str, object]:
        """The values of a mapping by their keys as text; nothing for what is not a mapping."""
        pairs = node.pairs if isinstance(node, Dict | Call) else ()
        self.pay(len(pairs))
        return {key_text(key): value for key, value in zip(pairs[::2], pairs[1::2], strict=False)}

    def items(self, node: object) -> Sequence[object]:
        """The items of a list, tuple or set; nothing for anything else."""
        found = node if isinstance(node, list | tuple) else node.items if isinstance(node, Call | Set) else ()
        self.pay(len(found))
        return found

    def tensor(self, name: str, node: object) -> Tensor | None:
        """Return the tensor that a node stands for; None where it stands for something else."""
        with about(self.path):
            tensor = self._rebuilder.tensor(name, node)
        return self._own(tensor) if tensor is not None else None

    def vector(self, name: str, node: object) -> Tensor:
        """The same, of what can be nothing else."""
        tensor = self.tensor(name, node)
        if tensor is None:
            raise MalformedError(f"its {name} is not a tensor", path=self.path)
        return tensor

    def entries(self, pairs: Iterable[tuple[str, object]]) -> list[Entry]:
        """Every leaf below some nodes, each called by the name that is given with it."""
        root = Dict([part for pair in pairs for part in pair])
        if not root.pairs:
            return []
        with about(self.path):
            found = entries_of(replace(self.graph, root=root), self._finder, place=self._place)
        return [self._own(entry) if isinstance(entry, Tensor) else entry for entry in found]

    def _own(self, tensor: Tensor) -> Tensor:
        """The tensor, with its storage's key after the name of the file."""
        parts = tuple(map(self._own, tensor.parts))
        storage = tensor.storage
        if storage is not None and storage not in self._storages:
            self._storages[storage] = replace(storage, key=f"{self.name}:{storage.key}")
        if storage is None:
            return replace(tensor, parts=parts) if parts else tensor
        return replace(tensor, storage=self._storages[storage], parts=parts)


def _other(checkpoint: Checkpoint) -> tuple[Graph, StorageFinder]:
    """The pickle of a file that is not a zip, and the finder of its storages."""
    if not isinstance(checkpoint.document, Graph):
        raise MalformedError("it is not a file of torch.save")
    return checkpoint.document, KnownStorages(checkpoint.tensors)


def number_of(node: object) -> int | None:
    """An integer, be it the value of an enum; None for anything else."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and len(node.args) == 1:
        node = node.args[0]
    return node if type(node) is int else None
