"""Summarize the stored elements of each dtype: as numbers, or by counting codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.codec import Codec
from ckpt_cli.arrays.moments import BINS, BinPlan, Moments, merged, moments, plan_of, room
from ckpt_cli.arrays.sketch import counted, sketch_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Numbers:
    """Elements that become numbers chunk by chunk."""

    def __init__(self, codec: Codec, *, flagged: bool, big_endian: bool, magnitudes: bool = True) -> None:
        self.codec = codec
        self._magnitudes = magnitudes
        self._is_fast = codec.dtype.name in _FAST and not flagged and not (big_endian and codec.dtype.bits > 8)
        self.plan = BinPlan()
        self.sketched = False
        """True if chunks are sketched too (`arrays/sketch.py`)."""
        self._whole = False

    def sample(self, values: Array) -> None:
        """Decide from some of the numbers where the histogram's bars stand."""
        self.plan = plan_of(values)
        self._whole = values.dtype.kind != "f"

    def share(self, edges: Sequence[float]) -> None:
        """Count by these edges too, which other tensors have as well."""
        self.plan = self.plan.sharing(edges, whole=self._whole)

    def values(self, data: memoryview, part: tuple[slice, ...], which: int = 0) -> Array:
        """Return the numbers that bytes mean, flat; valid until this thread asks for others of the same `which`."""
        import numpy as np

        if self._is_fast:
            return _FAST[self.codec.dtype.name](data, which)
        stored = np.frombuffer(data, self.codec.stored)
        if not self.codec.uniform:
            stored = stored.reshape([item.stop - item.start for item in part])
        found = self.codec.at(part).decode(stored).reshape(-1)
        if found.dtype.kind == "c" and self._magnitudes:
            return magnitudes(found)
        if found.dtype == np.float16:  # too narrow to sum in, and what a float32 is compared with becomes one
            return found.astype(np.float32)
        return found.view(np.uint8) if found.dtype.kind == "b" else found

    def chunk(self, data: memoryview, part: tuple[slice, ...]) -> Moments:
        """Return the moments of a chunk."""
        values = self.values(data, part)
        found = moments(values, self.plan)
        return replace(found, sketch=sketch_of(values)) if self.sketched else found

    def total(self, found: Moments | None) -> Moments:
        """Return the moments of all chunks, merged."""
        return found or Moments()

    def histogram(self, found: Moments) -> tuple[list[float | int], list[int]]:
        """Edges, the first and last of which are the least and the greatest number, and counts between them."""
        return bars(self.plan.edges, found)


def bars(edges: Sequence[float | int], found: Moments) -> tuple[list[float | int], list[int]]:
    """Return the edges between numbers, the least and the greatest number around them; and counts between."""
    if found.least is None or found.most is None:
        return [], []
    inner = [(edge, below) for edge, below in zip(edges, found.below, strict=False) if found.least < edge <= found.most]
    steps = [0, *(below for _, below in inner), found.count]
    return [found.least, *(edge for edge, _ in inner), found.most], [b - a for a, b in pairwise(steps)]


class Codes:
    """Elements of one byte: how often each of the 256 is there says everything, exactly."""

    def __init__(self, codec: Codec) -> None:
        import numpy as np

        values = codec.decode(np.arange(256, dtype=np.uint8).view(codec.stored))
        self._values: Array = values.reshape(256, -1).astype(np.float64)
        self.whole = values.dtype.kind in "iub"
        """True if the values are whole numbers."""
        self._narrow: Array | None = None
        self.sketched = False
        """True if the moments have a sketch too."""
        self._shared: tuple[float, ...] = ()

    def share(self, edges: Sequence[float]) -> None:
        """Count by these edges too, which other tensors have as well."""
        self._shared = tuple(edges)

    def numbers(self, data: memoryview) -> Array:
        """Return the values of some bytes."""
        import numpy as np

        return self._values[np.frombuffer(data, np.uint8)].reshape(-1)

    def narrow(self, data: memoryview, which: int) -> Array:
        """Return the values in float32, flat; valid until this thread asks for others of the same `which`."""
        import numpy as np

        if self._narrow is None:
            self._narrow = self._values.astype(np.float32)
        wide = self._narrow.shape[1]
        found = room(f"codes {which}", len(data) * wide, self._narrow.dtype).reshape(-1, wide)
        return np.take(self._narrow, np.frombuffer(data, np.uint8), axis=0, out=found, mode="clip").reshape(-1)

    def chunk(self, data: memoryview, _part: tuple[slice, ...]) -> Array:
        """Return how often each code is there; pairs of bytes are counted, as that is half the work."""
        import numpy as np

        whole = len(data) // 2 * 2
        if whole < 1 << 16:
            return np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        pairs = np.bincount(np.frombuffer(data[:whole], np.uint16), minlength=1 << 16).reshape(256, 256)
        counts = pairs.sum(axis=0) + pairs.sum(axis=1)
        for code in data[whole:]:
            counts[code] += 1
        return np.asarray(counts)

    def _weights(self, counts: Array) -> list[tuple[float, int]]:
        """Each value with how often it is there; a code may mean two values."""
        found: dict[float, int] = {}
        for values, count in zip(self._values.tolist(), counts.tolist(), strict=True):
            for value in values if count else ():
                key = value if value == value else math.nan
                found[key] = found.get(key, 0) + count
        return sorted((value, count) for value, count in found.items() if math.isfinite(value))

    def total(self, found: Array | None) -> Moments:
        """Return the moments, from the counts of all chunks."""
        import numpy as np

        if found is None:
            return Moments()
        weights = self._weights(found)
        nan = int((np.isnan(self._values) * found[:, None]).sum())
        inf = int((np.isinf(self._values) * found[:, None]).sum())
        count = sum(count for _, count in weights)
        if not count:
            return Moments(nan=nan, inf=inf)
        mean = math.fsum(value * count for value, count in weights) / count
        squares = math.fsum((value - mean) ** 2 * count for value, count in weights)
        zeros = sum(count for value, count in weights if value == 0)
        least, most = weights[0][0], weights[-1][0]
        ends = (int(least), int(most)) if self.whole else (least, most)
        edges = [*self._edges(*ends), *self._shared]
        below = tuple(sum(count for value, count in weights if value < edge) for edge in edges)
        sketch = counted(weights) if self.sketched else None
        return Moments(count, nan, inf, zeros, ends[0], ends[1], 0, mean, squares, below, sketch)

    def _edges(self, least: float | int, most: float | int) -> list[float | int]:
        if least == most:
            return []
        if self.whole and most - least < BINS:
            return list(range(int(least) + 1, int(most) + 1))
        return [least + (most - least) * bar / BINS for bar in range(1, BINS)]

    def histogram(self, found: Moments) -> tuple[list[float | int], list[int]]:
        """Edges and counts."""
        if found.least is None or found.most is None:
            return [], []
        edges = [found.least, *self._edges(found.least, found.most), found.most]
        steps = [0, *found.below[: len(edges) - 2], found.count]
        return edges, [after - before for before, after in pairwise(steps)]


def summer_of(codec: Codec, *, flagged: bool, big_endian: bool) -> Numbers | Codes:
    """Return an object that summarizes the elements of a codec."""
    if codec.uniform and codec.stored.itemsize == 1:
        return Codes(codec)
    return Numbers(codec, flagged=flagged, big_endian=big_endian)


def add(a: Any, b: Any) -> Any:
    """Return the summary of two runs of one tensor's chunks, `b` after `a`."""
    if a is None:
        return b
    return merged(a, b) if isinstance(a, Moments) else a + b


# --- to numbers, fast ------------------------------------------------------------------------------------------------


_ToNumbers = Callable[[memoryview, int], "Array"]


def _as(dtype: str) -> _ToNumbers:
    def values(data: memoryview, _which: int) -> Array:
        import numpy as np

        return np.frombuffer(data, dtype)

    return values


def _bfloat16(data: memoryview, which: int) -> Array:
    """A bfloat16 is the upper half of a float32."""
    import numpy as np

    codes = np.frombuffer(data, "<u2")
    wide = room(f"bfloat16 {which}", codes.size, np.dtype(np.uint32))
    np.left_shift(codes, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)


def _float16(data: memoryview, which: int) -> Array:
    """A float16 whose bits are moved to where a float32 has them is 2⁻¹¹² times what it should be."""
    import numpy as np

    codes = np.frombuffer(data, "<i2")
    wide = room(f"float16 {which}", codes.size, np.dtype(np.int32))
    np.copyto(wide, codes)
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, np.int32(0x8FFFE000 - (1 << 32)), out=wide)
    values = wide.view(np.float32)
    np.multiply(values, np.float32(2.0**112), out=values)
    if values.size and (float(values.max()) >= 65536 or float(values.min()) <= -65536):  # infinities and NaN
        with np.errstate(all="ignore"):
            return np.frombuffer(data, "<f2").astype(np.float32)
    return values


def magnitudes(values: Array) -> Array:
    """Return the magnitudes of complex numbers, in float64."""
    import numpy as np

    with np.errstate(all="ignore"):
        found = np.abs(values.astype(np.complex128))
        found[np.isnan(values)] = np.nan  # what is infinite and NaN at once has an infinite magnitude
    return found


_FAST: dict[str, _ToNumbers] = {
    **{f"float{bits}": _as(f"<f{bits // 8}") for bits in (32, 64)},
    **{f"int{bits}": _as(f"<i{bits // 8}") for bits in (16, 32, 64)},
    **{f"uint{bits}": _as(f"<u{bits // 8}") for bits in (16, 32, 64)},
    "bfloat16": _bfloat16,
    "float16": _float16,
}
"""Dtypes whose little-endian bytes become numbers without the codec."""
