"""Distributed checkpoints as torch writes them, with changed metadata, and the values that `ckpt` reads and sets."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.formats import open_checkpoint

Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and sizes of a chunk."""


def values(path: Path, name: str = "w") -> torch.Tensor:
    """What `ckpt` reads."""
    checkpoint = open_checkpoint(str(path))
    (tensor,) = [tensor for tensor in checkpoint.tensors if tensor.name == name]
    found = torch.from_numpy(values_of(checkpoint, tensor).copy())
    checkpoint.close()
    return found


class Writer:
    """Writes one `.metadata` and one file of items, each as torch's classes and torch.save write them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: dict[str, Any] = {}
        self.stored: dict[MetadataIndex, _StorageInfo] = {}
        self.data = b""
        self.planner_data: Any = {}

    def item(self, value: object) -> _StorageInfo:
        """Where an object is saved from now on."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        info = _StorageInfo("__0_0.distcp", len(self.data), len(buffer.getvalue()))
        self.data += buffer.getvalue()
        return info

    def tensor(self, name: str, whole: torch.Tensor, cuts: list[Cut]) -> Writer:
        """Add a tensor in chunks."""
        chunks = []
        for offsets, sizes in cuts:
            box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
            self.stored[MetadataIndex(name, offsets)] = self.item(whole[box].clone())
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self.listed[name] = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
        return self

    def write(self) -> Path:
        """Write both files."""
        self.path.mkdir(exist_ok=True)
        meta = StorageMeta()
        metadata = Metadata(self.listed, self.planner_data, self.stored, meta, "1.0.0")
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata, 4))
        (self.path / "__0_0.distcp").write_bytes(self.data)
        return self.path


WHOLE = torch.arange(6 * 8 * 3, dtype=torch.float64).reshape(6, 8, 3)
QUARTERS: list[Cut] = [
    ((0, 0, 0), (4, 5, 3)), ((0, 5, 0), (4, 3, 3)), ((4, 0, 0), (2, 1, 3)), ((4, 1, 0), (2, 7, 3)),
]  # fmt: skip
CUTS: dict[str, list[Cut]] = {
    "one": [((0, 0, 0), (6, 8, 3))],
    "rows": [((0, 0, 0), (1, 8, 3)), ((1, 0, 0), (5, 8, 3))],
    "columns": [((0, 0, 0), (6, 3, 3)), ((0, 3, 0), (6, 5, 3))],
    "last": [((0, 0, 0), (6, 8, 1)), ((0, 0, 1), (6, 8, 2))],
    "quarters": QUARTERS,
    "empty": [*QUARTERS, ((6, 8, 3), (0, 0, 0))],
}
