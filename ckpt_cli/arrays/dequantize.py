"""Plain floats of quantized numbers: the formulas by which each scheme's reference dequantizes.

Codes become float32 by a table or as integers; a zero point is subtracted; the scale of the block is multiplied in
float32; the result is rounded once, to the new dtype. Where a scale is itself the product or quotient of two, that is
made first, in float32. These are the values of the references where these compute in float32; and of those that
multiply in float16 or bfloat16, because the exact product of two such numbers fits into float32. The rows of a matrix
are made in pieces of some whole rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.cast import Cast, Losses
from ckpt_cli.arrays.formula import Codes, Formula, Scales
from ckpt_cli.arrays.moments import room
from ckpt_cli.dtypes import BY_NAME, DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place within a word of each of eight columns (AutoAWQ, awq/utils/packing_utils.py)."""


class Dequantizing:
    """Makes the elements from `begin` to `end` of a dequantized tensor."""

    def __init__(self, formula: Formula, begin: int, end: int) -> None:
        self._formula = formula
        self._begin = begin
        self._end = end

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Losses]:
        """Return the new elements as bytes, and the finite values that the dtype cannot hold.

        `parts` are the bytes of the scales, of further scales, of the zero points, then of the stored numbers.
        """
        import numpy as np

        formula, losses, rest = self._formula, Losses(), iter(parts)
        with np.errstate(all="ignore"):
            if formula.turned:
                made = self._turned(rest, losses)
            else:
                columns = formula.columns
                first, last = self._begin // columns, -(-self._end // columns)
                made = _made(formula, (first, last), columns, rest, losses)
                if formula.flat:
                    made = made.reshape(-1)[: self._end - self._begin]
        return np.ascontiguousarray(made).view(np.uint8).reshape(-1).data, losses

    def _turned(self, parts: Iterator[memoryview], losses: Losses) -> Array:
        """Return rows of the transposed matrix: some columns of all rows."""
        rows = self._formula.rows
        columns = (self._end - self._begin) // rows
        made: Array = _made(self._formula, (0, rows), columns, parts, losses).T
        return made


def _made(formula: Formula, rows: tuple[int, int], columns: int, parts: Iterator[memoryview], losses: Losses) -> Array:
    """Return some rows of the new tensor, or of as many of its columns."""
    scales = _scales(formula, rows, columns, parts)
    numbers = _row_numbers(formula, rows)
    zeros = _zeros(formula, rows, len(scales), parts) if formula.zeros is not None else None
    codes = formula.codes
    values = _decoded(codes, next(parts), rows, columns)
    if zeros is not None:
        _by_blocks(formula, values, zeros[numbers], subtract=True)
    _by_blocks(formula, values, scales[numbers], subtract=False)
    if formula.scales.after is not None:
        values *= _float32(formula.scales.after)
    return rounded(values, formula.target, losses, is_small=_is_small(formula, scales, zeros))


def _is_small(formula: Formula, scales: Array, zeros: Array | None) -> bool:
    """True if no value can be NaN but for a code that is, nor become infinite, as far as codes and scales show it."""
    import numpy as np

    codes = formula.codes
    largest = float(np.nanmax(np.abs(_table(codes.table)))) if codes.table else 2.0**31
    moved = float(np.abs(zeros).max()) if zeros is not None and zeros.size else 0.0
    most = float(np.abs(scales).max()) if scales.size else 0.0  # NaN where one is
    return (largest + moved) * most < _LARGEST


_LARGEST = 3e38
"""The most that certainly becomes a finite bfloat16."""


def _float32(value: float) -> Any:
    import numpy as np

    return np.float32(value)


def _row_numbers(formula: Formula, rows: tuple[int, int]) -> Any:
    """Return the row of the scales at hand for each row; a slice where they are one to one."""
    import numpy as np

    block, first = formula.scales.block[0], formula.grid_row(rows[0])
    if block == 1:
        return slice(None)
    each = np.arange(rows[0], rows[1])
    return each // formula.rows * formula.scales.rows + each % formula.rows // block - first


# --- scales and zero points -------------------------------------------------------------------------------------------


def _scales(formula: Formula, rows: tuple[int, int], columns: int, parts: Iterator[memoryview]) -> Array:
    """Return the scales of some rows in float32."""
    import numpy as np

    scales = formula.scales
    values = _floats(scales, next(parts))
    if scales.inner:
        further = np.frombuffer(next(parts), np.float32)
        first = rows[0] // scales.inner
        numbers = np.arange(rows[0], rows[0] + values.size) // scales.inner - first
        values = values * further[numbers] + _float32(scales.shift)
    if scales.factor is not None:
        values = values * _float32(scales.factor)
    if scales.divisor is not None:
        values = values / _float32(scales.divisor)
    width = -(-columns // scales.block[1]) if formula.turned else scales.columns
    return values.reshape(-1, width)


def _floats(scales: Scales, data: memoryview) -> Array:
    """Return stored scales in float32."""
    import numpy as np

    if scales.is_exponent:
        return _powers()[np.frombuffer(data, np.uint8)]
    if scales.table:
        return np.asarray(scales.table, np.float32)[np.frombuffer(data, np.uint8)]
    if scales.dtype.name == "float32":
        made: Array = np.frombuffer(data, np.float32).copy()
        return made
    wide = Cast(scales.dtype, BY_NAME["float32"], "").run(data, Losses())
    return np.frombuffer(bytes(wide), np.float32)


@cache
def _powers() -> Array:
    """Return the powers of two of e8m0: torch's `pow(2.0, e - 127)`, the last one of which is infinite."""
    import numpy as np

    with np.errstate(over="ignore"):
        made: Array = np.ldexp(np.float64(1), np.arange(256) - 127).astype(np.float32)
        return made


def _zeros(formula: Formula, rows: tuple[int, int], count: int, parts: Iterator[memoryview]) -> Array:
    """Return the zero points of some rows in float32, a row for each of the scales'."""
    import numpy as np

    zeros, data = formula.zeros, next(parts)
    assert zeros is not None
    width = formula.scales.columns
    if zeros.packing == "awq":
        found = _awq(np.frombuffer(data, np.uint32).reshape(-1, width))
        found = found[rows[0] % 8 :][: rows[1] - rows[0]]
    elif zeros.packing:
        words = np.frombuffer(data, np.uint32).reshape(-1, width).T
        found = unpacked(words, zeros.bits, rows[0] * zeros.bits % 32, count).T
    else:
        wide = Cast(zeros.dtype, BY_NAME["float32"], "").run(data, Losses()) if zeros.dtype.name != "float32" else data
        return np.frombuffer(bytes(wide), np.float32).reshape(-1, width)
    if zeros.plus_one:
        found = found + 1
    made: Array = found.astype(np.float32) - _float32(zeros.offset)
    return made


def _by_blocks(formula: Formula, values: Array, numbers: Array, *, subtract: bool) -> None:
    """Multiply the values of each block by its number, or subtract it."""
    import numpy as np

    work = np.subtract if subtract else np.multiply
    width = formula.scales.block[1]
    rows, columns = values.shape
    if formula.groups is not None:
        work(values, numbers[:, formula.groups], out=values)
        return
    if width >= columns:
        work(values, numbers[:, :1], out=values)
        return
    whole = columns // width
    blocks = values[:, : whole * width].reshape(rows, whole, width) if whole * width == columns else None
    if blocks is not None:
        work(blocks, numbers[:, :whole, None], out=blocks)
    else:
        work(values, np.repeat(numbers, width, axis=1)[:, :columns], out=values)


# --- stored numbers ---------------------------------------------------------------------------------------------------


def _decoded(codes: Codes, data: memoryview, rows: tuple[int, int], columns: int) -> Array:
    """Return stored numbers in float32, a row each."""
    import numpy as np

    count = rows[1] - rows[0]
    if codes.kind == "table":
        return _padded(_looked_up(codes.table, data), count, columns)
    if codes.kind == "nibbles":
        return _padded(_pairs(codes, data), count, columns)
    if codes.kind == "int8":
        return np.frombuffer(data, np.int8).astype(np.float32).reshape(count, columns)
    words = np.frombuffer(data, np.uint32)
    if codes.kind == "awq":
        return _awq(words.reshape(-1, columns)).astype(np.float32)[rows[0] % 8 :][:count]
    words = words.reshape(count, -1)
    if codes.bits == 4:
        table = tuple(float(code - codes.offset) for code in range(16))
        return _pairs(Codes("nibbles", table), words.view(np.uint8).reshape(-1).data).reshape(count, -1)[:, :columns]
    found = unpacked(words, codes.bits, 0, columns).astype(np.float32)
    found -= _float32(codes.offset)
    return found


def _padded(values: Array, rows: int, columns: int) -> Array:
    """Return flat values as rows: those of a last row that is cut off are zeros; odd ones at a row's end go."""
    import numpy as np

    if values.size == rows * columns:
        return values.reshape(rows, columns)
    if values.size > rows * columns:
        return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns])
    found = np.zeros(rows * columns, np.float32)
    found[: values.size] = values
    return found.reshape(rows, columns)


def _looked_up(table: tuple[float, ...], data: memoryview) -> Array:
    """Return the values of bytes: two at a time, which takes half as many look-ups."""
    import numpy as np

    stored = np.frombuffer(data, np.uint8)
    if stored.size % 2:
        return _table(table)[stored]
    return _taken(_double(table), stored.view(np.uint16))


def _taken(table: Array, stored: Array) -> Array:
    """Return the pairs of floats that a table has for stored numbers, in memory that is used again."""
    import numpy as np

    places = room("places", stored.size, np.dtype(np.intp))
    np.copyto(places, stored)
    found = room("pairs", stored.size, table.dtype)
    np.take(table, places, out=found, mode="clip")  # which none of them is beyond
    values: Array = found.view(np.float32)
    return values


@cache
def _table(table: tuple[float, ...]) -> Array:
    import numpy as np

    values = np.asarray(table, np.float32)
    values[np.isnan(values)] = np.nan  # the one that torch writes, without a sign
    return values


@cache
def _double(table: tuple[float, ...]) -> Array:
    """Return a table of the values of two bytes, the first of which is in the low bits."""
    import numpy as np

    one = _table(table).view(np.uint32).astype(np.uint64)
    made: Array = (one[np.newaxis, :] | (one[:, np.newaxis] << np.uint64(32))).reshape(-1)
    return made


def _pairs(codes: Codes, data: memoryview) -> Array:
    """Return the values of half bytes."""
    import numpy as np

    stored = np.frombuffer(data, np.uint8)
    return _taken(_of_nibbles(codes.table, codes.high_first), stored)


@cache
def _of_nibbles(table: tuple[float, ...], high_first: bool) -> Array:
    """Return a table of the two values of each byte."""
    import numpy as np

    codes = np.arange(256)
    low, high = (_table(table)[part].view(np.uint32).astype(np.uint64) for part in (codes & 15, codes >> 4))
    first, second = (high, low) if high_first else (low, high)
    made: Array = first | (second << np.uint64(32))
    return made


def unpacked(words: Array, bits: int, begin: int, count: int) -> Array:
    """Return `count` integers of each row of words, from bit `begin` on, one after the other without gaps."""
    import numpy as np

    positions = begin + bits * np.arange(count)
    place, shift = positions // 32, (positions % 32).astype(np.uint32)
    mask = np.uint32((1 << bits) - 1)
    found = (words[:, place] >> shift) & mask
    over = np.flatnonzero(positions % 32 + bits > 32)
    if over.size:
        found[:, over] |= (words[:, place[over] + 1] << (np.uint32(32) - shift[over])) & mask
    made: Array = found
    return made


def _awq(words: Array) -> Array:
    """Return eight rows of integers for each row of words, in their order."""
    import numpy as np

    found = np.empty((len(words), 8, words.shape[1]), np.uint32)
    for place, nibble in enumerate(AWQ_ORDER):
        np.bitwise_and(words >> np.uint32(4 * nibble), np.uint32(15), out=found[:, place])
    return found.reshape(-1, words.shape[1])


# --- the result -------------------------------------------------------------------------------------------------------


def rounded(values: Array, target: DType, losses: Losses, *, is_small: bool) -> Array:
    """Return float32 in the new dtype, rounded to nearest even as torch does."""
    import numpy as np

    if target.name == "float32":
        copied: Array = values.copy()
        return copied
    if target.name == "bfloat16":
        import ml_dtypes

        made: Array = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        if not is_small:
            _fix_extremes(values, made, losses)
        return made
    data = Cast(BY_NAME["float32"], target, "").run(
        np.ascontiguousarray(values).view(np.uint8).reshape(-1).data, losses
    )
    kind = np.dtype(f"u{target.itemsize}")
    return np.frombuffer(bytes(data), kind).reshape(values.shape)


def _fix_extremes(values: Array, made: Array, losses: Losses) -> None:
    """Write NaN as torch does, and count finite values that became infinite."""
    import numpy as np

    if not values.size or max(abs(float(values.max())), abs(float(values.min()))) < _LARGEST:  # False for NaN
        return
    found = np.isnan(values)
    if found.any():
        made[found] = 0x7FC0
    losses.infinite += int(np.count_nonzero(np.isfinite(values) & ((made & 0x7FFF) == 0x7F80)))
