"""Percentiles and magnitudes of very many numbers in one pass: counts of the numbers by their leading bits.

A number is counted as the first 11 bits of its significand, in the middle of the numbers that begin so. So bfloat16,
float16, float8 and integers of up to 11 bits are exact; any other number is off by 2⁻¹¹ of itself, 0.05 %, at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

PERCENTS = (1, 50, 99)
"""The percentiles that are asked for."""

_BARS = 16
"""Bars of a histogram of magnitudes, at most."""

_DROPPED = 13
"""Bits of a float32 that are not looked at."""

_LEAST = 2.0**-126
"""The least magnitude of a float32 with all its bits."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Finite numbers, in order, each with how often it is there."""

    values: Array
    counts: Array


@dataclass(frozen=True, slots=True)
class Spread:
    """What a sketch says."""

    percentiles: tuple[float, ...] = ()
    """Those of `PERCENTS`, between two numbers in proportion, as numpy has them; none if there are no numbers."""
    edges: Sequence[float] = ()
    """Of the histogram of magnitudes: powers of two, one more than there are counts. Zeros are in no bar."""
    counts: Sequence[int] = ()


def sketch_of(values: Array) -> Sketch:
    """Return the sketch of the finite ones of some real numbers."""
    import numpy as np

    with np.errstate(all="ignore"):
        narrow = values if values.dtype == np.float32 else values.astype(np.float32)
        if narrow is not values and not _is_faithful(values, narrow):
            return _of_wide(values.astype(np.float64))
        bits = narrow.view(np.uint32)
        counts = np.bincount(bits >> _DROPPED)
        codes = np.flatnonzero(counts).astype(np.uint32)
        middle = 1 << (_DROPPED - 1) if bool((bits & ((1 << _DROPPED) - 1)).any()) else 0
        found = ((codes << _DROPPED) + np.uint32(middle)).view(np.float32).astype(np.float64)
        found[codes << 1 == 0] = 0.0  # tiny numbers of either sign are counted as zero
        return _ordered(found, counts[codes])


def _is_faithful(values: Array, narrow: Array) -> bool:
    """True if float32 has the numbers with the bits that are looked at."""
    import numpy as np

    wide = values.astype(np.float64)
    lost = (np.isinf(narrow) != np.isinf(wide)) | ((np.abs(narrow) < _LEAST) & (wide != 0))
    return not bool(lost.any())


def _of_wide(values: Array) -> Sketch:
    """Return the sketch of float64 numbers, some of which are beyond float32."""
    import numpy as np

    one, dropped = np.uint64(1), np.uint64(_DROPPED + 29)
    bits = values.view(np.uint64)
    middle = one << (dropped - one) if bool((bits & ((one << dropped) - one)).any()) else np.uint64(0)
    codes, counts = np.unique(bits >> dropped, return_counts=True)
    found = ((codes << dropped) + middle).view(np.float64)
    found[codes << one == 0] = 0.0
    return _ordered(found, counts)


def _ordered(values: Array, counts: Array) -> Sketch:
    import numpy as np

    finite = np.isfinite(values)
    found, places = np.unique(values[finite], return_inverse=True)
    sums = np.zeros(found.size, np.int64)
    np.add.at(sums, places, counts[finite])
    return Sketch(found, sums)


def counted(weights: Sequence[tuple[float, int]]) -> Sketch:
    """Return the sketch of numbers, each given with how often it is there."""
    import numpy as np

    values = np.array([value for value, _ in weights], np.float64)
    return _ordered(values, np.array([count for _, count in weights], np.int64))


def both(a: Sketch | None, b: Sketch | None) -> Sketch | None:
    """Return the sketch of two runs of numbers together; None stands for no numbers."""
    import numpy as np

    if a is None or b is None:
        return b if a is None else a
    return _ordered(np.concatenate([a.values, b.values]), np.concatenate([a.counts, b.counts]))


def spread_of(sketch: Sketch | None) -> Spread:
    """Return the percentiles and the histogram of magnitudes."""
    import numpy as np

    if sketch is None or not sketch.values.size:
        return Spread()
    reached = np.cumsum(sketch.counts)
    last = int(reached[-1]) - 1

    def at(place: int) -> float:
        return float(sketch.values[np.searchsorted(reached, place, side="right")])

    percentiles = []
    for percent in PERCENTS:
        place, rest = divmod(last * percent, 100)
        low = at(place)
        percentiles.append(low + (at(min(place + 1, last)) - low) * (rest / 100) if rest else low)
    return Spread(tuple(percentiles), *_magnitudes(sketch))


def _magnitudes(sketch: Sketch) -> tuple[list[float], list[int]]:
    """Return the edges and counts of bars that are equally many powers of two wide."""
    import numpy as np

    some = sketch.values != 0
    if not some.any():
        return [], []
    powers = np.frexp(np.abs(sketch.values[some]))[1] - 1
    low, high = int(powers.min()), int(powers.max())
    width = -(-(high + 1 - low) // _BARS)
    bars = -(-(high + 1 - low) // width)
    counts = np.zeros(bars, np.int64)
    np.add.at(counts, (powers - low) // width, sketch.counts[some])
    edges = [float(np.ldexp(1.0, min(low + width * bar, 1024))) for bar in range(bars + 1)]
    return edges, counts.tolist()
