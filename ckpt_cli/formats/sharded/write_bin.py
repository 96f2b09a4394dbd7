"""New sets of torch.save shards: `pytorch_model-00001-of-00002.bin` and so on, and `pytorch_model.bin.index.json`."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli.files.copy import Progress
from ckpt_cli.formats.sharded.write import Create, index_name, split, verify_set, write_index
from ckpt_cli.formats.torch_zip.write import spelled, write
from ckpt_cli.model.new_checkpoint import Outgoing

__all__ = ["spelled", "verify_folder", "write_folder"]

PATTERN = "pytorch_model{suffix}.bin"


def write_folder(outgoing: Outgoing, create: Create, progress: Progress) -> int:
    """Write every shard and the index; returns their bytes."""
    nbytes = 0
    shards = split(outgoing.tensors, outgoing.max_shard, PATTERN)
    if len(shards) > 1:
        nbytes += write_index(outgoing, shards, {}, outgoing.metadata, create(index_name(PATTERN)))
    for shard in shards:
        stem = shard.name.removesuffix(".bin")
        nbytes += write(replace(outgoing.part(shard.tensors, {}), stem=stem), create(shard.name), progress)
    return nbytes


def verify_folder(outgoing: Outgoing, folder: str) -> None:
    """Open the set with our own reader."""
    verify_set(outgoing, folder, PATTERN)
