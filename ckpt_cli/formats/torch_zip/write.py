"""New torch zip files, as torch.save writes them: of a flat dict of tensors, of nested dicts, or of a whole pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ckpt_cli.budget import WalkBudget
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import MalformedError, UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.plain import KnownStorages
from ckpt_cli.formats.writing import OpenCopy, announced, reading_back, verify_new
from ckpt_cli.formats.zip.layout import ALIGNMENT
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.changes import Changes, Content, difference, entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.edit.apply import Editing
from ckpt_cli.pickles.edit.retarget import Retargeting
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, Inline, PersistentId, nodes_of
from ckpt_cli.pickles.references import number_storages, references_of, storage_key, storage_references
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.make import Maker, state_of
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.tensors.storages import StorageFinder
from ckpt_cli.pickles.write import write_pickle

Nest = Callable[[Iterable[tuple[str, tuple["str | int", ...], object]]], object]
"""Makes nested dicts and lists of names, paths and nodes; returns the root."""

WriteObject = Callable[
    [object, Sequence[Storage], NewCheckpoint, "LocalFile | None", Progress, "bytes | memoryview"], int
]
"""Writes an object, its storages by their numbers, and returns its bytes; without a target it only measures."""


def spelled(dtype: DType) -> str | None:
    """Return torch's spelling of a dtype; None for one that it does not have."""
    return None if dtype.category == "quantized" or dtype.elements > 1 else dtype.name


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write a dict of tensors, or the OrderedDict that a state_dict is; returns its bytes.

    Without a target it only measures.
    """
    maker = Maker()
    root = state_of(new, maker)
    stem = os.path.basename(new.stem) or "archive"
    return write_saved(root, maker.storages, new, target, progress, prefix=stem)


def write_object(
    root: object,
    storages: Sequence[Storage],
    new: NewCheckpoint,
    target: LocalFile | None,
    progress: Progress,
    data: bytes | memoryview,
) -> int:
    """Write what torch.save makes of an object into a file of its own, as `write_saved` does."""
    return write_saved(root, storages, new, target, progress, prefix=new.stem, data=data)


def write_saved(
    root: object,
    storages: Sequence[Storage],
    new: NewCheckpoint,
    target: LocalFile | None,
    progress: Progress = no_progress,
    *,
    prefix: str = "archive",
    data: bytes | memoryview = b"",
    base: int = 0,
) -> int:
    """Write what torch.save makes of an object: its pickle, and its storages by their numbers; returns its bytes.

    Without a target it only measures. `data` is the pickle that the object's graph was read from; the file is added to
    from byte `base` on.
    """
    pickle = bytearray()
    write_pickle(root, data, pickle.extend)
    return write_pickled(bytes(pickle), storages, new, target, progress, prefix=prefix, base=base)


def write_pickled(
    pickle: bytes,
    storages: Sequence[Storage],
    new: NewCheckpoint,
    target: LocalFile | None,
    progress: Progress = no_progress,
    *,
    prefix: str = "archive",
    base: int = 0,
) -> int:
    """Write what `write_saved` writes, of an object that is pickled already; returns its bytes."""
    writer = ZipWriter(target, base=base)
    writer.add(f"{prefix}/data.pkl", pickle)
    writer.add(f"{prefix}/.format_version", b"1")
    writer.add(f"{prefix}/.storage_alignment", str(ALIGNMENT).encode())
    writer.add(f"{prefix}/byteorder", b"little")
    contents = [new.contents[storage] for storage in storages]
    for number, content in enumerate(contents if target is None else announced(contents)):
        with writer.record(f"{prefix}/data/{number}", content.nbytes):
            writer.append_contents((content,), progress)
    writer.add(f"{prefix}/version", b"3\n")
    writer.add(f"{prefix}/.data/serialization_id", _identity(pickle, writer.checksums))
    return writer.close()


def _identity(pickle: bytes, checksums: Sequence[int]) -> bytes:
    """Return forty digits that identify the content, as torch's writer has them."""
    import hashlib  # takes 4 MB

    digest = hashlib.blake2b(pickle, digest_size=16)
    digest.update(b"".join(crc.to_bytes(4, "little") for crc in checksums))
    return f"{int.from_bytes(digest.digest(), 'little'):040}".encode()


def verify(new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:
    """Read the new file back, and compare it with what was meant."""
    verify_new(new.tensors, path, open_copy)


# --- objects: the pickle is kept, or put together ---------------------------------------------------------------------


class SavedObject:
    """An object about to be written, by its pickle's graph: what torch.save makes of it."""

    def __init__(
        self,
        root: object,
        storages: Sequence[Storage],
        new: NewCheckpoint,
        data: bytes | memoryview,
        open_copy: OpenCopy,
        wanted: Sequence[Entry] | None = None,
        write: WriteObject = write_object,
    ) -> None:
        self.storages = storages
        """The storages that the new pickle refers to, in their order."""
        self.new = new
        """The new checkpoint, with the bytes of all storages."""
        self._root = root
        self._data = data
        """The pickle that strings of the graph are ranges of."""
        self._open_copy = open_copy
        self._write_object = write
        self._wanted = wanted
        """The entries that the new file has; None where its pickle says all."""

    @property
    def nbytes(self) -> int:
        """The bytes of the new file."""
        return self._write(None, no_progress)

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the pickle and all storages."""
        self._write(target, progress)

    def _write(self, target: LocalFile | None, progress: Progress) -> int:
        return self._write_object(self._root, self.storages, self.new, target, progress, self._data)

    def verify(self, path: str) -> None:
        """Read the new file back, and compare its pickle with the one that was meant."""
        with reading_back(path, self._open_copy) as copy:
            graph = copy.document
            if not isinstance(graph, Graph):
                raise MalformedError("it is not a file of torch.save")
            if not same_graphs(self._root, self._data, graph.root, graph.data):
                raise MalformedError("its pickle is another one")
            fault = difference(self._wanted, copy.entries) if self._wanted is not None else None
            if fault:
                raise MalformedError(fault)


def nested(new: NewCheckpoint, nest: Nest, open_copy: OpenCopy, write: WriteObject = write_object) -> SavedObject:
    """A state of nested dicts and lists: `new.paths` has the place of each tensor and value, in their order.

    It is what torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes of a distributed checkpoint. `nest`
    makes the dicts and lists.
    """
    maker = Maker()
    nodes: dict[str, object] = {tensor.name: maker.tensor(tensor) for tensor in new.tensors}
    storages: dict[int, Storage] = {}
    for node in nodes.values():
        for reference in storage_references(node):
            storages[id(reference)] = maker.storages[int(reference.pid[2])]  # type: ignore[index]  # as it was made
    contents = dict(new.contents)
    pickles = bytearray()
    for value in new.values:
        _join(value, pickles)
        nodes[value.name] = value.root
        storages |= value.storages
        contents |= value.contents
    root = nest((name, path, nodes[name]) for name, path in new.paths.items())
    with_contents = replace(new, contents=contents)
    return SavedObject(root, number_storages(root, storages), with_contents, bytes(pickles), open_copy, write=write)


def _join(value: SavedValue, pickles: bytearray) -> None:
    """Add the pickle of a value to others, where it has long strings, and have these counted from the first byte."""
    long = [node for node in nodes_of(value.root) if isinstance(node, Inline)]
    for node in long:
        object.__setattr__(node, "offset", node.offset + len(pickles))
    if long:
        pickles += value.data


def document(
    checkpoint: Checkpoint,
    changes: Changes,
    contents: Mapping[Storage, Content],
    stem: str,
    open_copy: OpenCopy,
    write: WriteObject = write_object,
) -> SavedObject:
    """The pickle of another container, with every object in it, and with some changes.

    Raises UnsupportedError for a pickle that refers to what a zip file cannot have.
    """
    graph = checkpoint.document
    if not isinstance(graph, Graph):
        raise UnsupportedError(f"a checkpoint of format {checkpoint.format} has no pickle to be kept")
    wanted = entries_after(checkpoint.entries, changes)
    finder = KnownStorages(checkpoint.tensors)
    editing = Editing(graph, finder, PicklePlace(0))  # arrays in the pickle stay, wherever they are
    retargeting = Retargeting(editing, Rebuilder(CALLS, graph, finder, WalkBudget(graph.nbytes)), checkpoint.tensors)
    retargeting.carry_out(changes)
    editing.carry_out(changes)
    root = editing.root
    unwrap_classes(root)
    storages = _number(root, finder, retargeting.storages)
    new = NewCheckpoint((), contents, stem=stem)
    return SavedObject(root, storages, new, graph.data, open_copy, wanted, write)


def _number(root: object, finder: StorageFinder, new: dict[int, Storage]) -> list[Storage]:
    """Give the storages keys from 0, in the order in which the pickle reaches them, as torch.save of today does."""
    numbers: dict[Storage, str] = {}
    ordered: list[Storage] = []
    for reference in references_of(root):
        key = storage_key(reference)
        pid = reference.pid
        if key is None or not isinstance(pid, tuple):
            raise UnsupportedError(
                "its pickle refers to something outside that is not a storage, which a zip cannot have"
            )
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
