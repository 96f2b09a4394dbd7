"""Compare two runs of values: how many differ, by how much, and where first.

Elements of the same bits are equal, NaN among them. Others are when `|a - b| <= atol + rtol * |b|`, as in
torch.isclose, which makes both zeros equal; NaN of other bits are equal only if asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.moments import room
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Differences that count as equal."""

    atol: float = 0.0
    rtol: float = 0.0
    equal_nan: bool = False
    """True if NaN of different bits, or of different dtypes, are equal."""
    first: int = 3
    """The number of first differences that are wanted."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the places where both are finite."""

    count: int = 0
    distance: float = 0.0
    """Of |a - b|."""
    squared: float = 0.0
    """Of (a - b)²."""
    squared_a: float = 0.0
    squared_b: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Return the sums over both runs."""
        return Sums(
            self.count + other.count,
            self.distance + other.distance,
            self.squared + other.squared,
            self.squared_a + other.squared_a,
            self.squared_b + other.squared_b,
        )

    @property
    def mean_abs(self) -> float | None:
        """The mean of |a - b|; None where no place is finite in both."""
        return self.distance / self.count if self.count else None

    @property
    def relative_l2(self) -> float | None:
        """The norm of a - b divided by that of b; infinite where only b is 0 everywhere."""
        if not self.count:
            return None
        if not self.squared_b:
            return math.inf if self.squared else 0.0
        return math.sqrt(self.squared / self.squared_b)

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between both, as vectors; None where one is 0 everywhere.

        By the law of cosines, which is exact where both are close.
        """
        lengths = math.sqrt(self.squared_a) * math.sqrt(self.squared_b)
        if not lengths:
            return None
        apart = self.squared - (math.sqrt(self.squared_a) - math.sqrt(self.squared_b)) ** 2
        return min(max(1 - apart / (2 * lengths), -1.0), 1.0)


@dataclass(frozen=True, slots=True)
class Apart:
    """The differences of two runs of values."""

    differing: int = 0
    """Elements that are not equal."""
    max_abs: float | int = 0
    """The greatest |a - b|, whether it counts as a difference or not; NaN are left out."""
    max_rel: float = 0.0
    """The greatest |a - b| / |b|; infinite where only b is 0."""
    sums: Sums = Sums()
    first: tuple[tuple[int, object, object], ...] = ()
    """The numbers of the first elements that differ in row-major order, and their values."""


def together(a: Apart, b: Apart, first: int) -> Apart:
    """Return how far two runs are apart, `b` after `a`."""
    return Apart(
        a.differing + b.differing,
        max(a.max_abs, b.max_abs),
        max(a.max_rel, b.max_rel),
        a.sums.plus(b.sums),
        (a.first + b.first)[:first],
    )


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Return True if two runs have the same bytes."""
    import numpy as np

    if len(a) != len(b):
        return False
    whole = len(a) // 8 * 8
    words_a, words_b = np.frombuffer(a[:whole], np.uint64), np.frombuffer(b[:whole], np.uint64)
    if not (words_a[:_BEGINNING] == words_b[:_BEGINNING]).all():  # as of nearly all that differ
        return False
    return bool((words_a == words_b).all()) and a[whole:] == b[whole:]


_BEGINNING = 512
"""Words that are compared before all of them are."""


def apart(a: Array, b: Array, same: Callable[[], Array] | None, begin: int, tolerance: Tolerance) -> Apart:
    """Compare decoded runs whose first element has the number `begin`; `same` returns which have the same bits."""
    import numpy as np

    with np.errstate(all="ignore"):
        a, b = _alike(a, b)
        if a.dtype.kind in "iu":
            return _integers_apart(a, b, begin, tolerance)
        distance = _distance(a, b)
        greatest = distance.max()
        if not np.isfinite(greatest):
            return _with_odd_ones(a, b, same, begin, tolerance)
        size = np.abs(b, out=_like("size", distance))
        sums = _sums(a, b, distance, float(greatest))
        differs = _beyond(a, b, distance, size, tolerance)
        count = int(np.count_nonzero(differs))
        relative = np.divide(distance, size, out=size)
        rel = relative.max()
        if np.isnan(rel):  # 0 / 0
            rel = np.fmax.reduce(relative)
        first = _first(differs, a, b, begin, tolerance.first) if count else ()
        return Apart(count, float(greatest), 0.0 if np.isnan(rel) else float(rel), sums, first)


_RUN = 1024
"""Elements whose products are summed in their own dtype, before float64 takes over."""

_TINY, _HUGE = 1e-12, 1e12
"""The greatest distance, and the root mean squares, between which float32 holds the squares with all their digits."""


def _sums(a: Array, b: Array, distance: Array, greatest: float) -> Sums:
    """Return the sums over runs that are finite everywhere."""
    import numpy as np

    if a.dtype.kind == "c":
        a, b = a.view(f"f{a.dtype.itemsize // 2}"), b.view(f"f{b.dtype.itemsize // 2}")
    squares = [_dot(values, values) for values in (distance, a, b)]
    roots = [math.sqrt(square / a.size) if square >= 0 else math.nan for square in squares]
    plain = all(not root or _TINY < root < _HUGE for root in roots) and (not greatest or _TINY < greatest < _HUGE)
    if a.dtype.itemsize < 8 and not (plain and (squares[0] or not greatest)):
        return wide_sums(a, b, distance.astype(np.float64))
    return Sums(distance.size, _dot(distance, None), *squares)


def wide_sums(a: Array, b: Array, distance: Array) -> Sums:
    """Return the same by way of float64."""
    import numpy as np

    squares = (float(np.dot(values, values)) for values in (distance, a.astype(np.float64), b.astype(np.float64)))
    return Sums(distance.size, float(distance.sum()), *squares)


def squares_of(values: Array) -> Sums:
    """Return the sums of a run that is compared with itself."""
    import numpy as np

    with np.errstate(all="ignore"):
        values = values.view(np.uint8) if values.dtype.kind == "b" else values
        values = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
        values = np.abs(values[np.isfinite(values)])
        square = float(np.dot(values, values))
    return Sums(values.size, 0.0, 0.0, square, square)


def _dot(a: Array, b: Array | None) -> float:
    """Return the sum of the products of two runs, or of one run, a short run after another in their own dtype."""
    import numpy as np

    whole = a.size // _RUN * _RUN
    if b is None:
        ones = np.ones(_RUN, a.dtype)
        sums = a[:whole].reshape(-1, _RUN) @ ones
        return float(sums.sum(dtype=np.float64)) + float(np.dot(a[whole:], ones[: a.size - whole]))
    products = np.matmul(a[:whole].reshape(-1, 1, _RUN), b[:whole].reshape(-1, _RUN, 1))
    return float(products.sum(dtype=np.float64)) + float(np.dot(a[whole:], b[whole:]))


def _alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Both in the wider of their dtypes; 64-bit integers of both kinds stay what they are."""
    import numpy as np

    a, b = (values.view(np.uint8) if values.dtype.kind == "b" else values for values in (a, b))
    if a.dtype == b.dtype or {a.dtype.kind, b.dtype.kind} <= {"i", "u"}:
        return a, b
    wide = np.result_type(a.dtype, b.dtype)
    return a.astype(wide, copy=False), b.astype(wide, copy=False)


def _like(what: str, real: Array) -> Array:
    return room(f"{what} {real.dtype}", real.size, real.dtype)


def _distance(a: Array, b: Array) -> Array:
    """|a - b|, in room that is used again."""
    import numpy as np

    if a.dtype.kind == "c":
        return np.asarray(np.abs(a - b))
    difference = np.subtract(a, b, out=room(f"distance {a.dtype}", a.size, a.dtype))
    return np.abs(difference, out=difference)


def _beyond(a: Array, b: Array, distance: Array, size: Array, tolerance: Tolerance) -> Array:
    """Return which finite elements are not equal.

    Of real numbers these have a distance, as differences near 0 are exact; that of complex ones may round to 0.
    """
    import numpy as np

    differs = room("differs", a.size, np.dtype(bool))
    if a.dtype.kind == "c":
        np.not_equal(a, b, out=differs)
    else:
        np.not_equal(distance, 0, out=differs)
    if tolerance.atol or tolerance.rtol:
        differs &= ~(distance <= tolerance.atol + tolerance.rtol * size)
    return differs


def _with_odd_ones(a: Array, b: Array, same: Callable[[], Array] | None, begin: int, tolerance: Tolerance) -> Apart:
    """The same where some are NaN, infinite, or further apart than their dtype has numbers."""
    import numpy as np

    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    far_a, far_b = a.astype(wide), b.astype(wide)
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    finite = np.isfinite(a) & np.isfinite(b)
    distance, size = np.abs(far_a - far_b), np.abs(far_b)
    differs = np.asarray(far_a != far_b)
    infinite = differs & ~finite & ~nan_a & ~nan_b
    differs &= ~finite | ~(distance <= tolerance.atol + tolerance.rtol * size)
    if same is not None:
        differs &= ~same()
    if tolerance.equal_nan:
        differs &= ~(nan_a & nan_b)
    count = int(np.count_nonzero(differs))
    first = _first(differs, a, b, begin, tolerance.first) if count else ()
    sums = _sums_of_finite(far_a[finite], far_b[finite], distance[finite])
    if infinite.any():
        return Apart(count, math.inf, math.inf, sums, first)
    greatest = distance[finite].max(initial=0.0)
    relative = np.fmax.reduce((distance[finite] / size[finite]), initial=0.0)
    return Apart(count, float(greatest), float(relative), sums, first)


def _sums_of_finite(a: Array, b: Array, distance: Array) -> Sums:
    """Return the sums over some places, in float64 or complex128."""
    import numpy as np

    return wide_sums(np.abs(a), np.abs(b), distance)


def _integers_apart(a: Array, b: Array, begin: int, tolerance: Tolerance) -> Apart:
    """The same of integers."""
    import numpy as np

    differs = np.asarray(a != b)
    if not differs.any():
        return Apart(sums=squares_of(a))
    places = np.flatnonzero(differs)
    some_a, some_b = a[places], b[places]
    distance = _distance_of_integers(some_a, some_b)
    size = np.abs(some_b.astype(np.float64))
    if tolerance.atol or tolerance.rtol:
        differs[places] = distance.astype(np.float64) > tolerance.atol + tolerance.rtol * size
    count = int(np.count_nonzero(differs))
    first = _first(differs, a, b, begin, tolerance.first) if count else ()
    sums = wide_sums(a, b, distance.astype(np.float64))
    sums = replace(sums, count=a.size)
    return Apart(count, int(distance.max()), float((distance / size).max()), sums, first)


def _distance_of_integers(a: Array, b: Array) -> Array:
    """|a - b| where they differ: exact, but for unsigned integers of 64 bits with signed ones, which may be too far."""
    import numpy as np

    if a.dtype.itemsize < 8 and b.dtype.itemsize < 8:
        return np.abs(a.astype(np.int64) - b.astype(np.int64))
    if a.dtype.kind != b.dtype.kind:
        return np.maximum(np.abs(a.astype(np.float64) - b.astype(np.float64)), 1)
    wide = np.dtype(f"{a.dtype.kind}8")
    words_a, words_b = a.astype(wide).view(np.uint64), b.astype(wide).view(np.uint64)
    return np.where(a > b, words_a - words_b, words_b - words_a)  # right modulo 2⁶⁴, and less than that


def _first(differs: Array, a: Array, b: Array, begin: int, most: int) -> tuple[tuple[int, object, object], ...]:
    """Return the first places that differ, found one by one: where all do, a list of them would be long."""
    found: list[tuple[int, object, object]] = []
    at = 0
    while len(found) < most and at < differs.size:
        place = at + int(differs[at:].argmax())
        if not differs[place]:
            break
        found.append((begin + place, a[place].item(), b[place].item()))
        at = place + 1
    return tuple(found)
