"""New folders of shards, split and named as huggingface_hub does it, with the index that says what is where.

huggingface_hub/serialization/_base.py (`split_state_dict_into_shards_factory`) and _torch.py (`save_torch_state_dict`):
tensors in their order fill shards up to a size; what shares a storage is in one shard and counts once; one that is
larger than a shard has its own; a single shard needs no index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import field, replace
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import Progress
from ckpt_cli.files.places import exists, join, open_file
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import write_all
from ckpt_cli.formats.safetensors import write as safetensors
from ckpt_cli.formats.torch_zip import write as torch_zip
from ckpt_cli.formats.writing import OpenCopy, not_read_back, open_with_safetensors, verify_new
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint

if TYPE_CHECKING:
    from ckpt_cli.files.new_folder import Verifier

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
    """Return the name of a set's index."""
    return f"{pattern.format(suffix='')}.index.json"


class SafetensorsShards:
    """`model-00001-of-00002.safetensors` and so on, and `model.safetensors.index.json`."""

    pattern = "model{suffix}.safetensors"

    def spelled(self, dtype: DType) -> str | None:
        """Return safetensors' spelling of a dtype; None for one that it does not have."""
        return safetensors.spelled(dtype)

    def write_folder(self, new: NewCheckpoint, create: Create, progress: Progress) -> int:
        """Write every shard and the index: each shard has the strings, which readers look for there.

        With several shards, ties and what the old index noted are in the index. Returns their bytes.
        """
        aliases = safetensors.aliases_among(new.tensors, new.metadata)
        shards = split(new.tensors, new.max_shard, self.pattern)
        nbytes = 0
        if len(shards) > 1:
            own = {key: value for key, value in new.metadata.items() if key not in new.index}
            _refuse_too_many(own, len(shards))
            notes = {**new.index, **safetensors.ties_of(new, aliases)}
            nbytes += write_index(new, shards, aliases, notes, create(index_name(self.pattern)))
        else:
            own = safetensors.metadata_with(new, aliases)
        for shard in shards:
            part = new.part(shard.tensors, {})
            nbytes += safetensors.write_some(part, aliases, own, create(shard.name), progress)
        return nbytes

    def verify_folder(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> None:
        """Open every shard with the reference reader, and the set with our own."""
        for shard in split(new.tensors, new.max_shard, self.pattern):
            open_with_safetensors(join(folder, shard.name))
        verify_set(new, folder, self.pattern, open_copy)

    def verifier(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> Verifier:
        """Return what opens a shard with the reference reader and our own."""
        shards = split(new.tensors, new.max_shard, self.pattern)
        dropped = safetensors.aliases_among(new.tensors, new.metadata) if len(shards) > 1 else {}
        verify = _verifier(shards, dropped, folder, open_copy)

        def verify_too(name: str) -> None:
            if name != index_name(self.pattern):
                open_with_safetensors(join(folder, name))
            verify(name)

        return verify_too


class TorchShards:
    """`pytorch_model-00001-of-00002.bin` and so on, and `pytorch_model.bin.index.json`."""

    pattern = "pytorch_model{suffix}.bin"

    def spelled(self, dtype: DType) -> str | None:
        """Return torch's spelling of a dtype; None for one that it does not have."""
        return torch_zip.spelled(dtype)

    def write_folder(self, new: NewCheckpoint, create: Create, progress: Progress) -> int:
        """Write every shard and the index; returns their bytes."""
        nbytes = 0
        shards = split(new.tensors, new.max_shard, self.pattern)
        if len(shards) > 1:
            nbytes += write_index(new, shards, {}, new.metadata, create(index_name(self.pattern)))
        for shard in shards:
            part = replace(new.part(shard.tensors, {}), stem=shard.name.removesuffix(".bin"))
            nbytes += torch_zip.write(part, create(shard.name), progress)
        return nbytes

    def verify_folder(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> None:
        """Open the set with our own reader."""
        verify_set(new, folder, self.pattern, open_copy)

    def verifier(self, new: NewCheckpoint, folder: str, open_copy: OpenCopy) -> Verifier:
        """Return what opens a shard with our own reader."""
        return _verifier(split(new.tensors, new.max_shard, self.pattern), {}, folder, open_copy)


SAFETENSORS, TORCH = SafetensorsShards(), TorchShards()
"""The writers of the two kinds of sets."""


def _refuse_too_many(strings: Mapping[str, str], shards: int) -> None:
    """Raise where the same strings in each shard would come to far more bytes than any honest ones."""
    characters = sum(len(key) + len(value) for key, value in strings.items())
    if characters * shards > 8 * limits.METADATA:
        raise RefusedError(
            f"its metadata of {characters:,} characters would stand in each of {shards:,} shards",
            hint="--max-shard with a larger size makes fewer shards",
        )


def _verifier(shards: Sequence[Shard], dropped: Mapping[str, str], folder: str, open_copy: OpenCopy) -> Verifier:
    """Return what compares a shard with what was meant, and the index with the shards."""
    by_name = {shard.name: [tensor for tensor in shard.tensors if tensor.name not in dropped] for shard in shards}
    places = {tensor.name: name for name, tensors in by_name.items() for tensor in tensors}

    def verify(name: str) -> None:
        path = join(folder, name)
        if name in by_name:
            verify_new(by_name[name], path, open_copy, in_order=False)
            return
        with closing(open_file(path)) as index:
            if json.loads(index.read(0, index.size))["weight_map"] != places:
                raise not_read_back("its index has other names")

    return verify


def verify_set(new: NewCheckpoint, folder: str, pattern: str, open_copy: OpenCopy) -> None:
    """Read a new set back as a whole, or its single file, and compare it with what was meant."""
    index, single = (join(folder, name) for name in (index_name(pattern), pattern.format(suffix="")))
    verify_new(new.tensors, index if exists(index) else single, open_copy, in_order=False)
