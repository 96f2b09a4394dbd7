"""Checks of sets of shards: the index against the files, and the files against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from ckpt_cli.errors import listed
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.sharded.names import set_of, shard_name, shard_names
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import by_storage
from ckpt_cli.ops.check.finding import Check, Occurrence


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
    strays: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Files that are named as shards of this set, but not by the index, as far as they open."""
    whole: Mapping[str, Checkpoint | None] = field(default_factory=dict)
    """Whole files of the same model beside the shards; None for one that does not open."""

    @property
    def complete(self) -> bool:
        """True if every shard could be opened."""
        return len(self.opened) == len(self.named)

    def names_of(self, shard: str) -> set[str]:
        """The tensors of an opened shard or stray, but for those that metadata call aliases."""
        return _stored(self.opened[shard] if shard in self.opened else self.strays[shard])

    @property
    def absent(self) -> dict[str, set[str]]:
        """The shards that are named and not there, each with the tensors that the index looks for in it."""
        there = set(self.beside)
        found: dict[str, set[str]] = {shard: set() for shard in self.named if shard not in there}
        for name, shard in self.weight_map.items():
            if shard in found:
                found[shard].add(name)
        return found

    @property
    def instead(self) -> dict[str, set[str]]:
        """The strays that have tensors of shards that are not there, each with these tensors: the index is stale."""
        sought = set().union(*self.absent.values())
        found = {name: sought & _stored(checkpoint) for name, checkpoint in self.strays.items()}
        return {name: names for name, names in found.items() if names}


def wanted_of(names: Sequence[str]) -> list[str] | None:
    """The shards that a folder without an index should have, by the names of those that are there; None for no set."""
    found = shard_names(names)
    sets = {(match["stem"], match["count"], match["suffix"]) for match in found}
    if len(sets) != 1:
        return None
    stem, count, suffix = sets.pop()
    if not 0 < int(count) <= 10 * len(found) + 100:
        return None
    return [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]


def strays_of(named: Sequence[str], beside: Sequence[str]) -> list[str]:
    """The files that are named as shards of a set, but are none of it."""
    stems = {(match["stem"], match["suffix"]) for match in shard_names(named)}
    known = set(named)
    found = shard_names(beside)
    return [match[0] for match in found if (match["stem"], match["suffix"]) in stems and match[0] not in known]


_WHOLE = {"pytorch_model.bin": ("pytorch_model.bin", "model.safetensors")}
"""The single files that loaders look for before an index of a name; for most that is the name itself."""


def whole_of(index: str, named: Sequence[str], beside: Sequence[str]) -> list[str]:
    """The whole files of a model whose shards are beside them, which some loaders take instead.

    transformers looks for model.safetensors, then for its index, then for pytorch_model.bin, then for its index
    (`_get_resolved_checkpoint_files`); accelerate looks for any single file first; diffusers and vLLM for an index.
    """
    sets = {"".join(set_of(index))} if index else {
        match["stem"] + match["suffix"] for match in shard_names(named)
    }  # fmt: skip
    wanted = dict.fromkeys(name for each in sorted(sets) for name in _WHOLE.get(each, (each,)))
    return [name for name in wanted if name in beside and name not in named]


def _stored(checkpoint: Checkpoint) -> set[str]:
    return {tensor.name for tensor in checkpoint.tensors if tensor.alias_of is None}


def _missing(files: ShardFiles) -> Iterator[Occurrence]:
    moved = set().union(*files.instead.values())
    folded = {name.casefold(): name for name in files.beside}
    for shard, names in files.absent.items():
        if names and names <= moved:
            continue
        detail = f", with {len(names)} of the {len(files.weight_map)} tensors of the index" if names else ""
        other = folded.get(shard.casefold())
        if other is None:
            yield Occurrence(shard, f"the shard is not there{detail}")
        else:
            yield Occurrence(
                shard, f"the shard is not there{detail}; {other} is, whose name differs in case", hint="rename the file"
            )


def _stale(files: ShardFiles) -> Iterator[Occurrence]:
    """An index whose files are not there, while others have the tensors that it looks for in them."""
    instead, absent = files.instead, files.absent
    if instead:
        count, sought = len(set().union(*instead.values())), len(set().union(*absent.values()))
        yield Occurrence(
            files.index,
            f"the index is stale: {len(absent)} of the {len(files.named)} files that it names are not there, such as "
            f"{next(iter(absent))}; {count} of the {sought} tensors that it looks for in them are in "
            f"{listed(instead, 2)}",
        )


def _second(files: ShardFiles) -> Iterator[Occurrence]:
    """A whole file beside shards, which some loaders take and others do not."""
    known = set(files.weight_map) or {name for shard in files.opened for name in files.names_of(shard)}
    for name, checkpoint in files.whole.items():
        if checkpoint is None:
            what = "it cannot be opened"
        elif _stored(checkpoint) == known:
            what = "it has the same names"
        else:
            what = "it has other names"
        loads = "diffusers loads" if name.startswith("diffusion_") else "diffusers and vLLM load"
        others = "other tools" if name.startswith("diffusion_") else "transformers and accelerate"
        yield Occurrence(
            name,
            f"a whole checkpoint beside the shards ({what}): {others} load this file, {loads} the shards",
            "note" if name.startswith("diffusion_") else "",
            name=checkpoint.path if checkpoint is not None else name,
        )


def _differing(files: ShardFiles) -> Iterator[Occurrence]:
    """Shards that are of another format than the others, or whose metadata say other things."""
    kinds = {shard: opened.format for shard, opened in files.opened.items()}
    usual = Counter(kinds.values()).most_common(1)
    for shard, kind in kinds.items():
        if kind != usual[0][0]:
            yield Occurrence(shard, f"the shard is a {kind} file, most of the set are {usual[0][0]}")
    strings = {shard: files.opened[shard].metadata for shard, kind in kinds.items() if kind == "safetensors"}
    names = set(files.weight_map)
    keys = dict.fromkeys(key for own in strings.values() for key, value in own.items() if not {key, value} & names)
    for key in keys:
        values = Counter(own.get(key) for own in strings.values())
        if len(values) > 1:
            yield from _other_values(key, values.most_common(1)[0][0], strings)


def _other_values(key: str, usual: str | None, strings: Mapping[str, Mapping[str, str]]) -> Iterator[Occurrence]:
    for shard, own in strings.items():
        if own.get(key) != usual:
            said = f"say {key}: {own[key][:60]}" if key in own else f"do not have {key}"
            most = "do not have it" if usual is None else f"say {usual[:60]}"
            severity = "warning" if key == "format" and own else "note"
            yield Occurrence(shard, f"its metadata {said}, those of most shards {most}", severity)


def _no_index(files: ShardFiles) -> Iterator[Occurrence]:
    if not files.index:
        yield Occurrence(files.named[0], "there is no index beside the shards, so transformers does not find them")


def _stray(files: ShardFiles) -> Iterator[Occurrence]:
    """Files that are named as shards of this set, but are none of it; never those that alone have a tensor."""
    known = {name for shard in files.opened for name in files.names_of(shard)}
    counts = {match["count"] for match in shard_names(files.named)}
    stale = files.instead
    for name in strays_of(files.named, files.beside):
        if name in stale:
            continue
        said = "the index does not name it" if files.index else "it is not one of them"
        problem = f"the file is named as a shard of this set, but {said}"
        alone = sorted(files.names_of(name) - known) if name in files.strays else []
        match = shard_name(name)
        if alone or (name not in files.strays and not files.complete):
            only = f", and it alone has {listed(alone, 2)}" if alone else ""
            keep = "ckpt index FILE adds it to the index; " if match and match["count"] in counts else ""
            yield Occurrence(name, problem + only, hint=f"{keep}look into it before you move it elsewhere")
        else:
            yield Occurrence(name, problem)


def _count(files: ShardFiles) -> Iterator[Occurrence]:
    """Shards whose names say another number of shards than there are."""
    for name in files.named if not files.instead else ():
        match = shard_name(name)
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
                f"{shard}: {name}",
                f"the index says that this shard has the tensor, but it has not{detail}",
                hint="the index is stale: ckpt index FILE writes it again" if other else "",
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
    Check("stale-index", "error", "an index names files that are not there, and others have its tensors", _stale,
          "ckpt index FILE writes it again"),
    Check("second-checkpoint", "warning",
          "a whole file is beside the shards of a model; some loaders take the one, some the other", _second,
          "ckpt diff FILE NAME shows whether they are equal; keep the one that is meant"),
    Check("shard-metadata", "warning",
          "shards of one set are of different formats, or have different metadata; a note where it is not `format`",
          _differing, "ckpt meta FILE shows them"),
    Check("no-index", "warning", "a folder of shards has no index", _no_index,
          "fetch the .index.json, or write it: ckpt index FILE"),
    Check("shard-count", "warning", "the names of shards say another number than there are", _count),
    Check("stray-shard", "warning", "a file is named as a shard, but the index does not name it", _stray,
          "remove it if it is left from an earlier save"),
    Check("unlisted-tensor", "warning", "a shard has a tensor that the index does not name", _unlisted,
          "ckpt index FILE writes the index again; or remove the tensor"),
    Check("tensor-twice", "warning", "two shards have a tensor of the same name", _twice, "keep one of them"),
    Check("total-size", "warning", "an index has a wrong `total_size`", _total,
          "ckpt index FILE writes it again"),
)  # fmt: skip
