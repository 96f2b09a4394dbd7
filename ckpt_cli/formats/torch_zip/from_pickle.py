"""A pickle of another container as a torch zip file: the whole document, with every object in it."""

from __future__ import annotations

from contextlib import closing

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import CkptError, FormatError, MalformedError, UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.torch_zip.write import write_saved
from ckpt_cli.formats.zip.container import ZipStorages, prefix_of
from ckpt_cli.model.changes import Changes, Content, difference, entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Storage
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.pickles.edit.apply import Editing
from ckpt_cli.pickles.edit.retarget import Retargeting
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, PersistentId, nodes_of
from ckpt_cli.pickles.references import references_of, storage_key
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import Place
from ckpt_cli.pickles.tensors.rebuild import Rebuilder


class Known:
    """The storages that entries have, by the keys that the pickle refers to them by."""

    big_endian = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.by_key: dict[str, Storage] = {}
        pending = list(checkpoint.tensors)
        while pending:
            tensor = pending.pop()
            if tensor.storage is not None:
                self.by_key.setdefault(tensor.storage.key, tensor.storage)
            pending.extend(tensor.parts)

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """The storage of a key; raises UnsupportedError for one that only an object has which does not open up."""
        if key not in self.by_key:
            raise UnsupportedError(f"storage {key!r} is used by an object only that does not open up to entries")
        return self.by_key[key]


class Document:
    """A checkpoint whose pickle is about to become that of a torch zip file, with some changes.

    Raises UnsupportedError for a pickle that refers to what a zip file cannot have.
    """

    def __init__(self, checkpoint: Checkpoint, changes: Changes, contents: dict[Storage, Content], stem: str) -> None:
        graph = checkpoint.document
        if not isinstance(graph, Graph):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} has no pickle to be kept")
        self._data = graph.data
        self._wanted = entries_after(checkpoint.entries, changes)
        self._stem = stem
        finder = Known(checkpoint)
        editing = Editing(graph, finder, Place(0))  # arrays in the pickle stay, wherever they are
        retargeting = Retargeting(
            editing, Rebuilder(CALLS, graph, finder, WalkBudget(graph.nbytes)), checkpoint.tensors
        )
        retargeting.carry_out(changes)
        editing.carry_out(changes)
        self._root = editing.root
        unwrap_classes(self._root)
        self._storages = _number(self._root, finder, retargeting.storages)
        self._out = NewCheckpoint((), contents, checkpoint.container.files)

    @property
    def storages(self) -> list[Storage]:
        """The storages that the new pickle refers to, in their order."""
        return self._storages

    @property
    def nbytes(self) -> int:
        """The bytes of the new file."""
        return self._write(None, no_progress)

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the pickle and all that it refers to."""
        self._write(target, progress)

    def _write(self, target: LocalFile | None, progress: Progress) -> int:
        return write_saved(self._root, self._storages, self._out, target, progress, prefix=self._stem, data=self._data)

    def verify(self, path: str) -> None:
        """Read the new file back, and compare its pickle with the one that was meant."""
        from ckpt_cli.formats.open import open_checkpoint

        try:
            with closing(open_checkpoint(path)) as copy:
                container, graph = copy.container, copy.document
                if not isinstance(container, ZipStorages) or not isinstance(graph, Graph):
                    raise MalformedError("it is no torch zip file")
                records = container.records
                data = records.read(f"{prefix_of(records)}data.pkl", limits.PICKLE_INFLATED)
                same = same_graphs(self._root, self._data, graph.root, data)
                fault = difference(self._wanted, copy.entries) if same else "its pickle is another one"
        except FormatError as error:
            fault = error.problem
        if fault:
            raise CkptError(f"the new file did not read back as it should, so nothing was replaced: {fault}")


def _number(root: object, finder: Known, new: dict[int, Storage]) -> list[Storage]:
    """Give the storages keys from 0, in the order in which the pickle reaches them, as torch.save of today does."""
    numbers: dict[Storage, str] = {}
    ordered: list[Storage] = []
    for reference in references_of(root):
        key = storage_key(reference)
        pid = reference.pid
        if key is None or not isinstance(pid, tuple):
            raise UnsupportedError("its pickle refers to something outside that is no storage, which a zip cannot have")
        if len(pid) > 5 and pid[5] is not None:
            raise UnsupportedError(f"storage {key!r} is a view of another one, which a zip cannot have")
        storage = new.get(id(reference)) or finder.find(key, 0, "")
        if storage not in numbers:
            numbers[storage] = str(len(numbers))
            ordered.append(storage)
        reference.pid = ("storage", pid[1], numbers[storage], *pid[3:5])
    return ordered


def unwrap_classes(root: object) -> None:
    """Put the classes of modules themselves where the old stream has them together with their source code."""
    for node in nodes_of(root):
        if isinstance(node, Call) and (kind := _class_of(node.func)) is not None:
            node.func = kind
        if isinstance(node, list):
            node[:] = [_class_of(item) or item for item in node]
        elif isinstance(node, Dict):
            node.pairs[:] = [_class_of(item) or item for item in node.pairs]
        elif isinstance(node, Call) and isinstance(node.args, tuple):
            node.args = tuple(_class_of(item) or item for item in node.args)


def _class_of(node: object) -> Global | None:
    """The class in a reference to a class with its source (torch/serialization.py, `_legacy_save`)."""
    pid = node.pid if isinstance(node, PersistentId) else None
    if isinstance(pid, tuple) and len(pid) > 1 and str(pid[0]) == "module" and isinstance(pid[1], Global):
        return pid[1]
    return None
