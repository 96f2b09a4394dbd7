"""Find out whether strided regions of one storage share bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.model.checkpoint import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


def regions_meet(a: Tensor, b: Tensor, of_a: Region | None = None) -> bool:
    """Return True if two views of one storage, or a region of the first and the second, have a byte in common.

    Cases that numpy cannot decide within `limits.VIEW_STEPS` count as yes.
    """
    import numpy as np

    if a.dtype.elements > 1 or b.dtype.elements > 1:  # elements that share bytes with their neighbours
        return True
    base = np.empty(1, np.uint8)
    try:
        first, second = _ghost(base, a, of_a or Region.of(a)), _ghost(base, b, Region.of(b))
        return np.shares_memory(first, second, max_work=limits.VIEW_STEPS)  # type: ignore[arg-type]  # numpy's stub knows -1 and 0
    except (np.exceptions.TooHardError, OverflowError, ValueError):
        return True


def _ghost(base: NDArray[Any], tensor: Tensor, region: Region) -> NDArray[Any]:
    """Return an array with the region's addresses relative to `base`, for numpy to compare.

    It is made of an interface, not of a buffer, as its addresses lie outside of `base`; its elements are never touched.
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
