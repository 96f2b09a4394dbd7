"""Find rows and columns of a matrix whose elements all have the same bits, from pieces of it, without decoding them.

A piece says what its whole rows show. Rows that pieces cut, and columns that no piece rules out, are few: whoever
merged the pieces reads them again.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[Any]

LEAST = 8
"""Elements that a row or column must have, so that equal ones are no coincidence."""

WIDEST = 1 << 18
"""Bytes of a row beyond which a matrix is not looked into: each piece shall have several rows."""

_AT_ONCE = 64
"""Rows that are compared at once."""

_FEW = 16
"""Columns of which one is looked at alone; of more, whole rows are compared."""

EXAMPLES = 3
"""Numbers of rows and columns that are kept to be named."""


@dataclass(slots=True)
class Lines:
    """The rows and columns of equal elements in a run of a matrix."""

    rows: int = 0
    """Whole rows of equal elements."""
    zeros: int = 0
    """Those of them that are zeros."""
    first: list[int] = field(default_factory=list)
    """The numbers of the first of them."""
    cut: list[int] = field(default_factory=list)
    """Rows of which the run has only a part."""
    columns: dict[int, bytes] | None = None
    """The columns that may be of equal elements, with the bits of these; None where no whole row was seen."""


def merged_lines(a: Lines | None, b: Lines | None) -> Lines | None:
    """Return what two runs show, `b` after `a`; the first one is changed."""
    if a is None or b is None:
        return a if b is None else b
    a.rows += b.rows
    a.zeros += b.zeros
    a.first = (a.first + b.first)[:EXAMPLES]
    a.cut += b.cut
    if a.columns is None:
        a.columns = b.columns
    elif b.columns is not None:
        a.columns = {number: bits for number, bits in a.columns.items() if b.columns.get(number) == bits}
    return a


def lines_of(data: memoryview, begin: int, width: int, itemsize: int, *, rows_alone: bool = False) -> Lines:
    """Return what a run of elements of 1, 2, 4 or 8 bytes shows that begins with element `begin` of a matrix.

    With `rows_alone` columns are not looked for: a single row leaves every one of them.
    """
    import numpy as np

    end = begin + len(data) // itemsize
    first, after = -(-begin // width), end // width
    found = Lines()
    if after <= first:
        found.cut = sorted({begin // width, (end - 1) // width})
        return found
    found.cut = ([begin // width] if begin % width else []) + ([after] if end % width else [])
    whole = data[(first * width - begin) * itemsize : (after * width - begin) * itemsize]
    rows = np.frombuffer(whole, f"u{itemsize}").reshape(-1, width)
    numbers = _same_rows(rows)
    found.rows, found.zeros = len(numbers), int(np.count_nonzero(rows[numbers, 0] == 0))
    found.first = [first + int(number) for number in numbers[:EXAMPLES]]
    if not rows_alone:
        found.columns = {int(number): rows[0, number].tobytes() for number in _same_columns(rows)}
    return found


def _probes(count: int) -> set[int]:
    """Return elements of a line that differ from its first one in nearly every line."""
    return {count - 1, (count - 1) // 2, (count - 1) // 3, (count - 1) // 5}


def _same_rows(rows: Bits) -> Bits:
    """Return the numbers of the rows of equal elements."""
    import numpy as np

    same = np.ones(len(rows), bool)
    for probe in _probes(rows.shape[1]):
        same &= rows[:, 0] == rows[:, probe]
    likely = np.flatnonzero(same)
    for at in range(0, len(likely), _AT_ONCE):
        some = likely[at : at + _AT_ONCE]
        part = rows[some]
        same[some] = (part == part[:, :1]).all(axis=1)
    return np.flatnonzero(same)


def _same_columns(rows: Bits) -> Bits:
    """Return the numbers of the columns of equal elements, read row by row until none is left."""
    import numpy as np

    same = np.ones(rows.shape[1], bool)
    for probe in _probes(len(rows)):
        same &= rows[0] == rows[probe]
    likely = np.flatnonzero(same)
    for at in range(0, len(rows) if len(likely) else 0, _AT_ONCE):
        part = rows[at : at + _AT_ONCE]
        if len(likely) * _FEW < len(same):
            likely = likely[(part[:, likely] == rows[0, likely]).all(axis=0)]
        else:  # comparing all is faster than gathering some
            likely = likely[(part == rows[0]).all(axis=0)[likely]]
        if not len(likely):
            break
    return likely
