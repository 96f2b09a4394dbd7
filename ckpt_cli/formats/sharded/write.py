"""New folders of shards, split and named as huggingface_hub does it, with the index that says what is where.

huggingface_hub/serialization/_base.py (`split_state_dict_into_shards_factory`) and _torch.py (`save_torch_state_dict`):
tensors in their order fill shards up to a size; what shares a storage is in one shard and counts once; one that is
larger than a shard has its own; a single shard needs no index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ckpt_cli.files.places import exists, join
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.verify import verify_new
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint

Create = Callable[[str], LocalFile | None]
"""Makes an empty file of a name in the new folder; None where it is only to be measured."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a set."""

    name: str
    tensors: Sequence[Tensor]


@dataclass(slots=True)
class _Filling:
    """A shard that is not full yet."""

    nbytes: int = 0
    tensors: list[Tensor] = field(default_factory=list)


def storage_nbytes(tensor: Tensor) -> int:
    """Bytes of what a tensor lies in, which is what huggingface_hub counts (`get_torch_storage_size`)."""
    return tensor.storage.nbytes if tensor.storage is not None else 0


def split(tensors: Sequence[Tensor], most: int, pattern: str) -> list[Shard]:
    """The shards of some tensors, each of `most` bytes where it has more than one storage."""
    closed: list[_Filling] = []
    current = _Filling()
    places: dict[Storage | None, _Filling] = {}
    for tensor in tensors:
        known = places.get(tensor.storage)
        if known is not None:
            known.tensors.append(tensor)
            continue
        nbytes = storage_nbytes(tensor)
        if nbytes > most:
            shard = _Filling()
            closed.append(shard)
        else:
            if current.nbytes + nbytes > most:
                closed.append(current)
                current = _Filling()
            shard = current
        shard.tensors.append(tensor)
        shard.nbytes += nbytes
        places[tensor.storage] = shard
    filled = [shard for shard in (*closed, current) if shard.tensors]
    if len(filled) <= 1:
        return [Shard(pattern.format(suffix=""), tensors)]
    names = (pattern.format(suffix=f"-{number:05d}-of-{len(filled):05d}") for number in range(1, len(filled) + 1))
    places_of = {id(tensor): place for place, tensor in enumerate(tensors)}
    return [
        Shard(name, sorted(shard.tensors, key=lambda tensor: places_of[id(tensor)]))
        for name, shard in zip(names, filled, strict=True)
    ]


def write_index(
    new: NewCheckpoint,
    shards: Sequence[Shard],
    dropped: Mapping[str, str],
    notes: Mapping[str, object],
    target: LocalFile | None,
) -> int:
    """Write the index of some shards: `total_size` counts what shares a storage once, as huggingface_hub does.

    Returns its bytes; without a target it only measures.
    """
    sizes = {tensor.storage: storage_nbytes(tensor) for tensor in new.tensors}
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors if tensor.name not in dropped}
    index = {"metadata": {"total_size": sum(sizes.values()), **notes}, "weight_map": weight_map}
    raw = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    if target is not None:
        write_all(target.fd, raw, 0)
    return len(raw)


def index_name(pattern: str) -> str:
    """What the index of a set is called."""
    return f"{pattern.format(suffix='')}.index.json"


def verify_set(new: NewCheckpoint, folder: str, pattern: str) -> None:
    """Read a new set back as a whole, or its single file, and compare it with what was meant."""
    index, single = (join(folder, name) for name in (index_name(pattern), pattern.format(suffix="")))
    verify_new(new.tensors, index if exists(index) else single, in_order=False)
