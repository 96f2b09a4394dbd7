"""The plan of `meta`: show and change the strings of a container, of a set those of its shards and of its index."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.runs.read import model_of
from ckpt_cli.formats.sharded.read import ShardSet, read_index
from ckpt_cli.formats.sharded.rewrite import TOTALS
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.select import close_names

_CHANGE = Verb("changed", "change")


def metadata_of(checkpoint: Checkpoint, keys: Sequence[str]) -> dict[str, str]:
    """Return the strings under some keys, or all; raises NameNotFoundError for a key that is not there."""
    for key in keys:
        if key not in checkpoint.metadata:
            raise NameNotFoundError(key, close_names(key, checkpoint.metadata), path=checkpoint.path)
    return {key: checkpoint.metadata[key] for key in keys} if keys else dict(checkpoint.metadata)


def parse_pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Return `KEY=VALUE` arguments as a map; raises UsageError for one without a key."""
    pairs = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise UsageError(f"{argument!r} is not KEY=VALUE")
        pairs[key] = value
    require_texts(pairs)
    return pairs


def require_texts(pairs: Mapping[str, str]) -> None:
    """Raise UsageError for a key or value that is no text, or none that UTF-8 has, and for an empty key."""
    for key, value in pairs.items():
        if not key or not isinstance(key, str) or not isinstance(value, str):
            raise UsageError(f"{key!r}: metadata is text under a name, not {value!r}")
        try:
            f"{key}={value}".encode()
        except UnicodeEncodeError:
            raise UsageError(f"{key!r}: metadata is text, and that is not UTF-8") from None


def plan_meta(checkpoint: Checkpoint, pairs: Mapping[str, str], removed: Sequence[str]) -> EditPlan:
    """Set and remove strings.

    Raises UnsupportedError for a container without a string map, RefusedError for a key that records a tie.
    """
    checkpoint = model_of(checkpoint)
    if not format_of(checkpoint).keeps_strings:
        raise UnsupportedError(
            _without_strings(checkpoint),
            path=checkpoint.path,
            hint=f"ckpt set {quoted(checkpoint.path)} --new KEY=VALUE adds an entry"
            if format_of(checkpoint).is_torch_save or format_of(checkpoint).is_distributed
            else None,
        )
    names = {entry.name for entry in checkpoint.entries}
    for key in (*pairs, *removed):
        if key in names:
            raise RefusedError(
                f"{key!r} is the name of a tensor, so as a key it would record a tie",
                path=checkpoint.path,
                hint="ckpt tie and ckpt untie change ties",
            )
    metadata_of(checkpoint, removed)
    strings = strings_of_set(checkpoint)
    if strings is not None:
        changes, placed = changes_of_set(checkpoint, strings, pairs, removed)
        return EditPlan(_CHANGE, (*pairs, *removed), changes=changes, placed=placed)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in removed} | dict(pairs)
    return EditPlan(_CHANGE, (*pairs, *removed), changes=Changes(metadata=metadata))


def _without_strings(checkpoint: Checkpoint) -> str:
    """Say why a container's strings cannot be changed."""
    if checkpoint.metadata:
        return f"the metadata of a checkpoint of format {checkpoint.format} cannot be changed"
    if format_of(checkpoint).is_distributed:
        return "a distributed checkpoint has no metadata of strings: its .metadata says what it has and where"
    return f"a checkpoint of format {checkpoint.format} has no metadata of strings"


# --- the strings of a set of shards --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlacedStrings:
    """The strings of a set, by their places: each shard, and the index."""

    index: Mapping[str, str] | None
    """Strings as they are, other values as JSON; None where the set has no index."""
    shards: Mapping[str, Mapping[str, str]]
    """By the file name of each shard."""

    def agreed(self) -> list[tuple[str, str, str]]:
        """Return rows of key, value and place; a string that all shards have is one row."""
        rows: list[tuple[str, str, str]] = []
        for key in dict.fromkeys(key for strings in self.shards.values() for key in strings):
            found = {name: strings[key] for name, strings in self.shards.items() if key in strings}
            if len(found) == len(self.shards) and len(set(found.values())) == 1:
                rows.append((key, next(iter(found.values())), "shards"))
            else:
                rows += [(key, value, name) for name, value in found.items()]
        return rows + [(key, value, "index") for key, value in (self.index or {}).items()]


def strings_of_set(checkpoint: Checkpoint) -> PlacedStrings | None:
    """Return the strings of a set by their places; None for any other checkpoint."""
    container = model_of(checkpoint).container
    if not isinstance(container, ShardSet):
        return None
    index = None
    if container.index is not None:
        _, metadata = read_index(container.index)
        index = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return PlacedStrings(index, {os.path.basename(shard.path): shard.metadata for shard in container.shards})


def changes_of_set(
    checkpoint: Checkpoint, strings: PlacedStrings, pairs: Mapping[str, str], removed: Sequence[str]
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


def _places(key: str, strings: PlacedStrings, checkpoint: Checkpoint) -> list[str]:
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
    without = [os.path.basename(shard.path) for shard in shards if not format_of(shard).keeps_strings]
    if without:
        raise UnsupportedError(
            f"{key!r} would go into the shards, and torch.save files have no metadata of strings"
            if all(format_of(shard).is_pickle for shard in shards)
            else f"{key!r} would go into the shards, and {without[0]} has no metadata of strings",
            path=checkpoint.path,
        )
