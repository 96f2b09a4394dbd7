"""New safetensors files: wide elements first, so that all are aligned, but listed in the order that they had.

Of tied tensors one is written, the first in the order of names, as safetensors' `save_model` chooses it
(safetensors/torch.py, `_remove_duplicate_names`); the others are noted in the metadata as {dropped: kept}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.safetensors.read import ORDER, order_text
from ckpt_cli.formats.safetensors.rewrite import Item, as_header_spells, header_bytes, write_file
from ckpt_cli.formats.writing import OpenCopy, open_with_safetensors, verify_new
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint, tied_groups


def spelled(dtype: DType) -> str | None:
    """Return the spelling of a dtype in safetensors; None for one that it does not have."""
    return "F4" if dtype.name == "float4_e2m1fn_x2" else dtype.safetensors


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write one file, with all that its metadata has to say; returns its bytes. Without a target it only measures."""
    aliases = aliases_among(new.tensors, new.metadata)
    return write_some(new, aliases, metadata_with(new, aliases), target, progress)


def write_some(
    new: NewCheckpoint,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    target: LocalFile | None,
    progress: Progress,
) -> int:
    """Write the tensors that are no aliases, with the metadata as it is given; returns the bytes of the file."""
    items = [_item(tensor, new, place) for place, tensor in enumerate(new.tensors) if tensor.name not in aliases]
    items.sort(key=lambda item: -item.itemsize)
    return write_file(header_bytes(items, metadata), items, target, progress)


def metadata_with(new: NewCheckpoint, aliases: Mapping[str, str]) -> dict[str, str]:
    """The strings that come along, and the aliases with their places."""
    return {**new.metadata, **ties_of(new, aliases)}


def ties_of(new: NewCheckpoint, aliases: Mapping[str, str]) -> dict[str, str]:
    """The aliases, and their places among the other names."""
    order = {ORDER: order_text([tensor.name for tensor in new.tensors], aliases)} if aliases else {}
    return {**aliases, **order}


def aliases_among(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """{dropped: kept} of tied tensors; a name that is a key of the metadata already must be kept."""
    found: dict[str, str] = {}
    for group in tied_groups(tensors):
        if group[0].view is None:
            continue
        names = sorted(tensor.name for tensor in group)
        for tensor in group:
            if tensor.name != names[0] and tensor.name not in metadata and tensor.name not in ("format", ORDER):
                found[tensor.name] = names[0]
    return found


def _item(tensor: Tensor, new: NewCheckpoint, place: int) -> Item:
    dtype, shape = as_header_spells(tensor)
    if dtype is None:
        raise UnsupportedError(f"safetensors has no dtype for tensor {tensor.name!r}, which is {tensor.dtype}")
    return Item(tensor.name, dtype, shape, new.content(tensor), max(tensor.dtype.bits // 8, 1), {}, place)


def verify(new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:
    """Open the new file with the reference reader and with our own, and compare it with what was meant."""
    open_with_safetensors(path)
    verify_new(new.tensors, path, open_copy)
