"""Write the index of a set of shards from the shards that are there: `ckpt index`.

It is the file that transformers, diffusers and huggingface_hub look into, `model.safetensors.index.json` or
`pytorch_model.bin.index.json`; of a variant `model.safetensors.index.fp16.json`. What an old index notes is kept, but
for the totals, which follow from the shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_cli.edits.plan import EditOptions, EditResult, Verb
from ckpt_cli.errors import FormatError, LimitError, RefusedError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import refuse_cached
from ckpt_cli.files.backup import keeping
from ckpt_cli.files.open import Opener, finish_edits, open_beside_writers
from ckpt_cli.files.places import can_write, folder_of, is_folder, is_link, join, name_of, names_in, open_file, place_of
from ckpt_cli.files.source import SourceFile
from ckpt_cli.files.system import write_all
from ckpt_cli.files.unchanged import require_unchanged
from ckpt_cli.formats.open import read_one
from ckpt_cli.formats.sharded.names import INDEX, indexed_set, is_index, shards_to_index
from ckpt_cli.formats.sharded.read import read_index, unique_nbytes
from ckpt_cli.formats.sharded.rewrite import as_text
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.check.shards import total_sizes
from ckpt_cli.ops.output import other_names, writing

_WRITE = Verb("wrote", "write")

_MOVED, _GONE, _NEW = "another shard than the index said", "no shard, so no longer in the index", "the index now"
"""What becomes of names, in words that complete `NAME: in …`."""


@dataclass(slots=True)
class _Set:
    """The shards of a set that are open, and its old index."""

    index: SourceFile | None
    """None where there is no index yet."""
    shards: Sequence[Checkpoint]
    old: Mapping[str, str]
    """The weight_map of the old index; empty where there is none that can be read."""
    metadata: Mapping[str, Any]
    left: Sequence[str]
    """Files that are named as shards, but are left out."""

    @property
    def files(self) -> list[SourceFile]:
        """All open files."""
        own = [self.index] if self.index is not None else []
        return [*own, *(file for shard in self.shards for file in shard.container.files)]

    def close(self) -> None:
        """Close them."""
        for file in self.files:
            file.close()


def index(path: str, options: EditOptions) -> EditResult:
    """Write the index of the shards in a folder, or the one that `path` names, from the shards themselves.

    Raises UsageError where it is not clear which files are the set, RefusedError where a shard is missing or two have
    a tensor of one name, and whatever the reader of a shard raises.
    """
    if options.output is not None:
        raise UsageError("an index stands beside its shards, so it is not written elsewhere")
    with about(path):
        folder, name = (path, "") if is_folder(path) else (folder_of(path), name_of(path))
        if name and not name.endswith(INDEX) and not is_index(name):
            open_file(path).close()  # raises what is to be said of a path that is not there
            raise UsageError(
                "is neither a folder of shards nor the name of an index",
                hint=f"name the folder that it lies in, or an index: {join(folder, 'model.safetensors' + INDEX)}",
            )
        if not place_of(folder).is_local:
            raise UnsupportedError("it does not lie on this machine's disk, so no index is written there")
        finish_edits(folder or ".")
        name = indexed_set(folder, names_in(folder or "."), name)
        target = join(folder, name)
        refuse_cached(target)
        if is_link(target):
            raise RefusedError("is a symbolic link, and what it leads to may belong to another set too", path=target)
        found = open_beside_writers(
            target, lambda opener: _open(folder, name, opener), write=not options.dry_run and can_write(folder or ".")
        )
        try:
            return _write(target, found, replace(_result(path, found, target), dry_run=options.dry_run), options)
        finally:
            found.close()


def _open(folder: str, name: str, opener: Opener) -> _Set:
    """Open the old index, where there is one, and the shards."""
    names = names_in(folder or ".")
    file = opener.open(join(folder, name)) if name in names else None
    old, metadata = _read_old(file)
    chosen = shards_to_index(folder, names, name, list(dict.fromkeys(old.values())))
    files = opener.open_all([join(folder, shard) for shard in chosen.shards])
    try:
        return _Set(file, [read_one(each) for each in files], old, metadata, chosen.left)
    except BaseException:
        for each in [*files, *([file] if file is not None else [])]:
            each.close()
        raise


def _read_old(file: SourceFile | None) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """The weight_map and metadata of an old index; nothing of one that is broken."""
    if file is None:
        return {}, {}
    try:
        return read_index(file)
    except LimitError:
        raise
    except FormatError:
        return {}, _metadata_of(file)


def _metadata_of(file: SourceFile) -> Mapping[str, Any]:
    """The metadata of an index whose weight_map cannot be used."""
    try:
        parsed = json.loads(file.read(0, file.size))
        found = parsed.get("metadata")
    except (ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _weight_map(found: _Set) -> dict[str, str]:
    """Return which shard has which tensor, in the order of the old index; new names follow in that of the shards."""
    holders: dict[str, list[str]] = {}
    for shard in found.shards:
        for tensor in _stored(shard):
            holders.setdefault(tensor.name, []).append(name_of(shard.path))
    aliases = {name for shard in found.shards for name in shard.names} - holders.keys()
    aliases |= {name for name, kept in found.metadata.items() if isinstance(kept, str) and kept in holders}
    places = {name_of(shard.path) for shard in found.shards}
    weight_map: dict[str, str] = {}
    for name in dict.fromkeys((*found.old, *holders)):
        if name in holders:
            weight_map[name] = _holder(name, holders[name], found)
        elif name in aliases and found.old[name] in places:  # another name of a tensor that is stored
            weight_map[name] = found.old[name]
    return weight_map


def _holder(name: str, shards: Sequence[str], found: _Set) -> str:
    """The shard that counts for a name: of several the one that the old index names."""
    if len(shards) > 1 and found.old.get(name) not in shards:
        raise RefusedError(
            f"{shards[0]} and {shards[1]} both have a tensor {name!r}, and nothing says which one counts",
            hint=f"ckpt rm {shards[1]} {name} -o OUT writes one of them without it",
        )
    return found.old[name] if len(shards) > 1 else shards[0]


def _stored(shard: Checkpoint) -> list[Tensor]:
    return [tensor for tensor in shard.tensors if tensor.alias_of is None]


def _metadata(found: _Set, weight_map: Mapping[str, str]) -> dict[str, Any]:
    """What the old index notes, with the totals as they are now."""
    tensors = [
        tensor for shard in found.shards for tensor in _stored(shard) if weight_map[tensor.name] == name_of(shard.path)
    ]
    metadata = dict(found.metadata)
    if metadata.get("total_size") not in total_sizes([tensor for shard in found.shards for tensor in shard.tensors]):
        metadata = {**metadata, "total_size": unique_nbytes(tensors)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum({tensor.storage: tensor.numel for tensor in tensors}.values())
    return metadata


def _result(path: str, found: _Set, target: str) -> EditResult:
    """Return the result but for what is written: what becomes of the names of the old index."""
    weight_map = _weight_map(found)
    placed = {name: _MOVED for name, shard in found.old.items() if weight_map.get(name, shard) != shard}
    placed |= {name: _GONE for name in found.old if name not in weight_map}
    placed |= {name: _NEW for name in weight_map if found.old and name not in found.old}
    return EditResult(
        path=path,
        output=target,
        changed=(name_of(target),),
        also_changed=(),
        bytes_written=0,
        in_place=True,
        dry_run=False,
        verb=_WRITE,
        placed=placed,
        left=tuple(found.left),
    )


def _write(target: str, found: _Set, done: EditResult, options: EditOptions) -> EditResult:
    """Write the index, unless it is so already."""
    weight_map = _weight_map(found)
    content = {"metadata": _metadata(found, weight_map), "weight_map": weight_map}
    if found.index is not None and (content["metadata"], weight_map) == (found.metadata, found.old):
        return done
    raw = as_text(content)
    done = replace(done, bytes_written=len(raw), other_names=other_names(target) if found.index is not None else 0)
    if options.dry_run:
        _require_room(target)
        return done
    with keeping() as kept, writing(target, mode_of=found.shards[0].path) as file:
        write_all(file.fd, raw, 0)
        require_unchanged(found.files)
        if options.backup and found.index is not None:
            kept.keep_replaced({target: file.path}, (each.path for each in found.files))
    return replace(done, backups=kept.paths)


def _require_room(target: str) -> None:
    """Raise PermissionError where a new index could not take its place."""
    import errno
    import os

    if not can_write(folder_of(target) or "."):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), target)
