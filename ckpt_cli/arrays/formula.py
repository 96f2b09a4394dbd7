"""Facts of how stored numbers become floats: codes, scales, zero points, and the shape in which they belong together.

`arrays/dequantize.py` does what they say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.dtypes import DType
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*_E2M1, *(-value for value in _E2M1))
"""The values of the sixteen codes of e2m1 (OCP Microscaling Formats, 5.3.3)."""


@dataclass(frozen=True, slots=True)
class Codes:
    """The meaning of stored numbers."""

    kind: str
    """`table` (a float a byte), `nibbles` (two values a byte), `int8`, `bits` (dense in words along a row),
    `awq` (eight rows in the words of one)."""
    table: tuple[float, ...] = ()
    """The values of the codes, for tables and nibbles."""
    bits: int = 8
    """Of an integer within words."""
    offset: int = 0
    """What is subtracted from it."""
    high_first: bool = False
    """True if the first of two values is in the high four bits."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The numbers that blocks of values are multiplied by, one each: a matrix of them for each matrix of values."""

    dtype: DType
    rows: int
    columns: int
    block: tuple[int, int]
    """Rows and columns of a block; the last ones may be cut off."""
    is_exponent: bool = False
    """True for bytes e that stand for 2**(e - 127)."""
    factor: float | None = None
    """Multiplied into every scale first."""
    divisor: float | None = None
    """Divided out of every scale first."""
    after: float | None = None
    """Multiplied into the product."""
    table: tuple[float, ...] = ()
    """The values of scales that are codes themselves: these are multiplied by further ones, a block of them each."""
    inner: int = 0
    """Scales that share one further scale."""
    shift: float = 0.0
    """Added to such scales."""


@dataclass(frozen=True, slots=True)
class Zeros:
    """The zero points, one for each scale: plain integers, or packed along the rows of the weight."""

    dtype: DType
    packing: str = ""
    """`bits` or `awq`; empty for plain ones."""
    bits: int = 8
    offset: int = 0
    """What is subtracted from a packed one."""
    plus_one: bool = False
    """True if what is stored is one less (GPTQ's first version)."""


@dataclass(frozen=True, slots=True)
class Formula:
    """The way from the stored numbers of a matrix to floats."""

    codes: Codes
    rows: int
    """Rows of one matrix; a tensor of more dimensions is several, one after the other."""
    columns: int
    target: DType
    scales: Scales
    zeros: Zeros | None = None
    groups: Array | None = None
    """The column of its scale for each column, where these are out of order."""
    flat: int = 0
    """Elements in all, where rows are but blocks of a flat list, the last of which may be cut off; else 0."""
    turned: bool = False
    """True if each matrix is made transposed: its columns, some at a time, become rows."""

    def grid_row(self, row: int) -> int:
        """Return the row of the scales that belongs to a row of the tensor."""
        scales = self.scales
        return row // self.rows * scales.rows + row % self.rows // scales.block[0]
