"""New sets of safetensors shards: `model-00001-of-00002.safetensors` and so on, and `model.safetensors.index.json`."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_cli import limits
from ckpt_cli.errors import RefusedError
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.places import join
from ckpt_cli.formats.safetensors.write import aliases_among, metadata_with, spelled, ties_of, write_some
from ckpt_cli.formats.sharded.write import Create, index_name, split, verify_set, write_index
from ckpt_cli.formats.verify import open_with_safetensors
from ckpt_cli.model.new_checkpoint import NewCheckpoint

__all__ = ["spelled", "verify_folder", "write_folder"]

PATTERN = "model{suffix}.safetensors"


def write_folder(new: NewCheckpoint, create: Create, progress: Progress) -> int:
    """Write every shard and the index: each shard has the strings, which readers look for there.

    With several shards, ties and what the old index noted are in the index. Returns their bytes.
    """
    aliases = aliases_among(new.tensors, new.metadata)
    shards = split(new.tensors, new.max_shard, PATTERN)
    nbytes = 0
    if len(shards) > 1:
        own = {key: value for key, value in new.metadata.items() if key not in new.index}
        _refuse_too_many(own, len(shards))
        notes = {**new.index, **ties_of(new, aliases)}
        nbytes += write_index(new, shards, aliases, notes, create(index_name(PATTERN)))
    else:
        own = metadata_with(new, aliases)
    for shard in shards:
        nbytes += write_some(new.part(shard.tensors, {}), aliases, own, create(shard.name), progress)
    return nbytes


def _refuse_too_many(strings: Mapping[str, str], shards: int) -> None:
    """Raise where the same strings in each shard would come to far more bytes than any honest ones."""
    characters = sum(len(key) + len(value) for key, value in strings.items())
    if characters * shards > 8 * limits.METADATA:
        raise RefusedError(
            f"its metadata of {characters:,} characters would stand in each of {shards:,} shards",
            hint="--max-shard with a larger size makes fewer shards",
        )


def verify_folder(new: NewCheckpoint, folder: str) -> None:
    """Open every shard with the reference reader, and the set with our own."""
    for shard in split(new.tensors, new.max_shard, PATTERN):
        open_with_safetensors(join(folder, shard.name))
    verify_set(new, folder, PATTERN)
