"""The distance between two runs of values: the sum of the squares of their differences, and a chunk's own moments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.moments import BinPlan, Moments, moments, room, sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_SAMPLE = 256
"""Elements of a chunk from which the number near its mean is taken."""

_LEAST = 1e-28
"""The mean square below which float32 may have lost some of the squares."""


def moments_of(values: Array) -> Moments:
    """Return the moments of a chunk, around a number near its own mean; without a histogram."""
    return moments(values, BinPlan(pivot=_pivot(values)))


def _pivot(values: Array) -> float | int:
    import numpy as np

    if not values.size:
        return 0
    sample = values[:: max(values.size // _SAMPLE, 1)]
    if sample.dtype.kind != "f":
        return int(sample[len(sample) // 2])
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0
    with np.errstate(all="ignore"):
        mean, std = float(sample.mean(dtype=np.float64)), float(sample.std(dtype=np.float64))
        return float(values.dtype.type(mean)) if abs(mean) > std / 4 and math.isfinite(mean) else 0.0


def moved(a: Array, b: Array) -> float:
    """Return the sum of |b - a|² over the elements that are finite in both: flat values in the same order."""
    import numpy as np

    with np.errstate(all="ignore"):
        if a.dtype == np.float32 and b.dtype == np.float32:
            found = sums(np.subtract(b, a, out=room("moved", a.size, np.dtype(np.float32))))[1]
            if _LEAST * a.size <= found < math.inf:
                return found
        return _moved_widely(a, b)


def _moved_widely(a: Array, b: Array) -> float:
    """Return the same in float64, for what is tiny or huge, has NaN or infinities, or is not float32."""
    import numpy as np

    if "c" in (a.dtype.kind, b.dtype.kind):
        finite = np.isfinite(a) & np.isfinite(b)
        apart = np.abs(b[finite].astype(np.complex128) - a[finite].astype(np.complex128))
        return float((apart * apart).sum())
    if a.dtype.kind in "iu" and b.dtype.kind in "iu" and max(a.dtype.itemsize, b.dtype.itemsize) == 8:
        apart = _integers_apart(a, b)
    else:
        apart = b.astype(np.float64)
        np.subtract(apart, a, out=apart, dtype=np.float64, casting="unsafe")
    found = sums(apart)[1]
    if math.isfinite(found) or not {"f"} & {a.dtype.kind, b.dtype.kind}:
        return found
    finite = np.isfinite(a) & np.isfinite(b)
    apart = b[finite].astype(np.float64) - a[finite].astype(np.float64)
    return sums(apart)[1]


def _integers_apart(a: Array, b: Array) -> Array:
    """Return the distances of integers of 64 bits, exact up to 2⁵³ however large the integers are."""
    import numpy as np

    if a.dtype == b.dtype:
        low, high = np.minimum(a, b), np.maximum(a, b)
        return (high.view(np.uint64) - low.view(np.uint64)).astype(np.float64)
    return b.astype(np.float64) - a.astype(np.float64)
