"""Count values that are NaN, infinite, all zero or all the same, from their bits, without decoding them.

The tally of a piece is small. Tallies of consecutive pieces merge into the tally of the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.dtypes import DType
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of the elements of a run."""

    numel: int
    nan: int
    """Elements, or parts of complex ones, that are NaN."""
    inf: int
    """The same that are infinite."""
    zero: bool
    """True if all are zero, be it a negative one."""
    same: bool
    """True if all have the same bits."""
    first: bytes
    """The bits of the first."""


def merged(a: Tally | None, b: Tally) -> Tally:
    """Return the tally of two runs, `b` after `a`."""
    if a is None or not a.numel:
        return b
    if not b.numel:
        return a
    return Tally(
        a.numel + b.numel,
        a.nan + b.nan,
        a.inf + b.inf,
        a.zero and b.zero,
        a.same and b.same and a.first == b.first,
        a.first,
    )


@dataclass(frozen=True, slots=True)
class _Bits:
    """The encoding of NaN and infinity in a float dtype."""

    width: int
    """Bytes of one."""
    finite: int
    """The bits of the largest finite value, without the sign."""
    infinite: bool = True
    """True if the bits after these are infinity, and those beyond NaN; else all beyond are NaN."""
    signed: bool = True
    lone_nan: bool = False
    """True if the only NaN is what negative zero would be."""


_FLOATS = {
    "float64": _Bits(8, 0x7FEFFFFFFFFFFFFF),
    "float32": _Bits(4, 0x7F7FFFFF),
    "float16": _Bits(2, 0x7BFF),
    "bfloat16": _Bits(2, 0x7F7F),
    "float8_e5m2": _Bits(1, 0x7B),
    "float8_e4m3fn": _Bits(1, 0x7E, infinite=False),
    "float8_e5m2fnuz": _Bits(1, 0x7F, infinite=False, lone_nan=True),
    "float8_e4m3fnuz": _Bits(1, 0x7F, infinite=False, lone_nan=True),
    "float8_e8m0fnu": _Bits(1, 0xFE, infinite=False, signed=False),
    "complex128": _Bits(8, 0x7FEFFFFFFFFFFFFF),
    "complex64": _Bits(4, 0x7F7FFFFF),
    "complex32": _Bits(2, 0x7BFF),
}
"""Of a complex number: its parts."""


def can_tally(dtype: DType) -> bool:
    """Return True if elements of a dtype are whole bytes."""
    return dtype.elements == 1


def tally(data: memoryview, dtype: DType, *, big_endian: bool = False) -> Tally:
    """Return the tally of whole elements that stand one after the other."""
    import numpy as np

    numel = len(data) // dtype.itemsize
    if not numel:
        return Tally(0, 0, 0, zero=True, same=True, first=b"")
    kind = _FLOATS.get(dtype.name)
    width = kind.width if kind else min(dtype.itemsize, 8)
    bits = np.frombuffer(data, f"{'>' if big_endian else '<'}u{width}")
    largest = int(bits.max())
    nan = inf = 0
    zero = largest == 0 and (kind is None or kind.signed)  # bits of 0 are 2⁻¹²⁷ if there is no sign
    if kind is not None and kind.signed:
        sign = 1 << (8 * width - 1)
        largest_positive = int(bits.view(bits.dtype.str.replace("u", "i")).max())
        zero = zero or (largest == sign and largest_positive <= 0 and not kind.lone_nan)
        if kind.lone_nan:
            nan = int(np.count_nonzero(bits == sign)) if largest >= sign else 0
        elif largest > sign + kind.finite or largest_positive > kind.finite:
            nan, inf = _count(bits & np.array(sign - 1, bits.dtype), kind)
    elif kind is not None and largest > kind.finite:
        nan, inf = _count(bits, kind)
    return Tally(numel, nan, inf, zero, _all_same(bits, dtype.itemsize // width), bytes(data[: dtype.itemsize]))


def _count(magnitudes: Bits, kind: _Bits) -> tuple[int, int]:
    """Return how many are NaN and how many infinite."""
    import numpy as np

    inf = int(np.count_nonzero(magnitudes == kind.finite + 1)) if kind.infinite else 0
    return int(np.count_nonzero(magnitudes > kind.finite)) - inf, inf


def _all_same(bits: Bits, parts: int) -> bool:
    """Return True if all elements of `parts` parts are equal; where they are not, mostly the ends show it."""
    rows = bits.reshape(-1, parts)
    first = rows[0]
    if not bool((rows[:16] == first).all() and (rows[-1] == first).all()):
        return False
    return bool((rows == first).all())
