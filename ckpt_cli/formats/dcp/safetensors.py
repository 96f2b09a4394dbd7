"""Safetensors files with chunks of tensors, as torch.distributed.checkpoint's HuggingFaceStorageWriter saves them.

With `save_distributed`, each rank writes `shard-RANK-model-N-of-M.safetensors`, and nothing says which tensor is where
but each file's own metadata: `DCP_SHARDING_INFO` has the offsets of its chunks (hf_storage.py and _hf_utils.py there).
A tensor is as large as its chunks reach, as HuggingFaceStorageReader takes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, UnknownFormatError, about
from ckpt_cli.files.open import Opener, closed_on_error
from ckpt_cli.files.places import join
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.dcp.boxes import Box, Chunks
from ckpt_cli.formats.dcp.container import ChunkedTensor, Composed, Stored
from ckpt_cli.formats.safetensors.read import read_part
from ckpt_cli.formats.signatures import documented
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, contiguous_stride

if TYPE_CHECKING:
    from ckpt_cli.formats.sharded.read import ReadOne

NAME = "dcp"

_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
INFO = "DCP_SHARDING_INFO"
"""The key in the metadata of each file under which the places of its chunks are."""

_Chunk = tuple[Box, Stored, Tensor]


def read_folder(path: str, names: Sequence[str], opener: Opener, _read_one: ReadOne) -> Checkpoint:
    """Open the files of all ranks as one checkpoint: their headers are read."""
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if not shards:
        raise UnknownFormatError(
            "a folder of safetensors called shard-… that torch.distributed.checkpoint did not write",
            path=path,
            hint="name one of them",
        )
    if len(shards) > limits.SHARDS:
        raise LimitError(f"it has {len(shards)} shards", path=path)
    files = opener.open_all([join(path, name) for name in shards])
    with closed_on_error(files):
        found: dict[str, list[_Chunk]] = {}
        for file in documented(files):
            for name, chunk in _chunks(file):
                found.setdefault(name, []).append(chunk)
        container = Composed(files, lambda _: None)
        with about(path):
            tensors = [_tensor(name, chunks, container) for name, chunks in found.items()]
    return Checkpoint(
        path=path,
        format=NAME,
        entries=tensors,
        container=container,
        version=f"safetensors of torch.distributed.checkpoint, not consolidated, {len(files)} shards",
        top_level=list(dict.fromkeys(name.partition(".")[0] for name in found)),
        is_set=True,
    )


def _chunks(file: SourceFile) -> list[tuple[str, _Chunk]]:
    """The chunks in one file, by the names of their tensors."""
    _, tensors, metadata = read_part(file)
    with about(file.path):
        info = sharding_of(metadata.get(INFO))
        found: list[tuple[str, _Chunk]] = []
        for tensor in tensors:
            shape = tensor.shape or ()
            box = Box(_offsets(tensor.name, info, len(shape)), shape)
            if tensor.storage is not None:
                found.append((tensor.name, (box, Stored(tensor.storage, 0, tensor.stride), tensor)))
        return found


def sharding_of(text: str | None) -> dict[str, Any]:
    """Return `{name: {"saved_offsets": […]}}`; nothing where the file has whole tensors."""
    if text is None:
        return {}
    try:
        info = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError(f"its {INFO} is not JSON") from None
    if not isinstance(info, dict):
        raise MalformedError(f"its {INFO} does not map names to offsets")
    return info


def _offsets(name: str, info: dict[str, Any], dims: int) -> tuple[int, ...]:
    if not info:
        return (0,) * dims
    said = info.get(name)
    offsets = said.get("saved_offsets") if isinstance(said, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != dims
        or not all(type(each) is int and 0 <= each < 1 << 63 for each in offsets)
    ):
        raise MalformedError(f"tensor {name!r}: its {INFO} does not say where in the tensor its chunk is")
    return tuple(offsets)


def _tensor(name: str, chunks: list[_Chunk], container: Composed) -> Tensor:
    """A tensor of its chunks."""
    chunks.sort(key=lambda chunk: (chunk[0].offsets, chunk[0].sizes))
    dtype = chunks[0][2].dtype
    dims = len(chunks[0][0].sizes)
    if any(tensor.dtype is not dtype or len(box.sizes) != dims for box, _, tensor in chunks):
        raise MalformedError(f"tensor {name!r} has chunks of several dtypes or numbers of dimensions")
    boxes = [box for box, _, _ in chunks]
    shape = tuple(max(box.offsets[dim] + box.sizes[dim] for box in boxes) for dim in range(dims))
    chunked = ChunkedTensor(name, dtype, Chunks(shape, boxes), lambda number: chunks[number][1])
    nbytes = dtype.nbytes(chunked.chunks.numel)
    if nbytes >= 1 << 63:
        raise MalformedError(f"tensor {name!r} has more bytes than 64 bits can count")
    if dtype.bits % 8:
        return Tensor(name, dtype, shape, contiguous_stride(shape), layout="wrapper")
    storage = container.storage(name, nbytes, chunked, composed=len(boxes) > 1)
    return Tensor(name, dtype, shape, contiguous_stride(shape), storage)
