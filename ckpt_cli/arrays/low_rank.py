"""Products of two thin matrices added to a matrix, row block by row block: what merging a LoRA adapter computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import frexp
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.cast import Cast, Losses
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

DORA_ROWS, DORA_COLUMNS = "rows", "columns"
"""The lines of a matrix that a DoRA adapter has a magnitude for."""


@dataclass(frozen=True, slots=True)
class Term:
    """What one adapter does to a matrix."""

    scaling: float
    """The number that the product, or the vector, is multiplied by."""
    left: DType
    """The dtype of the left factor, of which each block has its rows."""
    rank: int = 0
    """Columns of the left factor and rows of the right one; 0 for a vector that is added as it is."""
    magnitude: str = ""
    """`rows` or `columns` where those of the sum are scaled to the lengths that DoRA has learned; else empty."""
    dtype: DType = BY_NAME["float32"]
    """The dtype of the magnitudes."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Facts about a block of a sum."""

    losses: Losses
    """The finite sums that the new dtype cannot hold."""
    finite: bool
    """False if there are NaN or infinities among the sums."""


class LowRank:
    """Adds scaled products of thin matrices to blocks of rows of a matrix, and rounds once to the new dtype.

    It is done in float32, or in float64 if the matrix is that: W + s·(B A), the product first, then its scale, as PEFT
    does. The terms are added in their order. After a DoRA term, each row or column of the sum so far is multiplied by
    its magnitude, and divided by the length that it has in the matrix with this term alone. Blocks of one shape give
    the same bits, whoever makes them.

    Raises UnsupportedError for a dtype whose values cannot be read.
    """

    def __init__(self, source: DType, target: DType, columns: int, terms: Sequence[Term], name: str) -> None:
        """`name` is the tensor's, for errors."""
        self._reading = _Reading(source, columns, terms, name)
        self._narrow = _cast(self._reading.wide, target, name)

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Merged]:
        """Return the new elements as bytes, and facts about them.

        `parts` are the rows of the matrix; then for each term the rows of its left factor, all of the right one in the
        wide dtype, and the magnitudes of its rows, or the factors of all columns. Each is used before the next one is
        asked for.
        """
        import numpy as np

        given = iter(parts)
        values = self._reading.matrix(next(given))
        with np.errstate(all="ignore"):
            self._reading.add(values, given)
        losses, data = Losses(), values.reshape(-1).view(np.uint8).data
        finite = _is_finite(values)
        return (data if self._narrow is None else self._narrow.run(data, losses)), Merged(losses, finite)


class SquaresOfColumns:
    """Makes the sum of the squares in each column of a block of such a sum, in float64."""

    def __init__(self, source: DType, columns: int, term: Term, name: str) -> None:
        """`name` is the tensor's, for errors."""
        self._reading = _Reading(source, columns, [term], name)
        self.wide = self._reading.wide

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, None]:
        """Return a row of float64 for the parts that `LowRank` takes."""
        import numpy as np

        given = iter(parts)
        values = self._reading.matrix(next(given))
        with np.errstate(all="ignore"):
            self._reading.add(values, given)
            squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        return squares.view(np.uint8).data, None


class _Reading:
    """Reads blocks of a matrix and of what is added to it, and adds it."""

    def __init__(self, source: DType, columns: int, terms: Sequence[Term], name: str) -> None:
        self.wide = wide_of(source)
        self._columns = columns
        self._terms = terms
        self._widen = _cast(source, self.wide, name)
        self._left = [_cast(term.left, self.wide, name) for term in terms]
        self._magnitudes = [_cast(term.dtype, self.wide, name) for term in terms]

    def matrix(self, data: memoryview) -> Array:
        """Return rows of the matrix in the wide dtype."""
        return self._array(data, self._widen).reshape(-1, self._columns)

    def _array(self, data: memoryview, cast: Cast | None) -> Array:
        """Return elements in the wide dtype, as an array of its own."""
        import numpy as np

        found: Array = np.frombuffer(data if cast is None else cast.run(data, Losses()), self.wide.name)
        return found.copy() if cast is None else found

    def add(self, values: Array, parts: Iterator[memoryview]) -> None:
        """Add all terms to rows of the matrix, in place."""
        by_rows = [term.magnitude == DORA_ROWS for term in self._terms]
        matrix = values.copy() if any(by_rows[1:]) else values
        for number, term in enumerate(self._terms):
            product = self._product(term, parts, self._left[number])
            values += product.reshape(values.shape)
            if not term.magnitude:
                continue
            magnitudes = self._array(next(parts), self._magnitudes[number])
            if by_rows[number]:
                alone = values if matrix is values or not number else matrix + product
                values *= (magnitudes / lengths(alone)).reshape(-1, 1)
            else:
                values *= magnitudes.reshape(1, -1)

    def _product(self, term: Term, parts: Iterator[memoryview], cast: Cast | None) -> Array:
        """Return the scaled product of a term, or its scaled vector."""
        import numpy as np

        left = self._array(next(parts), cast)
        is_power = abs(frexp(term.scaling)[0]) == 0.5  # then it does not matter what is multiplied by it
        if is_power or not term.rank:
            left *= left.dtype.type(term.scaling)
        if not term.rank:
            return left
        right: Array = np.frombuffer(next(parts), self.wide.name).reshape(term.rank, -1)
        product = left.reshape(-1, term.rank) @ right
        if not is_power:
            product *= left.dtype.type(term.scaling)
        return product


def lengths(values: Array) -> Array:
    """Return the length of each row, summed in float64."""
    import numpy as np

    squares = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    found: Array = np.sqrt(squares).astype(values.dtype)
    return found


def wide_of(dtype: DType) -> DType:
    """Return the dtype in which sums of a dtype are made."""
    return BY_NAME["float64" if dtype.name == "float64" else "float32"]


def _cast(source: DType, target: DType, name: str) -> Cast | None:
    return None if source is target else Cast(source, target, name)


def _is_finite(values: Array) -> bool:
    """True if no value is NaN or infinite; looks at each only where their sum is not finite."""
    import numpy as np

    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
