"""Summarize lines of numbers, such as the rows of a matrix, each by itself: in float64, chunk by chunk, and merged.

Chunks merge as in `moments.py`. Whole numbers that float64 cannot hold are rounded in the mean and the spread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.moments import Moments
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_COUNTS = ("nan", "inf", "zeros")
_NUMBERS = ("least", "most", "mean", "squares")


@dataclass(slots=True)
class LineMoments:
    """The moments of lines that follow each other, an array for each: those of `moments.Moments`."""

    count: Array
    nan: Array
    inf: Array
    zeros: Array
    least: Array
    """Of a line without finite numbers it means nothing, as do `most` and `mean`."""
    most: Array
    mean: Array
    squares: Array

    @classmethod
    def none(cls, lines: int) -> LineMoments:
        """Return those of lines without numbers."""
        import numpy as np

        counts = [np.zeros(lines, np.int64) for _ in range(1 + len(_COUNTS))]
        return cls(*counts, *(np.zeros(lines) for _ in _NUMBERS))

    def line(self, number: int) -> Moments:
        """Return the moments of one line."""
        count, nan, inf, zeros = (int(each[number]) for each in (self.count, self.nan, self.inf, self.zeros))
        if not count:
            return Moments(0, nan, inf, zeros)
        least, most, mean, squares = (getattr(self, key)[number].item() for key in _NUMBERS)
        return Moments(count, nan, inf, zeros, least, most, 0, mean, squares)

    def column(self, key: str) -> Array:
        """Return a number of each line by the name of its column, NaN where it has none."""
        import numpy as np

        with np.errstate(all="ignore"):
            some = np.where(self.count > 0, 1.0, np.nan)
            std: Array = np.sqrt(self.squares / np.where(self.count > 1, self.count - 1, np.nan))
            if key == "std":
                return std
            if key == "norm":
                norm: Array = np.sqrt(self.squares + self.count * self.mean**2)
                return norm
            if key == "outlier":
                greatest = np.maximum(np.abs(self.least.astype(np.float64)), np.abs(self.most.astype(np.float64)))
                return np.where(std > 0, greatest / std, np.nan)
            found: Array = getattr(self, {"min": "least", "max": "most"}.get(key, key)).astype(np.float64)
            return found if key in _COUNTS else found * some

    def add(self, first: int, part: LineMoments) -> None:
        """Add numbers of the lines from `first` on, which come after those so far."""
        import numpy as np

        here = slice(first, first + len(part.count))
        if self.least.dtype != part.least.dtype and not self.count.any():
            self.least, self.most = (np.zeros(len(self.count), part.least.dtype) for _ in range(2))
        a, b = self.count[here], part.count
        for key, better in (("least", np.minimum), ("most", np.maximum)):
            old, new = getattr(self, key)[here], getattr(part, key)
            getattr(self, key)[here] = np.where(a == 0, new, np.where(b == 0, old, better(old, new)))
        with np.errstate(all="ignore"):
            share = b / np.maximum(a + b, 1)
            apart = np.where((a > 0) & (b > 0), part.mean - self.mean[here], 0.0)
            self.squares[here] += part.squares + apart * apart * a * share
            self.mean[here] = np.where(a == 0, part.mean, self.mean[here] + apart * share)
        self.count[here] += b
        for key in _COUNTS:
            getattr(self, key)[here] += getattr(part, key)


def line_moments(lines: Array) -> LineMoments:
    """Return the moments of the lines of a two-dimensional array, none of which is empty."""
    import numpy as np

    n, length = lines.shape
    zeros = length - np.count_nonzero(lines, axis=1)
    nan = inf = np.zeros(n, np.int64)
    count = np.full(n, length, np.int64)
    wide = lines.astype(np.float64)
    low = high = lines if lines.dtype.kind != "f" else wide
    finite = np.isfinite(lines) if lines.dtype.kind == "f" else np.ones((), bool)
    is_whole = bool(finite.all())
    if not is_whole:
        nan = np.count_nonzero(np.isnan(lines), axis=1)
        count = np.count_nonzero(finite, axis=1)
        inf = length - count - nan
        wide[~finite] = 0.0
        low, high = np.where(finite, wide, np.inf), np.where(finite, wide, -np.inf)
    with np.errstate(all="ignore"):
        mean = wide.sum(axis=1) / np.maximum(count, 1)
        apart = wide - mean[:, None]
        if not is_whole:
            apart[~finite] = 0.0
        squares = np.einsum("ij,ij->i", apart, apart)
    return LineMoments(count, nan, inf, zeros, low.min(axis=1), high.max(axis=1), mean, squares)
