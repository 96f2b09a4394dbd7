"""Elements that are made of those of a base and of models that were trained from it: task vectors, TIES, DARE, SLERP.

The steps are those of mergekit 0.1.5 with `dtype: float32` (merge_methods/generalized_task_arithmetic.py, sparsify.py,
slerp.py): everything is computed in float32, or in float64 if one of the dtypes is float64, and rounded once to the new
dtype. A *task vector* is a model minus the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.cast import Cast, Losses
from ckpt_cli.arrays.weighted import Summed, is_finite
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_STRAIGHT = 0.9995
"""Cosines above this are those of the same direction, between which a line is as good as an arc."""

_TINY = 1e-8
"""Norms up to this are taken for zero."""


class Widening:
    """Reads elements of several dtypes in the wider one that is computed in, and rounds the results."""

    def __init__(self, sources: Sequence[DType], target: DType, name: str) -> None:
        """`name` is the tensor's, for errors; raises UnsupportedError for dtypes whose values cannot be read."""
        import numpy as np

        wide = BY_NAME["float64" if any(dtype.name == "float64" for dtype in (*sources, target)) else "float32"]
        self.kind = np.dtype(wide.name)
        self._widen = [None if dtype is wide else Cast(dtype, wide, name) for dtype in sources]
        self._narrow = None if target is wide else Cast(wide, target, name)

    def arrays(self, parts: Iterable[memoryview], not_finite: list[int]) -> Iterable[Array]:
        """Yield the elements of each source, which may be changed; notes the numbers of those that are not finite."""
        import numpy as np

        for number, (data, cast) in enumerate(zip(parts, self._widen, strict=True)):
            values: Array = np.frombuffer(data if cast is None else cast.run(data, Losses()), self.kind).copy()
            if not is_finite(values):
                not_finite.append(number)
            yield values

    def result(self, values: Array, not_finite: Sequence[int]) -> tuple[memoryview, Summed]:
        """Return elements in the new dtype as bytes, and the facts about them."""
        import numpy as np

        data = values.view(np.uint8).reshape(-1).data
        losses = Losses()
        return (data if self._narrow is None else self._narrow.run(data, losses)), Summed(losses, tuple(not_finite))


@dataclass(frozen=True, slots=True)
class Threshold:
    """The elements of a task vector that are kept: those of the greatest magnitudes."""

    bits: int
    """The bits of the magnitude from which on they are kept."""
    equal: int | None
    """How many of exactly that magnitude are kept, the first ones; None for all."""
    before: Sequence[int] = ()
    """The number of elements of that magnitude before each piece, where not all are kept."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The numbers of a mix of task vectors."""

    weights: Sequence[float]
    is_normalized: bool
    """True if the sum is divided by that of the weights."""
    agrees: bool = False
    """True if only the elements count that have the sign of the sum, as in TIES."""
    density: float = 1.0
    """For DARE, the share of elements that are kept, and divided by it."""
    seed: int = 0


class TaskVectors:
    """Makes base + Σ weight · task vector, of elements that are kept by a threshold (TIES) or by chance (DARE)."""

    def __init__(
        self,
        widening: Widening,
        recipe: Recipe,
        name: str,
        piece: int,
        thresholds: Sequence[Threshold | None] | None = None,
    ) -> None:
        """`thresholds` has one for each model, or None; `piece` is the number of elements that are made at a time."""
        self._widening = widening
        self._recipe = recipe
        self._name = name
        self._piece = piece
        self._thresholds = thresholds

    def at(self, begin: int) -> _TaskVectorsAt:
        """Return what makes the elements from a number on."""
        recipe = self._recipe
        thresholds: list[tuple[int, int | None] | None] = []
        for one in self._thresholds or ():
            if one is None or one.equal is None:
                thresholds.append(None if one is None else (one.bits, None))
            else:
                thresholds.append((one.bits, max(one.equal - one.before[begin // self._piece], 0)))
        models = range(len(recipe.weights)) if recipe.density < 1 else ()
        keys = [key_of(recipe.seed, number, self._name) for number in models]
        return _TaskVectorsAt(self._widening, recipe, begin, thresholds, keys)


class _TaskVectorsAt:
    """Makes the elements of one piece."""

    def __init__(
        self,
        widening: Widening,
        recipe: Recipe,
        begin: int,
        thresholds: Sequence[tuple[int, int | None] | None],
        keys: Sequence[int],
    ) -> None:
        self._widening = widening
        self._recipe = recipe
        self._begin = begin
        self._thresholds = thresholds
        self._keys = keys

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Summed]:
        """Return the new elements as bytes, and facts about them; `parts` are those of the base and of each model."""
        import numpy as np

        not_finite: list[int] = []
        arrays = iter(self._widening.arrays(parts, not_finite))
        base = next(arrays)
        weights = [self._widening.kind.type(weight) for weight in self._recipe.weights]
        with np.errstate(all="ignore"):
            weighted = []
            for number, (values, weight) in enumerate(zip(arrays, weights, strict=True)):
                values -= base
                self._sparsify(number, values)
                values *= weight
                weighted.append(values)
            mixed, divisor = _agreeing(weighted, weights) if self._recipe.agrees else _summed(weighted, weights)
            if self._recipe.is_normalized:
                mixed /= divisor
            base += mixed
        return self._widening.result(base, not_finite)

    def _sparsify(self, number: int, delta: Array) -> None:
        """Put zeros in the places of elements that are not kept."""
        if self._thresholds:
            threshold = self._thresholds[number]
            if threshold is not None:
                delta[~_kept(delta, *threshold)] = 0
        elif self._keys:
            density = self._recipe.density
            delta[~drawn(self._keys[number], self._begin, delta.size, density)] = 0
            delta /= delta.dtype.type(density)


def _summed(weighted: Sequence[Array], weights: Sequence[Any]) -> tuple[Array, Any]:
    """Return the sum of weighted task vectors, and that of the weights, 1 where it is zero."""
    import numpy as np

    total = np.zeros_like(weighted[0])
    divisor = weighted[0].dtype.type(0)
    for values, weight in zip(weighted, weights, strict=True):
        total += values
        divisor += weight
    return total, divisor if abs(divisor) >= _TINY else weighted[0].dtype.type(1)


def _agreeing(weighted: Sequence[Array], weights: Sequence[Any]) -> tuple[Array, Array]:
    """Return the sum of those elements that have the sign of the whole sum, and that of their weights."""
    import numpy as np

    positive = _summed(weighted, weights)[0] >= 0
    total = np.zeros_like(weighted[0])
    divisor = np.zeros_like(weighted[0])
    for values, weight in zip(weighted, weights, strict=True):
        agrees = np.where(positive, values > 0, values < 0)
        total += np.where(agrees, values, values.dtype.type(0))
        divisor += np.where(agrees, weight, values.dtype.type(0))
    divisor[divisor == 0] = 1
    return total, divisor


# --- the greatest magnitudes -----------------------------------------------------------------------------------------


def _magnitudes(delta: Array) -> Array:
    """Return the bits of |delta|, which are ordered as the magnitudes are."""
    import numpy as np

    kind = np.dtype(f"u{delta.dtype.itemsize}")
    bits: Array = np.abs(delta).view(kind)
    return bits


def _kept(delta: Array, bits: int, equal: int | None) -> Array:
    """Return which elements have at least a magnitude; of those that have exactly it, the first `equal`."""
    import numpy as np

    found = _magnitudes(delta)
    if equal is None:
        return np.asarray(found >= bits)
    kept: Array = found > bits
    kept[np.flatnonzero(found == bits)[:equal]] = True
    return kept


DIGITS = 16
"""Bits that one pass over the elements finds out about a threshold."""


class CountDigits:
    """Counts the magnitudes of task vectors by their next 16 bits, of those that begin with some bits."""

    def __init__(self, widening: Widening, beginnings: Sequence[int], known: int) -> None:
        """`beginnings` are the first `known` bits of the threshold of each model."""
        self._widening = widening
        self._beginnings = beginnings
        self._known = known

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes, list[Array]]:
        """Return no elements, and for each model the counts of a piece."""
        import numpy as np

        arrays = iter(self._widening.arrays(parts, []))
        base = next(arrays)
        bits = self._widening.kind.itemsize * 8
        counts: list[Array] = []
        for values, beginning in zip(arrays, self._beginnings, strict=True):
            with np.errstate(all="ignore"):
                values -= base
            found = _magnitudes(values)
            if self._known:
                found = found[found >> (bits - self._known) == beginning]
            digits = (found >> (bits - self._known - DIGITS)) & 0xFFFF
            counts.append(np.bincount(digits.astype(np.intp), minlength=1 << DIGITS))
        return b"", counts


class CountEqual:
    """Counts the elements of task vectors of exactly some magnitudes."""

    def __init__(self, widening: Widening, magnitudes: Sequence[int | None]) -> None:
        self._widening = widening
        self._magnitudes = magnitudes

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes, list[int]]:
        """Return no elements, and for each model the count of a piece."""
        import numpy as np

        arrays = iter(self._widening.arrays(parts, []))
        base = next(arrays)
        counts = []
        for values, magnitude in zip(arrays, self._magnitudes, strict=True):
            if magnitude is None:
                counts.append(0)
                continue
            with np.errstate(all="ignore"):
                values -= base
            counts.append(int(np.count_nonzero(_magnitudes(values) == magnitude)))
        return b"", counts


# --- chance ----------------------------------------------------------------------------------------------------------


def key_of(seed: int, number: int, name: str) -> int:
    """Return the key of Philox for one tensor of one model."""
    text = f"ckpt dare {seed} {number} {name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def drawn(key: int, begin: int, count: int, density: float) -> Array:
    """Return which elements are kept by chance, from the number `begin` on, a multiple of 8: `density` of all.

    Each element has 32 bits of the stream of numpy's Philox4x64-10 of its own, so that it does not matter how they are
    cut into pieces.
    """
    import numpy as np

    stream = np.random.Philox(key=key, counter=begin // 8)
    words: Array = stream.random_raw(-(-count // 2)).view(np.uint32)[:count]
    return np.asarray(words < math.floor(density * 2**32)) if density < 1 else np.ones(count, bool)


# --- slerp -----------------------------------------------------------------------------------------------------------


class Products:
    """Sums the products of two tensors with themselves and with each other, in float64."""

    def __init__(self, widening: Widening) -> None:
        self._widening = widening

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes, tuple[float, float, float]]:
        """Return no elements, and the sums of a piece: of squares of the first and the second, and of products."""
        import numpy as np

        a, b = (values.astype(np.float64) for values in self._widening.arrays(parts, []))
        with np.errstate(all="ignore"):
            return b"", (float((a * a).sum()), float((b * b).sum()), float((a * b).sum()))


def arc_weights(first: float, second: float, product: float, t: float) -> tuple[float, float]:
    """Return the weights of two vectors at the share `t` of the arc from one to the other, by their sums of products.

    They are those of a line where the vectors have nearly the same direction, or opposite ones.
    """
    norms = [norm if norm > _TINY else 1.0 for norm in (math.sqrt(first), math.sqrt(second))]
    cosine = product / (norms[0] * norms[1])
    if not math.isfinite(cosine) or abs(cosine) > _STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin(angle - angle * t) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


class Between:
    """Makes weight · first + weight · second."""

    def __init__(self, widening: Widening, weights: tuple[float, float]) -> None:
        self._widening = widening
        self._weights = weights

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Summed]:
        """Return the new elements as bytes, and facts about them."""
        import numpy as np

        not_finite: list[int] = []
        a, b = self._widening.arrays(parts, not_finite)
        with np.errstate(all="ignore"):
            a *= self._widening.kind.type(self._weights[0])
            b *= self._widening.kind.type(self._weights[1])
            a += b
        return self._widening.result(a, not_finite)
