"""Rewrite a set of shards with some changes: which shards are rewritten or removed, and what the index says then."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, quoted
from ckpt_cli.files.places import name_of
from ckpt_cli.formats.safetensors import rewrite as safetensors_write
from ckpt_cli.formats.safetensors.rewrite import refuse_new_ties
from ckpt_cli.formats.sharded.read import ShardSet, unique_nbytes
from ckpt_cli.formats.writing import Rewriter, ShardWork
from ckpt_cli.model.changes import Changes, entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

TOTALS = ("total_size", "total_parameters")
"""Notes of an index that follow from its shards."""


class Rewriting:
    """A set about to be written with some changes; shards that none of them concern stay as they are."""

    def __init__(
        self, checkpoint: Checkpoint, changes: Changes, rewriting: Callable[[Checkpoint, Changes], Rewriter]
    ) -> None:
        container = checkpoint.container
        if not isinstance(container, ShardSet):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} is not a set of shards")
        if changes.values or changes.added.keys() != changes.new_tensors.keys():
            raise UnsupportedError("values that are not tensors cannot be set in a set of shards", path=checkpoint.path)
        self._checkpoint = checkpoint
        self._rewriting = rewriting
        """Makes the work of one shard."""
        self._container = container
        self._names = [name_of(shard.path) for shard in container.shards]
        self._old_index: dict[str, Any] = (
            json.loads(container.index.read(0, container.index.size)) if container.index else {"weight_map": {}}
        )
        self._adopted: dict[int, list[Tensor]] = {}
        """By the number of a shard: the aliases that the index has and the shard has not."""
        self._owners = self._shards_of_entries()
        self._given = changes
        self._takers = {name: self._taker(name) for name in changes.added}
        """The number of the shard that gets each new tensor."""
        self._across: dict[str, str] = {}
        """Ties across shards: {name that is no longer stored: the one that is}, by old names."""
        self._changes = self._without_ties_across(changes)
        self.parts: list[ShardWork] = []
        self.removed: list[str] = []
        """Shards of which nothing is left."""
        self.unchanged: list[str] = []
        """Shards that stay as they are."""
        self.unreferenced = 0
        for number, shard in enumerate(container.shards):
            self._plan(number, shard)
        self._refuse_new_ties()
        self.index = self._index()
        """The new index: its file name and content; None where there is none."""

    @property
    def nbytes(self) -> int:
        """The bytes that will be written."""
        return sum(part.work.nbytes for part in self.parts) + (len(self.index[1]) if self.index else 0)

    def for_new_folder(self) -> None:
        """Do nothing: shards are written in the same way wherever they go."""

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if it is one of headers or pickles alone, and they fit where they are."""
        if self.removed:
            return False
        if not all(part.work.patch(overlay) for part in self.parts):
            return False
        if self.index is not None and self._container.index is not None:
            overlay.replace_end(self._container.index, 0, self.index[1])
        return True

    def _shards_of_entries(self) -> dict[str, int]:
        """The number of the shard of each entry; an alias of the index is where its tensor is."""
        listed = self._old_index["weight_map"]
        owners: dict[str, int] = {}
        for number, shard in enumerate(self._container.shards):
            for entry in shard.entries:
                if entry.name not in owners or listed.get(entry.name) == self._names[number]:
                    owners[entry.name] = number
        for tensor in self._checkpoint.tensors:
            if tensor.alias_of is not None and tensor.name not in owners:
                number = owners[tensor.name] = owners[tensor.alias_of]
                self._adopted.setdefault(number, []).append(tensor)
        return owners

    def _taker(self, new: str) -> int:
        """The number of the shard with a name that has most in common with a new one, else of the last."""
        tensor = self._given.added.get(new)
        if isinstance(tensor, Tensor) and tensor.storage is not None and tensor.storage not in self._given.contents:
            owner, _ = self._container.owner_of(tensor.storage)  # another name of a tensor that is there
            return next(at for at, shard in enumerate(self._container.shards) if shard.container is owner)
        parts = new.split(".")
        found, most = len(self._names) - 1, 0
        for name, number in self._owners.items():
            others = name.split(".")
            common = next((at for at, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), len(parts) - 1)
            if (common, number) > (most, found) if common else False:
                found, most = number, common
        return found

    def _without_ties_across(self, changes: Changes) -> Changes:
        """The changes, but for tensors that become names of one in another shard: those are not stored any more."""
        tensors, dropped = dict(changes.tensors), set(changes.dropped)
        for name, tensor in changes.tensors.items():
            if tensor.storage is None or tensor.storage in changes.contents:
                continue
            owner, _ = self._container.owner_of(tensor.storage)
            shards = [self._container.shards[self._owners[name]], *self._container.shards]
            if owner is shards[0].container:
                continue
            other = next(shard for shard in shards if shard.container is owner)
            if self._container.index is None or (other.format, shards[0].format) != ("safetensors", "safetensors"):
                raise RefusedError(
                    f"{name!r} would share bytes with a tensor of another shard",
                    path=self._checkpoint.path,
                    hint=f"ckpt convert {quoted(self._checkpoint.path)} OUT writes all into one file first",
                )
            self._across[name] = next(t.name for t in self._checkpoint.tensors if t.storage is tensor.storage)
            del tensors[name]
            dropped.add(name)
        return replace(changes, tensors=tensors, dropped=frozenset(dropped)) if self._across else changes

    def _plan(self, number: int, shard: Checkpoint) -> None:
        """Plan what becomes of one shard."""
        name = self._names[number]
        adopted = self._adopted.get(number, [])
        if adopted and shard.format != "safetensors":
            self._refuse_aliases(adopted)
        elif adopted:
            shard = replace(shard, entries=[*shard.entries, *adopted])
        changes = self._changes_of(number, shard)
        if shard.entries and self._container.index and all(e.name in changes.dropped for e in shard.entries):
            self.removed.append(name)
        elif _is_nothing(changes):
            self.unchanged.append(name)
        else:
            self.parts.append(ShardWork(name, self._rewriting(shard, changes)))

    def _refuse_aliases(self, aliases: Sequence[Tensor]) -> None:
        """Refuse changes that only a shard with aliases of its own could hold."""
        for alias in aliases:
            loses = alias.alias_of in self._changes.dropped and alias.name not in self._changes.dropped
            if loses or alias.name in self._changes.tensors:
                raise RefusedError(
                    f"{alias.name!r} is another name of {alias.alias_of!r} in the index only",
                    path=self._checkpoint.path,
                )

    def _changes_of(self, number: int, shard: Checkpoint) -> Changes:
        """The part of the changes that concerns one shard, with its own storages in the place of the set's."""
        changes = self._changes
        here = {entry.name for entry in shard.entries}
        return replace(
            changes,
            names={old: new for old, new in changes.names.items() if old in here},
            dropped=frozenset(name for name in changes.dropped if name in here),
            tensors={
                name: self._own(tensor, changes)
                for name, tensor in changes.tensors.items()
                if self._owners[name] == number
            },
            added={
                name: self._own(value, changes) if isinstance(value, Tensor) else value
                for name, value in changes.added.items()
                if self._takers[name] == number
            },
            metadata=_with_strings(shard.metadata, changes.in_shards),
            device=changes.device if shard.document is not None else None,
            in_shards={},
        )

    def _own(self, tensor: Tensor, changes: Changes) -> Tensor:
        """A tensor's new facts as its shard knows its storage."""
        parts = tuple(self._own(part, changes) for part in tensor.parts)
        storage = tensor.storage
        if storage is not None and storage not in changes.contents:
            _, storage = self._container.owner_of(storage)
        return replace(tensor, storage=storage, parts=parts)

    def _refuse_new_ties(self) -> None:
        """Refuse strings of all shards that would be read as ties of the whole set."""
        strings = {key: value for key, value in self._changes.in_shards.items() if value is not None}
        if strings:
            stored = {name for names in self._stored_after().values() for name in names}
            refuse_new_ties(stored, strings, self._aliases_after())

    # --- the index ---------------------------------------------------------------------------------------------------

    def _index(self) -> tuple[str, bytes] | None:
        file = self._container.index
        if file is None:
            return None
        index = dict(self._old_index)
        stored = self._stored_after()
        index["weight_map"] = self._weight_map(stored)
        notes = index.get("metadata")
        aliases = self._aliases_after()
        if isinstance(notes, dict) or self._changes.metadata is not None or self._across:
            index["metadata"] = self._notes(notes if isinstance(notes, dict) else {}, aliases)
            strings = {key: value for key, value in index["metadata"].items() if isinstance(value, str)}
            refuse_new_ties({name for names in stored.values() for name in names}, strings, aliases)
        if index == self._old_index:
            return name_of(file.path), file.read(0, file.size)
        return name_of(file.path), as_text(index)

    def _stored_after(self) -> dict[str, list[str]]:
        """The names that each shard has bytes for afterwards, by the shard's file name."""
        works = {part.name: part.work for part in self.parts}
        found: dict[str, list[str]] = {}
        for number, shard in enumerate(self._container.shards):
            work = works.get(self._names[number])
            if isinstance(work, safetensors_write.Rewriting):
                found[self._names[number]] = work.stored
            elif self._names[number] not in self.removed:
                changes = self._changes_of(number, shard)
                entries = entries_after(shard.entries, changes)
                found[self._names[number]] = [
                    entry.name for entry in entries if isinstance(entry, Tensor) and entry.alias_of is None
                ]
                found[self._names[number]] += changes.added
        return found

    def _aliases_after(self) -> dict[str, str]:
        """Every alias afterwards: {name: the one that is stored}."""
        rename = self._changes.names
        found = {rename.get(name, name): rename.get(kept, kept) for name, kept in self._across.items()}
        for part in self.parts:
            if isinstance(part.work, safetensors_write.Rewriting):
                found |= part.work.aliases
        for tensor in self._checkpoint.tensors:
            if tensor.alias_of is not None and self._names[self._owners[tensor.name]] in self.unchanged:
                found[tensor.name] = tensor.alias_of
        return found

    def _weight_map(self, stored: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return which shard has which name, in the order of the old map; a newly stored alias comes last.

        Where the old map is wrong about a name that changes, the new one is right.
        """
        rename, old = self._changes.names, self._old_index["weight_map"]
        had = {number: {entry.name for entry in shard.entries} for number, shard in enumerate(self._container.shards)}
        aliases = {tensor.name for tensor in self._checkpoint.tensors if tensor.alias_of is not None}
        owners = {name: file for file, names in stored.items() for name in names}
        found: dict[str, str] = {}
        for name, file in old.items():
            new = rename.get(name, name)
            is_elsewhere = name not in had[self._names.index(file)]
            is_there = new in stored.get(file, ()) or name in aliases or is_elsewhere
            if name not in self._changes.dropped and file not in self.removed and is_there:
                found[new] = owners.get(new, file) if is_elsewhere and new != name and name not in aliases else file
        unlisted = {rename.get(name, name) for names in had.values() for name in names if name not in old}
        unlisted -= {rename.get(name, name) for name in aliases}
        for file, names in stored.items():
            for name in names:
                if name not in found and name not in unlisted:
                    found[name] = file
        return found

    def _notes(self, old: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
        """The index's notes: sizes as they are now, aliases under their new names, strings as they were set."""
        rename = self._changes.names
        known = {tensor.name for tensor in self._checkpoint.tensors if tensor.alias_of is not None}
        found: dict[str, Any] = {}
        for key, value in old.items():
            if key not in known:
                found[key] = value
            elif rename.get(key, key) in aliases:
                found[rename.get(key, key)] = aliases[rename.get(key, key)]
        for name in (*self._changes.tensors, *self._across):
            new = rename.get(name, name)
            if new in aliases:
                found[new] = aliases[new]
        if self._changes.metadata is not None:
            self._set_notes(found, self._checkpoint.metadata, self._changes.metadata)
        entries = [self._changes.tensors.get(e.name, e) for e in self._checkpoint.tensors]
        tensors = [entry for entry in entries if entry.name not in self._changes.dropped]
        tensors += self._changes.new_tensors.values()
        if "total_size" in found:
            found["total_size"] = unique_nbytes(tensors)
        if isinstance(found.get("total_parameters"), int):
            found["total_parameters"] = sum({t.storage: t.numel for t in tensors}.values())
        self._refuse_totals(found)
        return found

    def _refuse_totals(self, found: Mapping[str, Any]) -> None:
        """Refuse totals that were set to anything but what they are."""
        old, new = self._checkpoint.metadata, self._changes.metadata or {}
        for key in TOTALS:
            if key in new and new[key] != old.get(key) and new[key] != str(found[key]):
                raise RefusedError(
                    f"{key!r} follows from the shards: it is {found[key]}, not {new[key][:60]}",
                    path=self._checkpoint.path,
                )

    def _set_notes(self, found: dict[str, Any], old: Mapping[str, str], new: Mapping[str, str]) -> None:
        """Carry out what is to become of strings."""
        for key in [key for key in (*old, *new) if old.get(key) != new.get(key)]:
            if key in TOTALS:
                if key not in new:
                    raise RefusedError(f"{key!r} follows from the shards", path=self._checkpoint.path)
                found[key] = 0
            elif key not in new:
                found.pop(key, None)
            elif isinstance(found.get(key, ""), str):
                found[key] = new[key]
            else:
                found[key] = _as_json(key, new[key], self._checkpoint.path)

    @property
    def first(self) -> str:
        """The file that the journal stands beside: the index, or a shard that stays."""
        return self.index[0] if self.index else (self.unchanged or [part.name for part in self.parts])[0]

    @property
    def names(self) -> Sequence[str]:
        """The files that are written."""
        return [*(part.name for part in self.parts), *([self.index[0]] if self.index else [])]


def as_text(index: Mapping[str, Any]) -> bytes:
    """Return the content of the file of an index, as huggingface_hub writes it."""
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _is_nothing(changes: Changes) -> bool:
    is_same = not (changes.names or changes.dropped or changes.tensors or changes.added or changes.device)
    return is_same and changes.metadata is None


def _with_strings(old: Mapping[str, str], changed: Mapping[str, str | None]) -> dict[str, str] | None:
    """The strings of one shard once some are set or, where they are None, removed; None where nothing changes."""
    new = {key: value for key, value in {**old, **changed}.items() if value is not None}
    return None if new == old else new


def _as_json(key: str, text: str, path: str) -> object:
    """Return the value of a note that is not a string."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{key!r} holds JSON in the index, and {text[:60]!r} is not JSON", path=path) from None
    return value
