"""Summarize numbers: least, greatest, mean, spread, counts; chunk by chunk, and merged.

A chunk is summed around a number near its mean (a pivot), in float32 within rows of 512 and in float64 beyond, and
chunks merge as Chan, Golub and LeVeque do ("Updating formulae and a pairwise algorithm for computing sample
variances"), so that a mean far larger than the spread costs no digits. Merging in a fixed order gives the same bits
whoever summed the chunks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.sketch import Sketch, both
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BINS = 8
"""Bars of a histogram."""

_ROW = 512
"""Elements that are summed in their own precision before float64 takes over."""

_SMALL, _LARGE = 1e-15, 1e15
"""Between these, squares of float32 numbers and sums of them neither vanish nor overflow."""

_WORDS = 512
"""Words of eight truth values that are counted side by side."""

_LOCAL = threading.local()


@dataclass(frozen=True, slots=True)
class Moments:
    """The summary of a run of numbers; all but the counts of `nan` and `inf` is over the finite ones."""

    count: int = 0
    """Finite numbers."""
    nan: int = 0
    inf: int = 0
    """Numbers that are infinite, of either sign."""
    zeros: int = 0
    least: float | int | None = None
    """None where there is no finite number."""
    most: float | int | None = None
    pivot: float | int = 0
    """A number near the mean, exact however large."""
    offset: float = 0.0
    """The mean minus the pivot."""
    squares: float = 0.0
    """The sum of the squares of the distances from the mean."""
    below: tuple[int, ...] = ()
    """Counts of numbers less than each inner edge of the histogram, then than each edge in common with others."""
    sketch: Sketch | None = None
    """Of the finite numbers, where it was asked for."""

    @property
    def outlier(self) -> float:
        """Return the greatest magnitude as a multiple of the standard deviation; NaN if either is missing or 0."""
        if self.least is None or self.most is None or not self.std > 0:
            return math.nan
        return max(abs(self.least), abs(self.most)) / self.std

    @property
    def mean(self) -> float:
        """Return the mean; NaN of no numbers."""
        return float(self.pivot + self.offset) if self.count else math.nan

    @property
    def std(self) -> float:
        """Return the standard deviation with n - 1, as torch.std; NaN of fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def norm(self) -> float:
        """Return the square root of the sum of squares."""
        return math.sqrt(self.squares + self.count * self.mean * self.mean) if self.count else 0.0


def merged(a: Moments, b: Moments) -> Moments:
    """Return the moments of two runs together."""
    if not a.count or not b.count:
        return replace(a if a.count else b, nan=a.nan + b.nan, inf=a.inf + b.inf)
    count = a.count + b.count
    apart = (b.pivot - a.pivot) + (b.offset - a.offset)
    share = b.count / count
    pivot, offset = a.pivot, a.offset + apart * share
    if math.isinf(apart):  # the distance is beyond float64, the mean is not
        pivot, offset = 0, a.mean * (a.count / count) + b.mean * share
    return Moments(
        count,
        a.nan + b.nan,
        a.inf + b.inf,
        a.zeros + b.zeros,
        min(_ends(a)[0], _ends(b)[0]),
        max(_ends(a)[1], _ends(b)[1]),
        pivot,
        offset,
        a.squares + b.squares + apart * apart * a.count * share,
        tuple(map(sum, zip(a.below, b.below, strict=True))) if a.below and b.below else (),
        both(a.sketch, b.sketch),
    )


def _ends(found: Moments) -> tuple[float | int, float | int]:
    """Return the least and the greatest of what has finite numbers."""
    assert found.least is not None
    assert found.most is not None
    return found.least, found.most


@dataclass(frozen=True, slots=True)
class BinPlan:
    """Decisions from a sample, made before a tensor is summarized."""

    edges: tuple[float | int, ...] = ()
    """The inner edges of the histogram, values of the dtype that is summed."""
    pivot: float | int = 0
    """A number near the mean where that is far from 0 as the spread goes, else 0."""
    shared: tuple[float | int, ...] = ()
    """Edges that it has in common with other tensors, whose counts come after those of its own."""

    def sharing(self, edges: Sequence[float], *, whole: bool) -> BinPlan:
        """The same with edges in common; those of whole numbers are whole."""
        return replace(self, shared=tuple(map(math.ceil, edges) if whole else edges))


def plan_of(sample: Array) -> BinPlan:
    """Edges and pivot from some of the numbers: bars of one width over all but the outermost of them."""
    import numpy as np

    if sample.dtype.kind == "f":
        sample = sample[np.isfinite(sample)]
    if not sample.size:
        return BinPlan()
    ordered = np.sort(sample)
    low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
    if sample.dtype.kind != "f":
        return BinPlan(_whole_edges(int(low), int(high)), int(ordered[len(ordered) // 2]))
    with np.errstate(all="ignore"):
        wide = ordered.astype(np.float64)
        mean, std = float(wide.mean()), float(wide.std())
        pivot = float(sample.dtype.type(mean)) if abs(mean) > std / 4 and math.isfinite(mean) else 0.0
        if low == high:
            return BinPlan((float(low), float(np.nextafter(low, np.inf, dtype=sample.dtype))), pivot)
        spots = float(low) + (float(high) / BINS - float(low) / BINS) * np.arange(1, BINS)
        edges = sorted({float(edge) for edge in spots.astype(sample.dtype) if np.isfinite(edge)})
    return BinPlan(tuple(edges), pivot)


def shared_edges(samples: Sequence[tuple[Array, int]]) -> tuple[float, ...]:
    """Return the inner edges of one histogram over several tensors, from a sample of each and its number of elements.

    They are values of float32, which every tensor's numbers compare with exactly.
    """
    import numpy as np

    finite = [(values[np.isfinite(values)].astype(np.float64), numel) for values, numel in samples]
    finite = [(values, numel) for values, numel in finite if values.size]
    if not finite:
        return ()
    values = np.concatenate([values for values, _ in finite])
    weights = np.concatenate([np.full(values.size, numel / values.size) for values, numel in finite])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    low, high = (float(values[order[np.searchsorted(reached, share)]]) for share in (0.005, 0.995))
    with np.errstate(all="ignore"):
        spots = low + (high / BINS - low / BINS) * np.arange(1, BINS) if low < high else np.array([low])
        return tuple(sorted({float(edge) for edge in spots.astype(np.float32) if np.isfinite(edge)}))


def _whole_edges(low: int, high: int) -> tuple[int, ...]:
    if low == high:
        return low, low + 1
    return tuple(sorted({low - (low - high) * bar // BINS for bar in range(1, BINS)} - {low}))


def moments(values: Array, plan: BinPlan) -> Moments:
    """Return the moments of a chunk of floats or integers in the machine's own byte order."""
    import numpy as np

    if not values.size:
        return Moments()
    with np.errstate(all="ignore"):
        least, most = values.min(), values.max()
        nan = inf = 0
        if values.dtype.kind == "f" and not (np.isfinite(least) and np.isfinite(most)):
            nan = int(np.count_nonzero(np.isnan(values)))
            finite = values[np.isfinite(values)]
            inf = values.size - nan - finite.size
            if not finite.size:
                return Moments(nan=nan, inf=inf)
            values, least, most = finite, finite.min(), finite.max()
        offset, squares = _spread(values, plan.pivot, least, most)
        zeros, below = _places(values, (*plan.edges, *plan.shared), least, most)
        ends = least.item(), most.item()
        return Moments(values.size, nan, inf, zeros, *ends, plan.pivot, offset, squares, below)


def _places(values: Array, edges: Sequence[float | int], least: Any, most: Any) -> tuple[int, tuple[int, ...]]:
    """Return how many are zero, and how many are less than each edge."""
    import numpy as np

    asked = [edge for edge in edges if least < edge <= most]
    padded = _flags(len(asked) + 1, values.size)
    flags = padded[:, : values.size]
    np.equal(values, 0, out=flags[-1])
    if asked:  # all by one call, as threads wait for each other at every one
        edge = np.promote_types(values.dtype, np.float32) if values.dtype.kind == "f" else values.dtype
        np.less(values, np.array(asked, edge)[:, None], out=flags[:-1])
    *counts, zeros = _count(padded, values.size)
    found = dict(zip(asked, counts, strict=True))
    return zeros, tuple(found.get(edge, values.size if edge > most else 0) for edge in edges)


def _count(flags: Array, count: int) -> list[int]:
    """Return how many of the first `count` of each row are true, eight at a time where they are many."""
    import numpy as np

    rows = len(flags)
    width = _WORDS * max(-(-count // (8 * _WORDS * 255)), 1)
    whole = count // (8 * width) * 8 * width
    words = flags.view(np.uint64)[:, : whole // 8].reshape(rows, -1, width)
    sums = np.add.reduce(words, axis=1)  # of 255 at most, so that a byte holds it
    found = sums.view(np.uint8).reshape(rows, -1).sum(axis=1)
    return [int(some) + int(np.count_nonzero(rest)) for some, rest in zip(found, flags[:, whole:count], strict=True)]


def _spread(values: Array, pivot: float | int, least: Any, most: Any) -> tuple[float, float]:
    """Return the mean minus the pivot, and the sum of the squares of the distances from the mean."""
    import numpy as np

    if values.dtype.kind != "f":
        return _spread_of_integers(values, int(pivot), int(least), int(most))
    low, high = float(least) - pivot, float(most) - pivot
    if least == most:
        return low, 0.0
    reach = max(abs(low), abs(high))
    if values.dtype != np.float32 or _SMALL < reach < _LARGE:
        near = values
        if pivot:
            near = np.subtract(values, values.dtype.type(pivot), out=_numbers(values.size, values.dtype))
        total, squares = sums(near)
        lost = total * total / values.size
        if lost <= 0.9 * squares < math.inf:
            return total / values.size, squares - lost
    mean, squares = _spread_in_two_passes(values)
    return mean - pivot, squares


def _spread_in_two_passes(values: Array) -> tuple[float, float]:
    """Return the mean and that sum, in float64 around the mean itself, for what is far from the pivot, tiny or huge."""
    import numpy as np

    wide = values.astype(np.float64)
    mean = float(wide.mean())
    if not math.isfinite(mean):  # the sum is beyond float64, the mean is not
        mean = float((wide / values.size).sum())
    wide -= mean
    total, squares = sums(wide)
    if math.isinf(squares):  # as torch has it of numbers whose squares are beyond float64
        return mean, math.inf
    return mean + total / values.size, max(squares - total * total / values.size, 0.0)


def _spread_of_integers(values: Array, pivot: int, least: int, most: int) -> tuple[float, float]:
    """Return the same of integers, whose distances from the pivot are exact as long as 64 bits hold them."""
    import numpy as np

    if values.dtype.itemsize == 8 and least - pivot >= -(2**63) and most - pivot < 2**63:
        moved = (values.view(np.uint64) - np.uint64(pivot % 2**64)).view(np.int64).astype(np.float64)
    else:
        moved = values.astype(np.float64)
        moved -= float(pivot)
    mean = float(moved.mean())
    moved -= mean
    total, squares = sums(moved)
    return mean + total / values.size, max(squares - total * total / values.size, 0.0)


def sums(values: Array) -> tuple[float, float]:
    """Return the sum and the sum of squares: float32 within rows, float64 over them."""
    import numpy as np

    whole = values.size // _ROW * _ROW
    rows, rest = values[:whole].reshape(-1, _ROW), values[whole:].astype(np.float64)
    total = float(_dots(rows, np.ones(_ROW, rows.dtype)).sum(dtype=np.float64)) + float(rest.sum())
    squares = float(_dots(rows, rows).sum(dtype=np.float64)) + float((rest * rest).sum())
    return total, squares


def _dots(rows: Array, others: Array) -> Array:
    """Each row times another; not by one call of BLAS, which would start threads of its own."""
    import numpy as np

    if hasattr(np, "vecdot"):  # numpy 2
        return np.asarray(np.vecdot(rows, others))
    return np.asarray(np.einsum("ij,j->i" if others.ndim == 1 else "ij,ij->i", rows, others))


def _flags(rows: int, count: int) -> Array:
    """Return room for rows of `count` truth values or a few more, each thread's own; rows begin at whole words."""
    import numpy as np

    padded = count + -count % 8
    return _room("flags", rows * padded, np.dtype(bool)).reshape(rows, padded)


def _numbers(count: int, dtype: Any) -> Array:
    """Room for numbers, each thread's own."""
    return _room(f"numbers {dtype}", count, dtype)


def _room(what: str, count: int, dtype: Any) -> Array:
    import numpy as np

    room: Array | None = _LOCAL.__dict__.get(what)
    if room is None or room.size < count:
        room = _LOCAL.__dict__[what] = np.empty(count, dtype)
    return room[:count]


def room(what: str, count: int, dtype: Any) -> Array:
    """Room for an intermediate of a chunk, each thread's own and valid until it asks for the same again."""
    return _room(what, count, dtype)
