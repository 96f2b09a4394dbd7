"""New sets of safetensors shards: `model-00001-of-00002.safetensors` and so on, and `model.safetensors.index.json`."""

from __future__ import annotations

import os

from ckpt_cli.files.copying import Progress
from ckpt_cli.formats.new_safetensors import aliases_among, metadata_with, of_loaders, spelled, write_some
from ckpt_cli.formats.new_set import Create, index_name, split, verify_set, write_index
from ckpt_cli.formats.verify import open_with_safetensors
from ckpt_cli.outgoing import Outgoing

__all__ = ["spelled", "verify_folder", "write_folder"]

PATTERN = "model{suffix}.safetensors"


def write_folder(outgoing: Outgoing, create: Create, progress: Progress) -> int:
    """Write every shard and the index; with several shards it has what the metadata of a single file would.

    Returns their bytes.
    """
    aliases = aliases_among(outgoing.tensors, outgoing.metadata)
    notes = metadata_with(outgoing, aliases)
    shards = split(outgoing.tensors, outgoing.max_shard, PATTERN)
    own = of_loaders(outgoing.metadata)
    nbytes = 0
    if len(shards) > 1:
        nbytes += write_index(outgoing, shards, aliases, notes, create(index_name(PATTERN)))
    else:
        own = {**notes, **own}
    for shard in shards:
        nbytes += write_some(outgoing.part(shard.tensors, {}), aliases, own, create(shard.name), progress)
    return nbytes


def verify_folder(outgoing: Outgoing, folder: str) -> None:
    """Open every shard with the reference reader, and the set with our own."""
    for shard in split(outgoing.tensors, outgoing.max_shard, PATTERN):
        open_with_safetensors(os.path.join(folder, shard.name))
    verify_set(outgoing, folder, PATTERN)
