"""Weighted sums of elements: of several tensors alike, in the order in which they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.cast import Cast, Losses
from ckpt_cli.arrays.moments import room
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Summed:
    """Facts about a piece of a sum."""

    losses: Losses
    """The finite sums that the new dtype cannot hold."""
    not_finite: tuple[int, ...]
    """The numbers of the sources that have NaN or infinities there."""


class WeightedSum:
    """Sums w_1 x_1 + w_2 x_2 + … of float elements, divided at last, and rounded once to the new dtype.

    It is done in float32, or in float64 if one of the dtypes is float64, and begins with zero, so that a sum of
    negative zeros is zero. The order is that of the sources, so the bits do not depend on how the elements are cut into
    pieces. These are the steps of mergekit's `linear`, which adds by torch's `addcmul_`: in float32 a product is added
    before it is rounded, as processors with fused multiply-add do that.

    Raises UnsupportedError for a dtype whose values cannot be read.
    """

    def __init__(
        self, sources: Sequence[DType], weights: Sequence[float], divisor: float | None, target: DType, name: str
    ) -> None:
        """`divisor` is None where the sum is not divided; `name` is the tensor's, for errors."""
        import numpy as np

        wide = BY_NAME["float64" if any(dtype.name == "float64" for dtype in (*sources, target)) else "float32"]
        self._kind = np.dtype(wide.name)
        self._weights = [self._kind.type(weight) for weight in weights]
        self._divisor = None if divisor is None else self._kind.type(divisor)
        self._widen = [None if dtype is wide else Cast(dtype, wide, name) for dtype in sources]
        self._narrow = None if target is wide else Cast(wide, target, name)

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Summed]:
        """Return the new elements as bytes, and facts about them.

        `parts` are the elements of each source, little-endian; each is used before the next one is asked for.
        """
        import numpy as np

        total: Array | None = None
        found: list[int] = []
        for number, (data, weight, cast) in enumerate(zip(parts, self._weights, self._widen, strict=True)):
            values: Array = np.frombuffer(data if cast is None else cast.run(data, Losses()), self._kind)
            if not is_finite(values):
                found.append(number)
            if total is None:
                total = np.multiply(values, weight)
                total += self._kind.type(0)
            elif weight == 1:
                total += values
            else:
                for at in range(0, total.size, _BLOCK):
                    _add_product(total[at : at + _BLOCK], values[at : at + _BLOCK], weight)
        assert total is not None
        if self._divisor is not None and self._divisor != 1:
            total /= self._divisor
        data = total.view(np.uint8).reshape(-1).data
        losses = Losses()
        return (data if self._narrow is None else self._narrow.run(data, losses)), Summed(losses, tuple(found))


_BLOCK = 64 << 10
"""Elements that are multiplied and added at a time, so that their float64 stay in the processor's cache."""


def _add_product(total: Array, values: Array, weight: Any) -> None:
    """Add `values * weight` to `total` in place; in float32 with one rounding, as a fused multiply-add."""
    import numpy as np

    if total.dtype == np.float64:
        total += np.multiply(values, weight, out=room("product", values.size, total.dtype))
        return
    wide = np.multiply(values, np.float64(weight), out=room("product", values.size, np.dtype(np.float64)))  # exact
    wide += total
    bits = np.bitwise_and(wide.view(np.uint64), _LOW, out=room("low bits", values.size, np.dtype(np.uint64)))
    halves = np.flatnonzero(bits == _HALF)
    before = total[halves]
    with np.errstate(over="ignore"):
        np.copyto(total, wide, casting="same_kind")
    for place, old in zip(halves.tolist(), before.tolist(), strict=True):  # one in 500 million: rounded twice
        total[place] = _rounded(Fraction(old) + Fraction(float(values[place])) * Fraction(float(weight)), wide[place])


_LOW, _HALF = (1 << 29) - 1, 1 << 28
"""The bits of a float64 that a float32 does not have, and those that stand for the middle between two of these."""


def _rounded(exact: Fraction, near: Any) -> Any:
    """Return the float32 that is nearest to a number, of which `near` is the nearest float64, between two of them."""
    import numpy as np

    error = exact - Fraction(float(near))
    if not error:
        return np.float32(near)
    return np.float32(np.nextafter(near, np.inf if error > 0 else -np.inf))


def is_finite(values: Array) -> bool:
    """True if no value is NaN or infinite; looks at each only where their sum is not finite."""
    import numpy as np

    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())


class Chosen:
    """Takes the elements of one of the sources, or the greatest of all: for integers, which have no average."""

    def __init__(self, dtype: DType, which: int | None) -> None:
        """`which` is the number of the source, None for the greatest."""
        import numpy as np

        self._kind = np.dtype(dtype.name)
        self._which = which

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Summed]:
        """Return the new elements as bytes, and facts about them, as `WeightedSum` does."""
        import numpy as np

        found: Array | None = None
        for number, data in enumerate(parts):
            values: Array = np.frombuffer(data, self._kind)
            if self._which is None and found is not None:
                np.maximum(found, values, out=found)
            elif self._which in (None, number):
                found = values.copy()
        assert found is not None
        return found.view(np.uint8).reshape(-1).data, Summed(Losses(), ())
