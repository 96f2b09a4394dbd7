"""The strings of a set of shards: those that each shard has, which readers read, and those of the index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_cli.errors import RefusedError, UnsupportedError
from ckpt_cli.formats.sharded.read import ShardSet, read_index
from ckpt_cli.formats.sharded.rewrite import TOTALS
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class SetStrings:
    """The metadata of a set, by where it is."""

    index: Mapping[str, str] | None
    """Strings as they are, other values as JSON; None where the set has no index."""
    shards: Mapping[str, Mapping[str, str]]
    """By the file name of each shard."""

    def agreed(self) -> list[tuple[str, str, str]]:
        """Rows of key, value and place; what all shards say alike is one row."""
        rows: list[tuple[str, str, str]] = []
        for key in dict.fromkeys(key for strings in self.shards.values() for key in strings):
            found = {name: strings[key] for name, strings in self.shards.items() if key in strings}
            if len(found) == len(self.shards) and len(set(found.values())) == 1:
                rows.append((key, next(iter(found.values())), "shards"))
            else:
                rows += [(key, value, name) for name, value in found.items()]
        return rows + [(key, value, "index") for key, value in (self.index or {}).items()]


def strings_of_set(checkpoint: Checkpoint) -> SetStrings | None:
    """The strings of a set by where they are; None for any other checkpoint."""
    container = checkpoint.container
    if not isinstance(container, ShardSet):
        return None
    index = None
    if container.index is not None:
        _, metadata = read_index(container.index)
        index = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return SetStrings(index, {os.path.basename(shard.path): shard.metadata for shard in container.shards})


def changes_of_set(
    checkpoint: Checkpoint, strings: SetStrings, pairs: Mapping[str, str], removed: Sequence[str]
) -> tuple[Changes, dict[str, str]]:
    """Set and remove strings wherever they stand; new ones go to the shards.

    Returns the changes, and for each key in words where it is changed. Raises RefusedError where a shard cannot take a
    string, or an index is needed and is not there.
    """
    in_index = dict(strings.index or {})
    in_shards: dict[str, str | None] = {}
    placed: dict[str, str] = {}
    count = len(strings.shards)
    for key in dict.fromkeys((*pairs, *removed)):
        value = pairs.get(key)
        places = _places(key, strings, checkpoint)
        if "index" in places and value is None:
            in_index.pop(key)
        elif "index" in places:
            in_index[key] = value or ""
        if "shards" in places:
            _require_strings(checkpoint, key)
            in_shards[key] = value
            places[places.index("shards")] = "its one shard" if count == 1 else f"all {count} shards"
        placed[key] = " and ".join("the index" if place == "index" else place for place in places)
    metadata = {**{k: v for k, v in checkpoint.metadata.items() if k not in (strings.index or {})}, **in_index}
    changes = Changes(metadata=metadata if strings.index is not None else None, in_shards=in_shards)
    return changes, placed


def _places(key: str, strings: SetStrings, checkpoint: Checkpoint) -> list[str]:
    """Return the place of a key, or of a new one: `shards`, `index`, or both."""
    found = ["shards"] if any(key in own for own in strings.shards.values()) else []
    if key in (strings.index or {}):
        found.append("index")
    if found or key not in TOTALS:
        return found or ["shards"]
    if strings.index is None:
        raise RefusedError(f"{key!r} belongs to an index, and the set has none", path=checkpoint.path)
    return ["index"]


def _require_strings(checkpoint: Checkpoint, key: str) -> None:
    """Raise where one of the shards has no place for strings."""
    container = checkpoint.container
    shards = container.shards if isinstance(container, ShardSet) else ()
    without = [os.path.basename(shard.path) for shard in shards if shard.format != "safetensors"]
    if without:
        raise UnsupportedError(
            f"{key!r} would go into the shards, and torch.save files have no metadata of strings"
            if all(shard.format in ("zip", "legacy", "pickle") for shard in shards)
            else f"{key!r} would go into the shards, and {without[0]} has no metadata of strings",
            path=checkpoint.path,
        )
