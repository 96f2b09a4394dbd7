"""The folder that torch.distributed.checkpoint writes: a pickle that says where items are, and files of items.

Each item of a `__RANK_N.distcp` is a whole file that torch.save wrote, one behind another; saved with
SerializationFormat.SAFETENSORS, its tensors are one safetensors file instead (filesystem.py there, `_write_item`). An
item is opened when its bytes are asked for, so a checkpoint is listed by its `.metadata` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import CkptError, LimitError, MalformedError, TruncatedError, UnsupportedError, about, quoted
from ckpt_cli.files.open import Opener
from ckpt_cli.files.places import folder_of, join, present
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.dcp.boxes import Chunks
from ckpt_cli.formats.dcp.container import ChunkedTensor, Composed, Items
from ckpt_cli.formats.dcp.metadata import DcpMetadata, ItemPlace, Saved, metadata_of
from ckpt_cli.formats.zip.container import SavedPickle
from ckpt_cli.model.changes import content_of
from ckpt_cli.model.checkpoint import Checkpoint, Deferred, Entry, Opaque, Tensor, Value, contiguous_stride
from ckpt_cli.model.new_checkpoint import SavedValue
from ckpt_cli.pickles.flatten import objects_of
from ckpt_cli.pickles.graph import Graph, nodes_of
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.references import storage_references
from ckpt_cli.pickles.tensors.storages import Storages

if TYPE_CHECKING:
    from ckpt_cli.formats.sharded.read import ReadOne

NAME = "dcp"

METADATA = ".metadata"
"""The file that says what a checkpoint has and where."""

_OWN = (
    "torch.distributed.checkpoint.metadata.",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.planner.",  # the plans that Megatron-core keeps
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "torch.strided",
    "builtins.getattr",  # of an enum, by Python 3.11.0 to 3.11.3; `scan` judges what it takes
    "__builtin__.getattr",
)
"""The beginnings of the names of classes that every `.metadata` has."""


class SavedItem(Deferred):
    """A pickled item that is read when it is asked for: there may be thousands, and listing tensors needs none."""

    __slots__ = ("_items", "_place")

    def __init__(self, place: ItemPlace | None, items: Items) -> None:
        super().__init__()
        self._place = place
        self._items = items

    def saved(self) -> tuple[Graph, SavedPickle]:
        """Return the pickle of the item, and its storages; raises a CkptError where that cannot be read."""
        if self._place is None:
            raise MalformedError("it is stored nowhere")
        return self._items.saved(self._place)

    def load(self) -> object:
        """Return plain data or its text; a text that says why where it cannot be read."""
        place, items = self._place, self._items
        if place is None:
            return Opaque("<stored nowhere>")
        if place.transforms:
            return Opaque(f"<written through {', '.join(place.transforms)}>")
        if not items.has(place):
            return Opaque(f"<in {place.file}, which is missing>")
        if place.nbytes > limits.ITEM_BYTES:
            return Opaque(f"<{place.nbytes:,} bytes>")
        return items.value(place)


def read_folder(path: str, names: Sequence[str], opener: Opener, _read_one: ReadOne) -> Checkpoint:
    """Open a checkpoint's folder: its `.metadata` is read, no item is."""
    if METADATA not in names:
        raise UnsupportedError(
            "a distributed checkpoint that was saved without collectives: each rank has a .metadata of its own",
            path=path,
            hint=f"name that of one rank: {join(path, '__0.metadata')}",
        )
    file = opener.open(join(path, METADATA))
    try:
        return _read(path, path, file, opener)
    except BaseException:
        file.close()
        raise


def read_set(file: SourceFile, opener: Opener, _read_one: ReadOne) -> Checkpoint:
    """Open the checkpoint whose `.metadata` is an open file."""
    return _read(file.path, folder_of(file.path), file, opener)


def read_what_is_there(path: str, file: SourceFile, opener: Opener) -> tuple[Checkpoint, dict[str, str]]:
    """Open a checkpoint whose files may be cut or missing; the entries that are lost, and why, are left out of it."""
    lost: dict[str, str] = {}
    return _read(path, folder_of(file.path), file, opener, lost), lost


def _read(path: str, folder: str, file: SourceFile, opener: Opener, lost: dict[str, str] | None = None) -> Checkpoint:
    """Open a checkpoint; entries that are not all there are left out and noted in `lost`, where that is given."""
    with about(file.path):
        graph = _graph(file)
        metadata = metadata_of(graph)
    found = present(folder, metadata.files)
    files = opener.open_all([join(folder, name) for name in found])
    try:
        opener.remove_left_overs(folder)
        there = dict(zip(found, files, strict=True))
        if lost is None:
            _check_ends(metadata, there)
        else:
            lost.update((entry.name, why) for entry in metadata.entries if (why := _missing_of(entry, there)))
            metadata = replace(metadata, entries=[entry for entry in metadata.entries if entry.name not in lost])
        places = [place for saved in metadata.entries for place in saved.places if place is not None]
        items = Items(folder, there, places)
        container = Composed([file, *files], items.seal, metadata.paths, file, metadata.places)
        return _checkpoint(path, graph, metadata, container, items, len(metadata.files) - len(found))
    except BaseException:
        for opened in files:
            opened.close()
        raise


def _graph(file: SourceFile) -> Graph:
    if file.size > limits.DCP_METADATA:
        raise LimitError(f"a .metadata of {file.size} bytes is far larger than that of a checkpoint")
    return read_pickle(file.view(0, file.size))


def _check_ends(metadata: DcpMetadata, files: dict[str, SourceFile]) -> None:
    """Every item must end within its file, where that is there."""
    for entry in metadata.entries:
        for place in entry.places:
            file = files.get(place.file) if place else None
            if place and file and place.offset + place.nbytes > file.size:
                raise TruncatedError(
                    f"entry {entry.name!r} should be at bytes {place.offset}–{place.offset + place.nbytes}, the file "
                    f"has {file.size}",
                    path=file.path,
                    hint=f"ckpt ls --salvage {quoted(folder_of(file.path))} lists the tensors that are all there, "
                    f"ckpt convert --salvage {quoted(folder_of(file.path))} OUT writes them",
                )


def _missing_of(entry: Saved, files: dict[str, SourceFile]) -> str | None:
    """Say which item of an entry is not there; None where all are."""
    for place in entry.places:
        if place and place.file not in files:
            return f"{place.file}, which has an item of it, is not there"
        if place and place.offset + place.nbytes > files[place.file].size:
            return f"an item of it, at bytes {place.offset}–{place.offset + place.nbytes} of {place.file}, is cut"
    return None


def _checkpoint(
    path: str, graph: Graph, metadata: DcpMetadata, container: Composed, items: Items, missing: int
) -> Checkpoint:
    entries = [_entry(saved, container, items) for saved in _in_groups(metadata.entries)]
    ranks = {name.split("_")[2] for name in metadata.files if name.startswith("__") and name.count("_") > 2}
    said = [f"torch.distributed.checkpoint {metadata.version or 'of before 1.0.0'}"]
    said.append(f"{len(ranks)} rank{'s' if len(ranks) != 1 else ''}")
    return Checkpoint(
        path=path,
        format=NAME,
        entries=entries,
        container=container,
        version=", ".join(said),
        objects=[name for name in objects_of(graph) if not name.startswith(_OWN)],
        top_level=metadata.top_level,
        is_set=True,
        notes=(f"{missing} of its {len(metadata.files)} files are missing",) if missing else (),
    )


def _in_groups(entries: Sequence[Saved]) -> Sequence[Saved]:
    """Return the entries with those objects together, by their places, that Megatron-core saved as `KEY/shard_i_n`.

    Each rank notes its own, so that those of one key stand apart in the metadata (dist_checkpointing/mapping.py there).
    """
    groups: dict[str | int, list[tuple[list[int], Saved]]] = {}
    for number, saved in enumerate(entries):
        key, slash, shard = saved.name.rpartition("/")
        place = re.fullmatch(_SHARD, shard) if slash and saved.dtype is None else None
        if place is None:
            groups[number] = [([], saved)]
        else:
            groups.setdefault(key, []).append(([int(index) for index in place[1].split(".")], saved))
    return [saved for group in groups.values() for _, saved in sorted(group, key=itemgetter(0))]


_SHARD = r"shard_((?:[0-9]{1,9}\.){0,8}[0-9]{1,9})_[0-9.]*"
"""The place of an object among those of its key, and their numbers."""


def _entry(saved: Saved, container: Composed, items: Items) -> Entry:
    dtype = saved.dtype
    if dtype is None:
        return Value(saved.name, SavedItem(saved.places[0], items))
    stride = contiguous_stride(saved.shape)
    if saved.layout != "strided" or dtype.bits % 8:
        return Tensor(
            saved.name, dtype, saved.shape, stride, requires_grad=saved.requires_grad, layout=saved.layout or "wrapper"
        )
    chunks = Chunks(saved.shape, saved.boxes)
    nbytes = dtype.nbytes(chunks.numel)
    whole = len(saved.boxes) == 1 and saved.boxes[0].sizes == saved.shape
    places = saved.places
    chunked = ChunkedTensor(
        saved.name,
        dtype,
        chunks,
        lambda number: items.tensor(saved.name, dtype, saved.boxes[number], places[number]),
    )
    storage = container.storage(saved.name, nbytes, chunked, composed=not whole)
    return Tensor(saved.name, dtype, saved.shape, stride, storage, requires_grad=saved.requires_grad)


def saved_values(values: Iterable[Value]) -> Iterator[SavedValue]:
    """Read the items of some values.

    Raises MalformedError, UnsupportedError or LimitError where one cannot be read, with its name.
    """
    nodes = nbytes = 0
    for value in values:
        if not isinstance(value.content, SavedItem):
            raise UnsupportedError(f"{value.name!r} is not a value of a distributed checkpoint")
        try:
            found = _saved(value.name, value.content)
        except CkptError as error:
            error.problem = f"value {value.name!r}: {error.problem}"
            raise
        nbytes += len(found.data)
        nodes += sum(1 for _ in nodes_of(found.root))
        if nbytes > limits.DCP_VALUES or nodes > limits.PICKLE_BLOCKS:
            raise LimitError(f"its values are pickles of more than {nbytes:,} bytes and {nodes:,} objects")
        yield found


def _saved(name: str, value: SavedItem) -> SavedValue:
    graph, saved = value.saved()
    references = storage_references(graph.root)
    if references and saved.big_endian:
        raise UnsupportedError("it holds tensors that were saved big-endian")
    storages_of = Storages(graph, saved, WalkBudget(graph.nbytes))
    storages = {id(reference): storages_of.of(reference)[0] for reference in references}
    contents = {storage: content_of(storage) for storage in storages.values()}
    return SavedValue(name, graph.root, bytes(graph.data[: graph.nbytes]), storages, contents)
