"""Cast elements of one dtype to another as torch does, and count the values that are lost."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.codec import Codec
from ckpt_cli.arrays.moments import room
from ckpt_cli.dtypes import DType
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Storage, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@dataclass(slots=True)
class Losses:
    """Counts of finite values that became something that is not near them."""

    infinite: int = 0
    """Finite values that became infinite or NaN."""
    zero: int = 0
    """Values that became zero."""
    cut: int = 0
    """Values that became the largest one of a dtype without infinity, though they are not near it."""

    def __bool__(self) -> bool:
        return bool(self.infinite or self.zero or self.cut)

    def __str__(self) -> str:
        counts = ((self.infinite, "infinite"), (self.zero, "zero"), (self.cut, "the largest there is"))
        phrases = [f"{n:,} {'value' if n == 1 else 'values'} would become {what}" for n, what in counts if n]
        return ", ".join(phrases)

    def add(self, other: Losses) -> None:
        """Add the counts of another part."""
        self.infinite += other.infinite
        self.zero += other.zero
        self.cut += other.cut


class Cast:
    """Casts elements of one dtype to another, in their order.

    Raises UnsupportedError for a dtype whose values cannot be read.
    """

    def __init__(self, source: DType, target: DType, name: str, *, big_endian: bool = False) -> None:
        self._source = _codec(source, name, big_endian=big_endian)
        self._target = _codec(target, name)
        self._direct = _DIRECT.get((source.name, target.name)) if not big_endian else None
        self._largest, self._smallest, self._beyond = _limits(target)
        self.source = source
        self.target = target
        self.itemsize = source.itemsize
        """Bytes of an element before the cast."""

    def run(self, data: memoryview, losses: Losses) -> memoryview:
        """Return the elements in the other dtype, as bytes; add what is lost to `losses`."""
        import numpy as np

        stored = np.frombuffer(data, self._source.stored)
        if self._direct is not None:
            values = stored
            made, is_ordinary = self._direct(stored)
        else:
            values, is_ordinary = self._source.decode(stored), False
            made = self._target.encode(values, cast=True)
        if not is_ordinary and self._may_lose(values):
            _count(self._source.decode(stored), self._target.decode(made), self._beyond, losses)
        return np.ascontiguousarray(made).view(np.uint8).reshape(-1).data

    def _may_lose(self, values: Array) -> bool:
        """Return True if a value is so large or so small that it could get lost, as far as the bits of float32 show."""
        import numpy as np

        if self._target.dtype.bits > self._source.dtype.bits:
            return False
        if values.dtype != np.float32 or not values.size:
            return True
        magnitudes = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
        if int(magnitudes.max()) >= self._largest:
            return True
        magnitudes -= np.uint32(1)  # so that zeros become the largest
        return int(magnitudes.min()) < self._smallest - 1


@cache
def _limits(dtype: DType) -> tuple[int, int, float]:
    """Return the largest and the smallest positive value as bits of float32, and the limit of what is near the largest.

    The limit is half a step above the largest value: what is less is rounded to it.
    """
    import numpy as np

    if dtype.bits > 16:
        return 0x7F800000, 1, np.inf
    codec = _codec(dtype, "")
    codes = np.arange(1 << dtype.bits, dtype=f"u{dtype.itemsize}").view(codec.stored)
    values = codec.decode(codes).astype(np.float32).reshape(-1)
    positive = values[np.isfinite(values) & (values > 0)]
    second, largest = (float(value) for value in np.sort(positive)[-2:])
    beyond = largest + (largest - second) / 2
    return int(positive.max().view(np.uint32)), int(positive.min().view(np.uint32)), beyond


def _codec(dtype: DType, name: str, *, big_endian: bool = False) -> Codec:
    """Return the codec of a storage's elements."""
    return Codec(Tensor(name, dtype, (0,), (1,), Storage("", 0), big_endian=big_endian))


def _count(values: Array, after: Array, beyond: float, losses: Losses) -> None:
    """Count finite values that are not finite any more, those that became zero, and those that were cut."""
    import numpy as np

    losses.infinite += int(np.count_nonzero(np.isfinite(values) & ~np.isfinite(after)))
    losses.cut += int(
        np.count_nonzero(np.isfinite(values) & np.isfinite(after) & (np.abs(values.astype(np.float64)) > beyond))
    )
    losses.zero += int(np.count_nonzero((values != 0) & (after == 0)))


def _bfloat16(stored: Array) -> tuple[Array, bool]:
    """float32 to bfloat16, rounded to nearest even; every NaN becomes 0x7FC0 (c10/util/BFloat16.h)."""
    import numpy as np

    bits = stored.view(np.uint32)
    rounded = np.right_shift(bits, np.uint32(16), out=room("bits", bits.size, bits.dtype))
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    made: Array = rounded.view(np.uint16)[1::2].copy()
    magnitudes = np.bitwise_and(made, np.uint16(0x7FFF), out=room("magnitudes", made.size, made.dtype))
    is_ordinary = bool(made.size) and magnitudes.min() > 0 and magnitudes.max() < 0x7F80
    if not is_ordinary:  # a NaN has become what is infinite, NaN or zero
        made[np.isnan(stored)] = 0x7FC0
    return made, is_ordinary


def _float32(stored: Array) -> tuple[Array, bool]:
    """bfloat16 to float32, bit for bit."""
    import numpy as np

    wide: Array = stored.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32), True


_DIRECT = {("float32", "bfloat16"): _bfloat16, ("bfloat16", "float32"): _float32}
"""Casts that have faster code of their own, because they are done to checkpoints of many gigabytes.

Each also returns True if nothing that it made is zero, infinite or NaN, so that nothing can have been lost.
"""
