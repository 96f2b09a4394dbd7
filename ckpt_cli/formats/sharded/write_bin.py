"""New sets of torch.save shards: `pytorch_model-00001-of-00002.bin` and so on, and `pytorch_model.bin.index.json`."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli.files.copy import Progress
from ckpt_cli.formats.sharded.write import Create, index_name, split, verify_set, write_index
from ckpt_cli.formats.torch_zip.write import spelled, write
from ckpt_cli.model.new_checkpoint import NewCheckpoint

__all__ = ["spelled", "verify_folder", "write_folder"]

PATTERN = "pytorch_model{suffix}.bin"


def write_folder(new: NewCheckpoint, create: Create, progress: Progress) -> int:
    """Write every shard and the index; returns their bytes."""
    nbytes = 0
    shards = split(new.tensors, new.max_shard, PATTERN)
    if len(shards) > 1:
        nbytes += write_index(new, shards, {}, new.metadata, create(index_name(PATTERN)))
    for shard in shards:
        stem = shard.name.removesuffix(".bin")
        nbytes += write(replace(new.part(shard.tensors, {}), stem=stem), create(shard.name), progress)
    return nbytes


def verify_folder(new: NewCheckpoint, folder: str) -> None:
    """Open the set with our own reader."""
    verify_set(new, folder, PATTERN)
