"""Compare two runs of values: how many differ, by how much, and where first.

Elements of the same bits are equal, NaN among them. Others are when `|a - b| <= atol + rtol * |b|`, as in
torch.isclose, which makes both zeros equal; NaN of other bits are equal only if asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
class Apart:
    """The differences of two runs of values."""

    differing: int = 0
    """Elements that are not equal."""
    max_abs: float | int = 0
    """The greatest |a - b|, whether it counts as a difference or not; NaN are left out."""
    max_rel: float = 0.0
    """The greatest |a - b| / |b|; infinite where only b is 0."""
    first: tuple[tuple[int, object, object], ...] = ()
    """The numbers of the first elements that differ in row-major order, and their values."""


def together(a: Apart, b: Apart, first: int) -> Apart:
    """Return how far two runs are apart, `b` after `a`."""
    return Apart(
        a.differing + b.differing,
        max(a.max_abs, b.max_abs),
        max(a.max_rel, b.max_rel),
        (a.first + b.first)[:first],
    )


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Return True if two runs have the same bytes."""
    import numpy as np

    if len(a) != len(b):
        return False
    whole = len(a) // 8 * 8
    words = np.frombuffer(a[:whole], np.uint64) == np.frombuffer(b[:whole], np.uint64)
    return bool(words.all()) and a[whole:] == b[whole:]


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
        differs = _beyond(a, b, distance, size, tolerance)
        count = int(np.count_nonzero(differs))
        relative = np.divide(distance, size, out=size)
        rel = relative.max()
        if np.isnan(rel):  # 0 / 0
            rel = np.fmax.reduce(relative)
        first = _first(differs, a, b, begin, tolerance.first) if count else ()
        return Apart(count, float(greatest), 0.0 if np.isnan(rel) else float(rel), first)


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
    """Return which finite elements are not equal; `a != b` finds those whose distance rounds to 0."""
    import numpy as np

    differs = np.not_equal(a, b, out=room("differs", a.size, np.dtype(bool)))
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
    if infinite.any():
        return Apart(count, math.inf, math.inf, first)
    greatest = distance[finite].max(initial=0.0)
    relative = np.fmax.reduce((distance[finite] / size[finite]), initial=0.0)
    return Apart(count, float(greatest), float(relative), first)


def _integers_apart(a: Array, b: Array, begin: int, tolerance: Tolerance) -> Apart:
    """The same of integers."""
    import numpy as np

    differs = np.asarray(a != b)
    if not differs.any():
        return Apart()
    places = np.flatnonzero(differs)
    some_a, some_b = a[places], b[places]
    distance = _distance_of_integers(some_a, some_b)
    size = np.abs(some_b.astype(np.float64))
    if tolerance.atol or tolerance.rtol:
        differs[places] = distance.astype(np.float64) > tolerance.atol + tolerance.rtol * size
    count = int(np.count_nonzero(differs))
    first = _first(differs, a, b, begin, tolerance.first) if count else ()
    return Apart(count, int(distance.max()), float((distance / size).max()), first)


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
