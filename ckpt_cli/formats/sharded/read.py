"""A checkpoint in shards: an index that says which file has which tensor, and files that each are a checkpoint.

The index is what huggingface_hub's and transformers' `save_pretrained` write beside the shards, as
`model.safetensors.index.json` or `pytorch_model.bin.index.json`: `{"metadata": {"total_size": …}, "weight_map": {name:
file}}`. As their loaders do, every tensor of a shard counts; of two shards with one name the index chooses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, UnknownFormatError, listed
from ckpt_cli.facts import dataclass
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import exists, folder_of, is_plain_name, join, name_of, present
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.safetensors.read import with_aliases
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Container, Entry, Storage, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

ReadOne = Callable[[SourceFile], Checkpoint]
"""Reads one file of a set; readers of sets are given it, as they stand below what opens any format."""

NAME = "shards"

_NAMED = 3
"""Names that a note spells out."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The shard and the place of a storage of the set."""

    container: Container
    own: Storage
    """The storage as that container knows it."""
    known: Storage
    """The storage as the set knows it."""


class ShardSet:
    """The container: those of the shards side by side, and the index."""

    def __init__(self, index: SourceFile | None, shards: Sequence[Checkpoint]) -> None:
        self.index = index
        self.shards = shards
        """Each shard as the checkpoint that it is alone."""
        self.files: Sequence[SourceFile] = [
            *([index] if index else []),
            *chain.from_iterable(shard.container.files for shard in shards),
        ]
        self._places: dict[Storage, _Place] = {}
        """By the storage, as the set or as the shard knows it."""

    def adopt(self, shard: Checkpoint, entry: Entry) -> Entry:
        """An entry of a shard as one of the set; the keys of storages that only number them get the shard's name."""
        return self._adopted(shard, entry) if isinstance(entry, Tensor) else entry

    def _adopted(self, shard: Checkpoint, tensor: Tensor) -> Tensor:
        parts = tuple(self._adopted(shard, part) for part in tensor.parts)
        if parts:
            tensor = replace(tensor, parts=parts)
        storage = tensor.storage
        if storage is None:
            return tensor
        place = self._places.get(storage)
        if place is None:
            key = storage.key if shard.format.startswith("safetensors") else f"{name_of(shard.path)}:{storage.key}"
            known = storage if key == storage.key else replace(storage, key=key)
            place = self._places[storage] = self._places[known] = _Place(shard.container, storage, known)
        return tensor if place.known is storage else replace(tensor, storage=place.known)

    def owner_of(self, storage: Storage) -> tuple[Container, Storage]:
        """The shard's container that has a storage, and the storage as that knows it."""
        place = self._places[storage]
        return place.container, place.own

    def seal(self, overlay: Overlay) -> None:
        """Seal each shard's patches."""
        touched = set(overlay.touched)
        for shard in self.shards:
            if not touched.isdisjoint(shard.container.files):
                shard.container.seal(overlay)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()


def read_set(file: SourceFile, opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the set whose index is an open file: the table of contents of each shard is read."""
    weight_map, metadata = read_index(file)
    folder = folder_of(file.path)
    names = list(dict.fromkeys(weight_map.values()))
    there = set(present(folder, names))
    missing = [name for name in names if name not in there and not exists(join(folder, name))]
    if missing:
        raise MalformedError(
            f"{len(missing)} of its {len(names)} shards are not there: {listed(missing, _NAMED, repr)}",
            path=file.path,
            hint="fetch the rest, or ckpt ls --salvage FILE lists what the others have, "
            "ckpt convert --salvage FILE OUT writes it",
        )
    return joined(file.path, file, names, opener, read_one, weight_map, metadata)


def read_index(file: SourceFile) -> tuple[dict[str, str], dict[str, Any]]:
    """{name of a tensor: name of its shard} and the metadata of an index; raises a FormatError for a bad one."""
    index = _index(file)
    metadata = index.get("metadata")
    return _weight_map(index, file.path), metadata if isinstance(metadata, dict) else {}


def read_without_index(path: str, names: Sequence[str], opener: Opener, read_one: ReadOne) -> Checkpoint:
    """Open the shards `names` of the folder `path` as a set that has no index."""
    return joined(path, None, names, opener, read_one, {}, {})


def _index(file: SourceFile) -> dict[str, Any]:
    if file.size > limits.INDEX_JSON:
        raise LimitError(f"a JSON file of {file.size} bytes is far larger than an index of shards", path=file.path)
    try:
        index = json.loads(file.read(0, file.size).decode().removeprefix("\ufeff"))
    except RecursionError:
        raise MalformedError("this JSON nests too deeply for an index of shards", path=file.path) from None
    except ValueError as error:
        raise MalformedError(f"begins as JSON, but is not valid: {error}", path=file.path) from None
    if not isinstance(index, dict) or "weight_map" not in index:
        raise UnknownFormatError(
            "a JSON file, but no index of shards: it has no weight_map",
            path=file.path,
            hint="name the checkpoint itself, or the folder that it lies in",
        )
    return index


def _weight_map(index: Mapping[str, Any], path: str) -> dict[str, str]:
    """{name of a tensor: name of a shard in the same folder}."""
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise MalformedError("its weight_map does not map names to files", path=path)
    shards = set(weight_map.values())
    if not shards:
        raise MalformedError("its weight_map is empty", path=path)
    if len(shards) > limits.SHARDS:
        raise LimitError(f"it names {len(shards)} shards", path=path)
    for shard in sorted(shards):
        if not is_plain_name(shard):
            raise MalformedError(f"it names the shard {shard!r}, which is not a file beside it", path=path)
        if shard == name_of(path):
            raise MalformedError("it names itself as a shard", path=path)
    return weight_map


def joined(
    path: str,
    index: SourceFile | None,
    names: Sequence[str],
    opener: Opener,
    read_one: ReadOne,
    weight_map: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> Checkpoint:
    """Return the shards `names` as one checkpoint, each read by `read_one`; their files are closed where that fails."""
    folder = folder_of(path) if index else path
    files = opener.open_all([join(folder, name) for name in names])
    with closed_on_error(files):
        shards = [read_one(file) for file in documented(files)]
        container = ShardSet(index, shards)
        joining = _Joining(container, weight_map)
        for name, shard in zip(names, shards, strict=True):
            joining.add(name, shard)
        joining.take_misplaced()
        kinds = sorted({shard.format for shard in shards})
        strings = _metadata(shards, metadata)
        aliases = {key: value for key, value in strings.items() if isinstance(metadata.get(key, ""), str)}
        return Checkpoint(
            path=path,
            format=NAME,
            entries=with_aliases(joining.entries, aliases),
            container=container,
            version=f"{len(shards)} {' and '.join(kinds)} shards",
            metadata=strings,
            objects=list(dict.fromkeys(chain.from_iterable(shard.objects for shard in shards))),
            top_level=list(dict.fromkeys(chain.from_iterable(shard.top_level for shard in shards))),
            is_set=True,
            notes=joining.notes(no_index=index is None),
        )


class _Joining:
    """The entries of a set in the making, and what is odd about them."""

    def __init__(self, container: ShardSet, weight_map: Mapping[str, str]) -> None:
        self.entries: list[Entry] = []
        self._container = container
        self._weight_map = weight_map
        self._found: set[str] = set()
        self._unlisted: list[str] = []
        """Names that a shard has and the index has not."""
        self._stray: list[str] = []
        """Names that another shard has than the one that counts."""
        self._elsewhere: dict[str, tuple[Checkpoint, Entry]] = {}
        """The first entry of each name that stands in another shard than the one that the index names."""
        self._misplaced: list[str] = []
        """Names that only another shard has than the one that the index names."""

    def add(self, shard_name: str, shard: Checkpoint) -> None:
        """Take the entries of a shard that count."""
        for entry in shard.entries:
            name = entry.name
            listed = self._weight_map.get(name)
            if listed not in (None, shard_name):
                self._stray.append(name)
                self._elsewhere.setdefault(name, (shard, entry))
                continue
            if listed is None and name in self._found:
                self._stray.append(name)
                continue
            if listed is None and isinstance(entry, Tensor) and entry.alias_of is None:
                self._unlisted.append(name)
            self._found.add(name)
            self.entries.append(self._container.adopt(shard, entry))

    def take_misplaced(self) -> None:
        """Take the entries that the index looks for in another shard than the one that has them, after all others."""
        for name, (shard, entry) in self._elsewhere.items():
            if name not in self._found:
                self._misplaced.append(name)
                self._found.add(name)
                self.entries.append(self._container.adopt(shard, entry))
        misplaced = set(self._misplaced)
        self._stray = [name for name in self._stray if name not in misplaced]

    def notes(self, *, no_index: bool) -> list[str]:
        """Return notes on what is odd, a line each."""
        lacking = [name for name in self._weight_map if name not in self._found]
        problems = (
            (lacking, "the index names tensors that their shards do not have"),
            ([] if no_index else self._unlisted, "shards have tensors that the index does not name"),
            (self._misplaced, "tensors are in another shard than the index says"),
            (self._stray, "tensors are in a second shard too, whose copy is left out"),
        )
        notes = [f"{problem} ({len(names)}): {listed(names, _NAMED, repr)}" for names, problem in problems if names]
        return [*notes, "there is no index beside the shards"] if no_index else notes


def _metadata(shards: Iterable[Checkpoint], index: Mapping[str, Any]) -> dict[str, str]:
    """The string maps of all shards as one, and what the index says of the whole."""
    found: dict[str, str] = {}
    for shard in shards:
        for key, value in shard.metadata.items():
            found.setdefault(key, value)
    for key, value in index.items():
        found[key] = value if isinstance(value, str) else json.dumps(value)
    return found


def unique_nbytes(tensors: Iterable[Tensor]) -> int:
    """The total size that an index records: bytes of all tensors, those of a storage counted once."""
    return sum({tensor.storage: tensor.nbytes for tensor in tensors}.values())
