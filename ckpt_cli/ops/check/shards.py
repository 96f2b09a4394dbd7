"""Checks of sets of shards: the index against the files, and the files against each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import by_storage
from ckpt_cli.ops.check.finding import Check, Occurrence

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """A set of shards, as far as it is there."""

    index: str
    """The name of the index; empty where there is no index."""
    named: Sequence[str]
    """The shards that the index names, or, without one, that the names of the others ask for."""
    beside: Sequence[str]
    """The files of the folder."""
    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]
    opened: Mapping[str, Checkpoint] = field(default_factory=dict)
    """The shards that could be opened, by name."""

    @property
    def complete(self) -> bool:
        """True if every shard could be opened."""
        return len(self.opened) == len(self.named)

    def names_of(self, shard: str) -> set[str]:
        """The tensors of an opened shard, but for those that metadata call aliases."""
        return {tensor.name for tensor in self.opened[shard].tensors if tensor.alias_of is None}


def wanted_of(names: Sequence[str]) -> list[str] | None:
    """The shards that a folder without an index should have, by the names of those that are there; None for no set."""
    found = [match for match in map(_SHARD.fullmatch, names) if match]
    sets = {(match["stem"], match["count"], match["suffix"]) for match in found}
    if len(sets) != 1:
        return None
    stem, count, suffix = sets.pop()
    if not 0 < int(count) <= 10 * len(found) + 100:
        return None
    return [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def _missing(files: ShardFiles) -> Iterator[Occurrence]:
    there = set(files.beside)
    counts = Counter(files.weight_map.values())
    for shard in files.named:
        if shard not in there:
            count = counts[shard]
            detail = f", with {count} of the {len(files.weight_map)} tensors of the index" if count else ""
            yield Occurrence(shard, f"the shard is not there{detail}")


def _no_index(files: ShardFiles) -> Iterator[Occurrence]:
    if not files.index:
        yield Occurrence(files.named[0], "there is no index beside the shards, so transformers does not find them")


def _stray(files: ShardFiles) -> Iterator[Occurrence]:
    """Files that are named as shards of this set, but are none of it."""
    named = set(files.named)
    stems = {(match["stem"], match["suffix"]) for match in map(_SHARD.fullmatch, files.named) if match}
    for name in files.beside:
        match = _SHARD.fullmatch(name)
        if match and name not in named and (match["stem"], match["suffix"]) in stems:
            yield Occurrence(name, "the file is named as a shard of this set, but the index does not name it")


def _count(files: ShardFiles) -> Iterator[Occurrence]:
    """Shards whose names say another number of shards than there are."""
    for name in files.named:
        match = _SHARD.fullmatch(name)
        if match and int(match["count"]) != len(files.named):
            yield Occurrence(name, f"its name says {int(match['count'])} shards, the index names {len(files.named)}")
            return


def _lacking(files: ShardFiles) -> Iterator[Occurrence]:
    names = {shard: {entry.name for entry in opened.entries} for shard, opened in files.opened.items()}
    holders = {name: shard for shard, held in names.items() for name in held}
    for name, shard in files.weight_map.items():
        if shard in names and name not in names[shard]:
            other = holders.get(name)
            detail = f"; {other} has it" if other else ""
            yield Occurrence(
                f"{shard}: {name}", f"the index says that this shard has the tensor, but it has not{detail}"
            )


def _unlisted(files: ShardFiles) -> Iterator[Occurrence]:
    if not files.index:
        return
    for shard in files.opened:
        for name in sorted(files.names_of(shard) - files.weight_map.keys()):
            yield Occurrence(f"{shard}: {name}", "the index does not name the tensor, so it may not be loaded")


def _twice(files: ShardFiles) -> Iterator[Occurrence]:
    first: dict[str, str] = {}
    for shard in files.opened:
        for name in sorted(files.names_of(shard)):
            if first.setdefault(name, shard) != shard:
                yield Occurrence(f"{shard}: {name}", f"{first[name]} has a tensor of this name too")


def _total(files: ShardFiles) -> Iterator[Occurrence]:
    """Find a total_size that no writer would compute: tied tensors once or not, views or their storages."""
    said = files.metadata.get("total_size")
    if isinstance(said, bool) or not isinstance(said, int | float) or not files.complete:
        return
    tensors = [tensor for opened in files.opened.values() for tensor in opened.tensors]
    if said not in total_sizes(tensors):
        own = [tensor for tensor in tensors if tensor.alias_of is None]
        yield Occurrence(files.index, f"its total_size is {said}, its tensors have {_views(own)} bytes")


def total_sizes(tensors: Sequence[Tensor]) -> set[int]:
    """Return the sums that writers record as the total size of some tensors."""
    own = [tensor for tensor in tensors if tensor.alias_of is None]
    return {_views(own), sum(tensor.nbytes for tensor in own), sum(tensor.nbytes for tensor in tensors),
            sum(storage.nbytes for storage, _ in by_storage(own))}  # fmt: skip


def _views(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors, tied ones counted once."""
    return sum(tensor.nbytes for tensor in {tensor.view or id(tensor): tensor for tensor in tensors}.values())


CHECKS: tuple[Check[ShardFiles], ...] = (
    Check("missing-shard", "error", "a shard of a set is not there", _missing, "fetch the file"),
    Check("missing-tensor", "error", "an index says that a shard has a tensor, but it has not", _lacking,
          "fetch or write shards and index together again"),
    Check("no-index", "warning", "a folder of shards has no index", _no_index, "fetch the .index.json"),
    Check("shard-count", "warning", "the names of shards say another number than there are", _count),
    Check("stray-shard", "warning", "a file is named as a shard, but the index does not name it", _stray,
          "remove it if it is left from an earlier save"),
    Check("unlisted-tensor", "warning", "a shard has a tensor that the index does not name", _unlisted,
          "write the index again, or remove the tensor"),
    Check("tensor-twice", "warning", "two shards have a tensor of the same name", _twice, "keep one of them"),
    Check("total-size", "warning", "an index has a wrong `total_size`", _total, "correct the index"),
)  # fmt: skip
