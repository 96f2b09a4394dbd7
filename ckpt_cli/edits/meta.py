"""The plan of `meta`: show and change the container's string map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_cli.edits.meta_set import changes_of_set, strings_of_set
from ckpt_cli.edits.patching import Verb
from ckpt_cli.edits.transaction import Planned
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.select import close_names


def metadata_of(checkpoint: Checkpoint, keys: Sequence[str]) -> dict[str, str]:
    """The strings under some keys, or all; raises NameNotFoundError for a key that is not there."""
    for key in keys:
        if key not in checkpoint.metadata:
            raise NameNotFoundError(key, close_names(key, checkpoint.metadata), path=checkpoint.path)
    return {key: checkpoint.metadata[key] for key in keys} if keys else dict(checkpoint.metadata)


def parse_pairs(arguments: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` arguments as a map; raises UsageError for one without a key."""
    pairs = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise UsageError(f"{argument!r} is not KEY=VALUE")
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{key!r}: metadata is text, and that is not UTF-8") from None
        pairs[key] = value
    return pairs


def plan_meta(checkpoint: Checkpoint, pairs: Mapping[str, str], removed: Sequence[str]) -> Planned:
    """Set and remove strings.

    Raises UnsupportedError for a container without a string map, RefusedError for a key that records a tie.
    """
    if checkpoint.format not in ("safetensors", "shards"):
        raise UnsupportedError(
            _without_strings(checkpoint),
            path=checkpoint.path,
            hint=f"ckpt set {checkpoint.path} --new KEY=VALUE adds an entry"
            if checkpoint.format in ("zip", "legacy")
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
        return Planned(changes, Verb("changed", "change"), (*pairs, *removed), placed=placed)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in removed} | dict(pairs)
    return Planned(Changes(metadata=metadata), Verb("changed", "change"), (*pairs, *removed))


def _without_strings(checkpoint: Checkpoint) -> str:
    """Say why a container's strings cannot be changed."""
    if checkpoint.metadata:
        return f"the metadata of a checkpoint of format {checkpoint.format} cannot be changed"
    if checkpoint.format == "dcp":
        return "a distributed checkpoint has no metadata of strings: what it notes are the places of its chunks"
    return f"a checkpoint of format {checkpoint.format} has no metadata of strings"
