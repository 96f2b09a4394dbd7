"""Edit a distributed checkpoint: a new `.metadata`, and new items in files of their own.

`.metadata` alone says what a checkpoint has and where. So in place every old file of items stays as it is: new items
go to a new file, and the new `.metadata` takes the place of the old one when they are there. Until then, torch and
everything else read the old checkpoint, and from then on the new one. Items that nothing refers to any more stay
where they are, unless a file has nothing else; a checkpoint that is written elsewhere, or compacted, has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, FormatError, LimitError, RefusedError, UnsupportedError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.places import folder_of, name_of, names_in
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.dcp.container import Composed, is_one_safetensors, joined
from ckpt_cli.formats.dcp.data_file import DataFile, Item
from ckpt_cli.formats.dcp.metadata import ItemPlace, fields_of, metadata_of, named_pairs, place_of
from ckpt_cli.formats.dcp.paths import nest, path_of, renamed_path
from ckpt_cli.formats.dcp.rank_shards import RankShards
from ckpt_cli.formats.dcp.read import SavedItem
from ckpt_cli.formats.dcp.write import ItemPickles, MetadataMaker, pickled_value
from ckpt_cli.formats.torch_zip.write import write_pickled
from ckpt_cli.formats.writing import Rewriter, ShardWork
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.model.names import Below
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.edit.apply import node_of
from ckpt_cli.pickles.edit.retype import retyped
from ckpt_cli.pickles.graph import Call, Dict
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.write import write_pickle

_DATA = re.compile(r"__(\d+)_(\d+)\.distcp")
"""The names of files of items: the rank that wrote them, and their number (filesystem.py, `_generate_file_name`)."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """An item that stays."""

    key: object
    """The node that says of which chunk of which entry it is."""
    info: object
    """The node that says where it is."""
    place: ItemPlace


def rewriting(
    checkpoint: Checkpoint, changes: Changes, of_file: Callable[[Checkpoint, Changes], Rewriter]
) -> MetadataRewriting | RankShards:
    """Return the work of changing a distributed checkpoint; `of_file` makes that of one safetensors file."""
    container = checkpoint.container
    if isinstance(container, Composed) and container.document is not None:
        return MetadataRewriting(checkpoint, changes, container, container.document)
    return RankShards(checkpoint, changes, of_file)


Rewriting = rewriting
"""The name by which the table of formats asks for it."""


class MetadataRewriting:
    """A checkpoint with a `.metadata` about to be changed (a `SetRewriter`)."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes, container: Composed, document: SourceFile) -> None:
        self._file = document
        self._checkpoint = checkpoint
        self._changes = changes
        self._files = {name_of(file.path): file for file in container.files if file is not self._file}
        self._raw = bytes(self._file.view(0, self._file.size))
        self._graph = read_pickle(self._raw)
        metadata_of(self._graph)  # it was checked when it was opened; another one may stand there now
        self._root = fields_of(self._graph.root)
        self._maker = MetadataMaker()
        self._below = Below(changes.dropped_prefixes)
        self._kept: list[_Kept] = []
        self._origins: dict[str, list[ItemPlace]] = {}
        """The old places of entries that get new items, by their old names."""
        self._sort_items()
        self._entries = {entry.name: entry for entry in checkpoint.entries}
        self._new = NewCheckpoint((), changes.contents)
        self._items = [(item, origin) for item, origin in self._new_items()]
        self._paths = self._paths_after()
        self.parts: list[ShardWork] = []
        self.removed: list[str] = []
        """Files that have no item any more."""
        self.unchanged: list[str] = []
        """Files of items that stay as they are."""
        self._moved: dict[str, tuple[str, DataFile]] = {}
        """By the old name of a file that is written again, its new name and its content."""

    # --- what the entries become -------------------------------------------------------------------------------------

    def _after(self, name: str) -> str | None:
        """Return the new name of an entry; None for one that goes."""
        if name in self._changes.dropped or name in self._below:
            return None
        return self._changes.names.get(name, name)

    def _sort_items(self) -> None:
        """Sort the items of the old checkpoint: those that stay, those of entries that get new ones, and the rest."""
        stored = self._root.get("storage_data")
        pairs = stored.pairs if isinstance(stored, Dict) else []
        for key, info in zip(pairs[::2], pairs[1::2], strict=True):
            name = text_of(fields_of(key).get("fqn")) or ""
            after = self._after(name)
            place = place_of(name, info)
            if name in self._changes.tensors or name in self._changes.values:
                self._origins.setdefault(name, []).append(place)
            elif after is not None:
                self._kept.append(_Kept(key if after == name else self._renamed(key, name, after, place), info, place))

    def _renamed(self, key: object, old: str, new: str, place: ItemPlace) -> Call:
        """Return the key of an item under a new name of its entry."""
        if not place.transforms and self._is_safetensors(place.file):
            raise UnsupportedError(
                f"{old!r} is called so in {place.file} too, which is safetensors: its entries cannot be renamed",
                path=self._checkpoint.path,
                hint=f"ckpt convert {quoted(self._checkpoint.path)} OUT --to dcp writes one whose entries can",
            )
        return self._maker.changed(key, fqn=self._maker.text(new))

    def _is_safetensors(self, name: str) -> bool:
        return name in self._files and is_one_safetensors(self._files[name])

    def _new_items(self) -> Iterator[tuple[Item, str]]:
        """Yield what is to be written, with the name of the old file that it belongs to."""
        pickles = ItemPickles()
        load: dict[str, int] = {}
        for old, entry in self._entries.items():
            name = self._after(old)
            if name is None or (old not in self._changes.values and old not in self._changes.tensors):
                continue
            item = self._changed_tensor(old, name, pickles) or self._changed_value(old, name, entry)
            files = dict.fromkeys(place.file for place in self._origins.get(old, ()))
            origin = min(files, key=lambda file: load.get(file, 0), default="")
            load[origin] = load.get(origin, 0) + item.nbytes
            yield item, origin
        for name, value in self._changes.added.items():
            if isinstance(value, Tensor):
                yield self._of_tensor(name, value, pickles), ""
            else:
                yield self._of_value(name, node_of(value), b""), ""

    def _changed_tensor(self, old: str, new: str, pickles: ItemPickles) -> Item | None:
        """Return the new item of a tensor; None for another entry."""
        tensor = self._changes.tensors.get(old)
        if tensor is None:
            return None
        if tensor.storage not in self._changes.contents:
            raise UnsupportedError(
                f"{old!r} would share its bytes with another tensor, which a distributed checkpoint does not record",
                path=self._checkpoint.path,
            )
        return self._of_tensor(new, tensor, pickles)

    def _of_tensor(self, name: str, tensor: Tensor, pickles: ItemPickles) -> Item:
        own = (tensor.storage,) if tensor.storage is not None else ()
        pickle = pickles.of(tensor)
        return Item(name, tensor, pickle, own, write_pickled(pickle, own, self._new, None))

    def _changed_value(self, old: str, new: str, entry: Entry) -> Item:
        """Return the item of a value that was set, written as the type that the old one has."""
        value = self._changes.values[old]
        before, data = None, memoryview(b"")
        if isinstance(entry, Value) and isinstance(entry.content, SavedItem) and not self._is_unread(entry):
            graph, _ = entry.content.saved()
            before, data = graph.root, memoryview(graph.data)
        node = retyped(old, value, before, cast=self._changes.cast)
        return self._of_value(new, node_of(value, like=before) if node is None else node, data)

    @staticmethod
    def _is_unread(entry: Value) -> bool:
        """True if the old value is not one to take the type of: an object, or one that cannot be read."""
        return not isinstance(entry.value, str | int | float | bool | list | tuple | type(None))

    def _of_value(self, name: str, node: object, data: bytes | memoryview) -> Item:
        saved = SavedValue(name, node, bytes(data))
        pickle, storages = pickled_value(saved)
        return Item(name, saved, pickle, storages, write_pickled(pickle, storages, NewCheckpoint((), {}), None))

    def _paths_after(self) -> Dict | None:
        """Return where each entry is in the state that was saved; None where the planner did not note it."""
        planned = self._root.get("planner_data")
        if not isinstance(planned, Dict):
            return None
        pairs: list[object] = []
        leaves: list[tuple[str, tuple[str | int, ...], object]] = []
        is_checked = bool(self._changes.names or self._changes.added)
        for key, path in zip(planned.pairs[::2], planned.pairs[1::2], strict=True):
            old = text_of(key)
            if old is None or old not in self._entries:
                pairs += (key, path)
                continue
            new = self._after(old)
            if new is None:
                continue
            if new != old:
                key, path = self._maker.text(new), self._maker.path(renamed_path(path_of(old, path), new))
            pairs += (key, path)
            if is_checked:
                leaves.append((new, path_of(new, path), None))
        for name in self._changes.added:
            path = self._maker.path((name,))
            pairs += (self._maker.text(name), path)
            leaves.append((name, (name,), None))
        self._require_consistent(leaves)
        return Dict(pairs)

    def _require_consistent(self, leaves: Sequence[tuple[str, tuple[str | int, ...], object]]) -> None:
        """Raise RefusedError where new names would put one entry into another."""
        try:
            nest(leaves)
        except (FormatError, LimitError) as error:
            raise RefusedError(f"under these names, {error.problem}", path=self._checkpoint.path) from None

    # --- which files there are ---------------------------------------------------------------------------------------

    def for_new_folder(self) -> None:
        """Plan for a folder of its own: no file gets another name, and none has bytes that nothing refers to."""
        self._lay_out(set(self._files), elsewhere=True)

    def _lay_out(self, taken: set[str], *, elsewhere: bool) -> None:
        """Decide which files are written, stay or go."""
        new: dict[str, list[Item]] = {}
        for item, origin in self._items:
            new.setdefault(origin, []).append(item)
        ranges = self._ranges()
        for name, file in self._files.items():
            kept = ranges.get(name)
            whole = kept is None or sum(end - begin for begin, end in kept) == file.size
            if kept == []:
                self.removed.append(name)
            elif whole or not (elsewhere or self._changes.rewrite):
                self.unchanged.append(name)
            else:
                items = new.pop(name, [])
                work = DataFile(file, kept or (), items, self._new)
                self._add(name, name if elsewhere else _free(name, taken), work)
        for origin, items in new.items():
            name = origin if elsewhere and origin in self.removed else _free(origin, taken)
            self._add("", name, DataFile(None, (), items, self._new))
        self.removed = [name for name in self.removed if name not in {part.name for part in self.parts}]
        self.removed += [name for name, (now, _) in self._moved.items() if name and now != name]

    def _add(self, old: str, name: str, work: DataFile) -> None:
        self.parts.append(ShardWork(name, work))
        self._moved[old or name] = (name, work)

    def _ranges(self) -> dict[str, list[tuple[int, int]] | None]:
        """Return the bytes of each file that items have that stay, apart and in order; None for what must stay whole.

        A file that has no such item has an empty list.
        """
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in self._files}
        for kept in self._kept:
            if kept.place.file in found:
                found[kept.place.file].append((kept.place.offset, kept.place.offset + kept.place.nbytes))
        return {name: None if own and self._is_safetensors(name) else joined(own) for name, own in found.items()}

    @property
    def unreferenced(self) -> int:
        """Bytes of items that stay in the files, though nothing refers to them."""
        ranges = self._ranges()
        kept = ((self._files[name].size, ranges[name]) for name in self.unchanged)
        return sum(size - sum(end - begin for begin, end in own) for size, own in kept if own is not None)

    # --- what is written ---------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the new files."""
        return sum(part.work.nbytes for part in self.parts) + len(self._metadata())

    @property
    def first(self) -> str:
        """The file that the journal stands beside."""
        return name_of(self._file.path)

    @property
    def names(self) -> Sequence[str]:
        """The files that are written: what says where the items are comes last."""
        return [*(part.name for part in self.parts), self.first]

    @property
    def index(self) -> tuple[str, bytes] | None:
        """The new `.metadata`, by its name."""
        content = self._metadata()
        if len(content) > limits.DCP_METADATA:
            raise LimitError(f"a .metadata of {len(content)} bytes is far larger than that of a checkpoint")
        self._verify(content)
        return self.first, content

    def patch(self, overlay: Overlay) -> bool:  # noqa: ARG002 - as the protocol has it
        """Return False: a `.metadata` that is half written must never be read, so another one takes its place.

        New items go to files that are not there yet, and old files stay as they are, unless nothing is left in one.
        """
        self._lay_out(set(names_in(folder_of(self._file.path) or ".")), elsewhere=False)
        return False

    def _metadata(self) -> bytes:
        """Return the pickle that says what the new checkpoint has and where."""
        listed: list[object] = []
        old = self._root.get("state_dict_metadata")
        for name, node in named_pairs(old) if isinstance(old, Dict) else ():
            new = self._after(name)
            if new is not None:
                tensor = self._changes.tensors.get(name)
                facts = node if tensor is None else self._maker.recast(node, tensor)
                listed += (self._maker.text(new), facts)
        for name, value in self._changes.added.items():
            tensor = value if isinstance(value, Tensor) else None
            listed += (self._maker.text(name), self._maker.facts(tensor) if tensor else self._maker.facts_of_bytes())
        stored = [node for kept in self._kept for node in (kept.key, self._info(kept))]
        for part in self.parts:
            for item, begin in self._work(part).places():
                shape = item.saved.shape or () if isinstance(item.saved, Tensor) else None
                stored += (self._maker.index(item.name, shape), self._maker.place(part.name, begin, item.nbytes))
        fields = {"state_dict_metadata": Dict(listed), "storage_data": Dict(stored)}
        if self._paths is not None:
            fields["planner_data"] = self._paths
        content = bytearray()
        write_pickle(self._maker.changed(self._graph.root, **fields), self._raw, content.extend)
        return bytes(content)

    @staticmethod
    def _work(part: ShardWork) -> DataFile:
        assert isinstance(part.work, DataFile)
        return part.work

    def _info(self, kept: _Kept) -> object:
        """Return where an item is that stays."""
        found = self._moved.get(kept.place.file)
        if found is None or found[1].source is None:
            return kept.info
        name, work = found
        place = {"relative_path": self._maker.text(name), "offset": work.moved(kept.place.offset)}
        return self._maker.changed(kept.info, **place)

    def _verify(self, content: bytes) -> None:
        """Raise CkptError where the new `.metadata` does not read back as what is meant."""
        try:
            found = metadata_of(read_pickle(content)).entries
        except FormatError as error:
            raise CkptError(f"the new .metadata would not read back as it should: {error}") from None
        names = [new for entry in self._checkpoint.entries if (new := self._after(entry.name)) is not None]
        if [entry.name for entry in found] != [*names, *self._changes.added]:
            raise CkptError("the new .metadata would not have the names that it should")


def _free(origin: str, taken: set[str]) -> str:
    """Return a new name for a file of the rank that wrote another one, and take it."""
    match = _DATA.fullmatch(origin)
    rank = match[1] if match else "0"
    numbers = [int(found[2]) for found in map(_DATA.fullmatch, taken) if found and found[1] == rank]
    name = f"__{rank}_{max(numbers, default=-1) + 1}.distcp"
    taken.add(name)
    return name
