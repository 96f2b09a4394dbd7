"""A set of shards with some changes: which shards are written anew, which go, and what the index says then."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.changes import Changes
from ckpt_cli.errors import RefusedError, UnsupportedError
from ckpt_cli.formats.shard_set import ShardSet, unique_nbytes
from ckpt_cli.model import Checkpoint, Tensor

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
        self._names = [os.path.basename(shard.path) for shard in container.shards]
        self._inside = [_names_in(shard) for shard in container.shards]
        self._numbers = {id(shard.container): number for number, shard in enumerate(container.shards)}
        self._index_strings = self._old_index_metadata()
        self._ties = Ties(checkpoint, changes, self._is_in_index, has_index=container.index is not None)
        self._metadata = self._new_metadata()
        for number, shard in enumerate(container.shards):
            self._plan(number, shard)
        if not self.parts and not self.unchanged:
            raise RefusedError("nothing would be left", path=checkpoint.path)
        self.nbytes = sum(part.work.nbytes for part in self.parts)
        """About the bytes that will be written."""
        self.index = self._index()
        """The new index: its file name and content; None where there is none."""

    def size(self) -> int:
        """Bytes of the files that are written."""
        return sum(part.work.size() for part in self.parts) + (len(self.index[1]) if self.index else 0)

    def _shard_of(self, tensor: Tensor) -> int:
        """The number of the shard that a tensor's bytes, or those of its parts, are in."""
        for view in _strided(tensor):
            if view.storage is not None:
                return self._numbers[id(self._container.owner_of(view.storage)[0])]
        return next(number for number, names in enumerate(self._inside) if tensor.name in names)

    def _is_in_index(self, alias: Tensor) -> bool:
        """Whether an alias is recorded in the index rather than in its shard."""
        return alias.name not in self._inside[self._shard_of(alias)]

    # --- shards ------------------------------------------------------------------------------------------------------

    def _plan(self, number: int, shard: Checkpoint) -> None:
        """What becomes of one shard."""
        name = self._names[number]
        shard = self._with_names_from_the_index(number, shard)
        changes = self._changes_of(number, shard)
        if shard.entries and all(entry.name in changes.dropped for entry in shard.entries):
            self.removed.append(name)
        elif not (changes.names or changes.dropped or changes.tensors or changes.metadata is not None):
            self.unchanged.append(name)
        else:
            from ckpt_cli.formats.registry import rewriting

            self.parts.append(Part(name, rewriting(shard, changes)))

    def _with_names_from_the_index(self, number: int, shard: Checkpoint) -> Checkpoint:
        """The shard with those aliases of the index that become tensors of its own."""
        own = {id(tensor.storage): tensor for tensor in shard.tensors}
        found = []
        for alias in self._ties.real:
            if self._shard_of(alias) == number and alias.storage is not None:
                kept = own[id(self._container.owner_of(alias.storage)[1])]
                found.append(replace(kept, name=alias.name, alias_of=kept.name))
        return replace(shard, entries=[*shard.entries, *found]) if found else shard

    def _changes_of(self, number: int, shard: Checkpoint) -> Changes:
        """The part of the changes that concerns one shard, with its own storages in the place of the set's."""
        changes = self._changes
        here = {entry.name for entry in shard.entries}
        tensors = {}
        for tensor in self._checkpoint.tensors:
            new = changes.tensors.get(tensor.name)
            if new is None or tensor.name not in here or tensor.name in self._ties.records:
                continue
            if self._shard_of(tensor) == number:
                tensors[tensor.name] = self._own(new, shard)
        metadata = self._metadata[number]
        return replace(
            changes,
            names={old: new for old, new in changes.names.items() if old in here},
            dropped=frozenset(name for name in here if name in changes.dropped or name in self._ties.records),
            tensors=tensors,
            metadata=metadata if metadata != shard.metadata else None,
        )

    def _own(self, tensor: Tensor, shard: Checkpoint) -> Tensor:
        """A tensor's new facts as its shard knows its storage; refused where that is another shard's."""
        parts = tuple(self._own(part, shard) for part in tensor.parts)
        storage = tensor.storage
        if storage is not None and id(storage) not in self._changes.contents:
            owner, known = self._container.owner_of(storage)
            if owner is not shard.container:
                raise RefusedError(
                    f"{tensor.name!r} would share bytes with a tensor of another shard",
                    hint="ckpt convert writes all into one file first",
                )
            storage = known
        return replace(tensor, storage=storage, parts=parts)

    # --- metadata ----------------------------------------------------------------------------------------------------

    def _old_index_metadata(self) -> dict[str, Any]:
        file = self._container.index
        self._old: dict[str, Any] = json.loads(file.read(0, file.size).decode().removeprefix("\ufeff")) if file else {}
        found = self._old.get("metadata")
        return found if isinstance(found, dict) else {}

    def _new_metadata(self) -> list[Mapping[str, str]]:
        """The string map of each shard; what changes in that of the index is done there at once.

        A string changes wherever it is; a new one goes to the index, or to every shard where there is none.
        """
        shards = [dict(shard.metadata) for shard in self._container.shards]
        wanted, before = self._changes.metadata, self._checkpoint.metadata
        if wanted is None:
            return list(shards)
        maps: list[dict[str, Any]] = [*shards, self._index_strings]
        for key in [key for key in {**before, **wanted} if before.get(key) != wanted.get(key)]:
            if key in _COUNTED and self._container.index is not None:
                raise RefusedError(f"{key!r} follows from the tensors, so it cannot be set", path=self._checkpoint.path)
            holders = [each for each in maps if key in each]
            for each in holders or ([self._index_strings] if self._container.index is not None else shards):
                if key in wanted:
                    each[key] = wanted[key]
                else:
                    del each[key]
        return list(shards)

    # --- the index ---------------------------------------------------------------------------------------------------

    def _index(self) -> tuple[str, bytes] | None:
        file = self._container.index
        if file is None:
            return None
        index = dict(self._old)
        index["weight_map"] = self._weight_map()
        if "metadata" in index or self._index_strings or self._ties.records:
            index["metadata"] = self._index_metadata(index["weight_map"])
        return os.path.basename(file.path), (json.dumps(index, indent=2) + "\n").encode()

    def _weight_map(self) -> dict[str, str]:
        """Which shard has which name, in the old order; aliases that became tensors come last."""
        changes, found = self._changes, {}
        for name, shard in self._old["weight_map"].items():
            if name not in changes.dropped and name not in self._ties.records and shard not in self.removed:
                found[changes.names.get(name, name)] = shard
        for alias in self._ties.real_everywhere:
            found.setdefault(changes.names.get(alias.name, alias.name), self._names[self._shard_of(alias)])
        return found

    def _index_metadata(self, weight_map: Mapping[str, str]) -> dict[str, Any]:
        """The index's notes: sizes as they are now, aliases under their new names."""
        names, before = self._changes.names, self._ties.recorded_before
        records = {names.get(name, name): names.get(kept, kept) for name, kept in self._ties.records.items()}
        found: dict[str, Any] = {}
        for key, value in self._index_strings.items():
            if key not in before:
                if key in records or (isinstance(value, str) and value in weight_map and key not in weight_map):
                    raise RefusedError(f"the index says {key!r}: {value!r}, which would then tell of another tie")
                found[key] = value
            elif key in self._ties.records:
                new = names.get(key, key)
                found[new] = records[new]
        found.update(records)
        tensors = [tensor for tensor in self._after() if tensor.name not in self._ties.records]
        if "total_size" in found:
            found["total_size"] = unique_nbytes(tensors)
        if isinstance(found.get("total_parameters"), int):
            found["total_parameters"] = sum({id(t.storage): t.numel for t in tensors}.values())
        return found

    def _after(self) -> list[Tensor]:
        """The tensors that stay, with their new facts and old names."""
        changes = self._changes
        return [changes.tensors.get(t.name, t) for t in self._checkpoint.tensors if t.name not in changes.dropped]

    @property
    def first(self) -> str:
        """The file that the journal stands beside: the index, or a shard that stays."""
        return self.index[0] if self.index else (self.unchanged or [part.name for part in self.parts])[0]

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""
        return [*(part.name for part in self.parts), *([self.index[0]] if self.index else [])]


_COUNTED = ("total_size", "total_parameters")
"""What an index says of its tensors, which is counted whenever it is written."""


class Ties:
    """The ties of a set of safetensors shards that the index records, as they are after some changes."""

    def __init__(
        self, checkpoint: Checkpoint, changes: Changes, is_in_index: Callable[[Tensor], bool], *, has_index: bool
    ) -> None:
        dropped = changes.dropped
        aliases = [tensor for tensor in checkpoint.tensors if tensor.alias_of is not None]
        self.recorded_before = {alias.name for alias in aliases if is_in_index(alias)}
        """The names that the index records as aliases."""
        self.records: dict[str, str] = {}
        """The aliases that the index is to record: {name: the tensor's name}, by their old names."""
        self.real: list[Tensor] = []
        """Aliases that only the index has and that become tensors of a shard."""
        self.real_everywhere: list[Tensor] = []
        """These and such aliases as a shard itself records."""
        stored: dict[int, str] = {}
        for tensor in checkpoint.tensors:
            if tensor.alias_of is None and tensor.name not in dropped and not _is_moved(tensor, changes):
                stored.setdefault(id(changes.tensors.get(tensor.name, tensor).storage), tensor.name)
        for tensor in checkpoint.tensors:
            storage = changes.tensors.get(tensor.name, tensor).storage
            if tensor.name in dropped or storage is None:
                continue
            kept = stored.get(id(storage))
            if tensor.alias_of is not None:
                self._place(tensor, kept)
                stored.setdefault(id(storage), tensor.name)
            elif kept != tensor.name and has_index and _is_safetensors(checkpoint):
                self.records[tensor.name] = str(kept)

    def _place(self, alias: Tensor, kept: str | None) -> None:
        if kept is None:
            self.real_everywhere.append(alias)
            if alias.name in self.recorded_before:
                self.real.append(alias)
        elif alias.name in self.recorded_before:
            self.records[alias.name] = kept


def _is_moved(tensor: Tensor, changes: Changes) -> bool:
    """Whether a tensor gets the storage that another one has."""
    new = changes.tensors.get(tensor.name, tensor)
    return new.storage is not tensor.storage and id(new.storage) not in changes.contents


def _is_safetensors(checkpoint: Checkpoint) -> bool:
    container = checkpoint.container
    return isinstance(container, ShardSet) and all(shard.format == "safetensors" for shard in container.shards)


def _names_in(shard: Checkpoint) -> set[str]:
    return {entry.name for entry in shard.entries}


def _strided(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor and all its parts."""
    yield tensor
    for part in tensor.parts:
        yield from _strided(part)
