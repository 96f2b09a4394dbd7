"""Overlap of strided regions, and equal tensors that are stored twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 8 << 20
"""Bytes read at a time."""


def regions_meet(a: Tensor, b: Tensor, of_a: Region | None = None) -> bool:
    """True if two views of one storage, or a region of the first and the second view, have a byte in common."""
    import numpy as np

    if a.dtype.bits % 8 or b.dtype.bits % 8:  # elements that share a byte with their neighbours
        return True
    base = np.empty(1, np.uint8)
    try:
        first, second = _ghost(base, a, of_a or Region.of(a)), _ghost(base, b, Region.of(b))
        return np.shares_memory(first, second, max_work=limits.VIEW_STEPS)  # type: ignore[arg-type]  # numpy's stub knows -1 and 0
    except (np.exceptions.TooHardError, OverflowError, ValueError):
        return True


def _ghost(base: NDArray[Any], tensor: Tensor, region: Region) -> NDArray[Any]:
    """Return an array with the region's addresses relative to `base`, whose elements are never touched.

    `numpy.shares_memory` solves exactly whether two strided views meet, but it takes arrays only. The interface lets an
    array claim addresses that are not in memory.
    """
    import numpy as np

    size = tensor.dtype.itemsize
    address = base.__array_interface__["data"][0] + region.offset * size
    strides = tuple(step * size for step in region.stride)
    interface = {
        "data": (address, False),
        "shape": region.shape,
        "strides": strides,
        "typestr": f"|V{size}",
        "version": 3,
    }
    return np.asarray(type("Ghost", (), {"__array_interface__": interface})())


def content_digest(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    """A digest of a tensor's stored elements in row-major order, read in bounded pieces."""
    import hashlib

    from ckpt_cli.arrays.codec import Codec, stored_of

    codec = Codec(tensor)
    digest = hashlib.blake2b(digest_size=32)
    region = Region.of(tensor)
    for part in row_pieces(region, max(_PIECE // tensor.dtype.itemsize, 1)):
        stored = stored_of(tensor, codec, region.at(part))
        digest.update(stored.tobytes())
        for file in checkpoint.container.files:
            file.forget()
    return digest.digest()


def row_pieces(region: Region, most: int) -> list[tuple[slice, ...]]:
    """Cut a region in row-major order into parts of at most about `most` elements."""
    parts: list[tuple[slice, ...]] = []
    whole = tuple(slice(0, size) for size in region.shape)
    pending = [whole] if region.numel else []
    while pending:
        part = pending.pop()
        sizes = [item.stop - item.start for item in part]
        count = 1
        for size in sizes:
            count *= size
        dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
        if count <= most or dim is None:
            parts.append(part)
            continue
        step = max(most // (count // sizes[dim]), 1)
        starts = range(part[dim].start, part[dim].stop, step)
        pending.extend(
            (*part[:dim], slice(at, min(at + step, part[dim].stop)), *part[dim + 1 :]) for at in reversed(starts)
        )
    return parts
