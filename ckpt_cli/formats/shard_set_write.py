"""A set of shards with some changes: which shards are written anew, which go, and what the index says then."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.changes import Changes
from ckpt_cli.errors import RefusedError, UnsupportedError
from ckpt_cli.formats.shard_set import ShardSet, unique_nbytes
from ckpt_cli.model import Checkpoint, Entry, Tensor

if TYPE_CHECKING:
    from ckpt_cli.formats.registry import Rewriter


@dataclass(frozen=True, slots=True)
class Part:
    """One shard to be written anew."""

    name: str
    """Its file name, which stays."""
    work: Rewriter


class Rewriting:
    """A set about to be written with some changes; shards that none of them concern stay as they are."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes) -> None:
        container = checkpoint.container
        if not isinstance(container, ShardSet):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} is no set of shards")
        if changes.values or changes.added:
            raise UnsupportedError("values that are no tensors cannot be set in a set of shards", path=checkpoint.path)
        self._checkpoint = checkpoint
        self._container = container
        self._changes = changes
        self.parts: list[Part] = []
        self.removed: list[str] = []
        """Shards of which nothing is left."""
        self.unchanged: list[str] = []
        """Shards that stay as they are."""
        self._owners = self._shards_of_entries()
        for number, shard in enumerate(container.shards):
            self._plan(number, shard)
        if not self.parts and not self.unchanged:
            raise RefusedError("nothing would be left", path=checkpoint.path)
        self.nbytes = sum(part.work.nbytes for part in self.parts)
        """About the bytes that will be written."""
        self.index = self._index()
        """The new index: its file name and content; None where there is none."""

    def _shards_of_entries(self) -> dict[str, int]:
        """The number of the shard of each entry; an alias of the index is where its tensor is."""
        owners = {entry.name: number for number, shard in enumerate(self._container.shards) for entry in shard.entries}
        for entry in self._checkpoint.entries:
            if isinstance(entry, Tensor) and entry.alias_of is not None and entry.name not in owners:
                owners[entry.name] = owners[entry.alias_of]
        return owners

    def _plan(self, number: int, shard: Checkpoint) -> None:
        """What becomes of one shard."""
        name = os.path.basename(shard.path)
        changes = self._changes_of(number, shard)
        if all(entry.name in changes.dropped for entry in shard.entries):
            self.removed.append(name)
        elif _is_nothing(changes):
            self.unchanged.append(name)
        else:
            from ckpt_cli.formats.registry import rewriting

            self.parts.append(Part(name, rewriting(shard, changes)))

    def _changes_of(self, number: int, shard: Checkpoint) -> Changes:
        """The part of the changes that concerns one shard, with its own storages in the place of the set's."""
        changes = self._changes
        here = {entry.name for entry in shard.entries}
        tensors = {}
        for name, tensor in changes.tensors.items():
            if self._owners[name] == number:
                tensors[name] = self._own(tensor, number, shard, changes)
        return replace(
            changes,
            names={old: new for old, new in changes.names.items() if old in here},
            dropped=frozenset(name for name in changes.dropped if name in here),
            tensors=tensors,
            metadata=None,
        )

    def _own(self, tensor: Tensor, number: int, shard: Checkpoint, changes: Changes) -> Tensor:
        """A tensor's new facts as its shard knows its storage; refused where that is another shard's."""
        parts = tuple(self._own(part, number, shard, changes) for part in tensor.parts)
        storage = tensor.storage
        if storage is not None and id(storage) not in changes.contents:
            owner, known = self._container.owner_of(storage)
            if owner is not shard.container:
                raise RefusedError(
                    f"{tensor.name!r} would share bytes with a tensor of another shard",
                    hint="ckpt convert writes all into one file first",
                )
            storage = known
        return replace(tensor, storage=storage, parts=parts)

    # --- the index ---------------------------------------------------------------------------------------------------

    def _index(self) -> tuple[str, bytes] | None:
        file = self._container.index
        if file is None:
            return None
        index: dict[str, Any] = json.loads(file.read(0, file.size))
        shards = {number: os.path.basename(shard.path) for number, shard in enumerate(self._container.shards)}
        weight_map = {}
        for name, shard in index["weight_map"].items():
            if name in self._changes.dropped:
                continue
            weight_map[self._changes.names.get(name, name)] = shard
        for entry in self._after():
            if isinstance(entry, Tensor) and entry.name not in weight_map and entry.name in self._changes.tensors:
                weight_map[entry.name] = shards[self._owners[entry.name]]
        index["weight_map"] = weight_map
        if isinstance(index.get("metadata"), dict):
            index["metadata"] = self._index_metadata(index["metadata"])
        return os.path.basename(file.path), (json.dumps(index, indent=2) + "\n").encode()

    def _after(self) -> list[Entry]:
        """The entries that stay, with their new facts and old names."""
        changes = self._changes
        return [
            changes.tensors.get(entry.name, entry)
            for entry in self._checkpoint.entries
            if entry.name not in changes.dropped
        ]

    def _index_metadata(self, old: Mapping[str, Any]) -> dict[str, Any]:
        """The index's notes: sizes as they are now, aliases under their new names."""
        changes = self._changes
        found: dict[str, Any] = {}
        aliases = {tensor.name for tensor in self._checkpoint.tensors if tensor.alias_of is not None}
        for key, value in (old if changes.metadata is None else changes.metadata).items():
            if key in aliases and key in changes.dropped:
                continue
            new = changes.names.get(value, value) if key in aliases and isinstance(value, str) else value
            found[changes.names.get(key, key) if key in aliases else key] = new
        tensors = [entry for entry in self._after() if isinstance(entry, Tensor) and entry.alias_of is None]
        if "total_size" in found:
            found["total_size"] = unique_nbytes(tensors)
        if isinstance(found.get("total_parameters"), int):
            found["total_parameters"] = sum({id(t.storage): t.numel for t in tensors}.values())
        return found

    @property
    def first(self) -> str:
        """The file that the journal stands beside: the index, or a shard that stays."""
        return self.index[0] if self.index else (self.unchanged or [part.name for part in self.parts])[0]

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""
        return [*(part.name for part in self.parts), *([self.index[0]] if self.index else [])]


def _is_nothing(changes: Changes) -> bool:
    return not (changes.names or changes.dropped or changes.tensors)
