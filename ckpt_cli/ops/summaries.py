"""What `stats` finds: a row for each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli.facts import dataclass

if TYPE_CHECKING:
    from ckpt_cli.arrays.moments import Moments
    from ckpt_cli.arrays.sketch import Spread

_PERCENTILES = ("p1", "p50", "p99")
"""The columns of percentiles."""

_NUMBERS = ("min", "max", "mean", "std", "norm", "zeros", "nan", "inf", "outlier")
"""The columns of numbers that need values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor's line."""

    name: str
    """Its name, with the index that was asked for."""
    dtype: str
    shape: tuple[int, ...] | None
    numel: int
    """Elements as they are stored: a packed float4 has two values in each."""
    moments: Moments | None = None
    """None where there are no values to summarize; `note` says why."""
    edges: Sequence[float | int] = ()
    """Of the histogram's bars, the first being the least and the last the greatest value."""
    counts: Sequence[int] = ()
    note: str = ""
    count: int = 1
    """Tensors of a folded row."""
    spread: Spread | None = None
    """Percentiles and magnitudes, where they were asked for."""

    @property
    def is_bad(self) -> bool:
        """True if it has NaN or infinities."""
        return self.moments is not None and bool(self.moments.nan or self.moments.inf)

    def key(self, key: str) -> Any:
        """Return the sort key: the value of a column, NaN where it has no value."""
        if key in ("name", "numel"):
            return getattr(self, key)
        if key.startswith("p"):
            known = self.spread.percentiles if self.spread else ()
            return known[_PERCENTILES.index(key)] if known else math.nan
        found = getattr(self.moments, {"min": "least", "max": "most"}.get(key, key)) if self.moments else None
        return math.nan if found is None else found

    def facts(self) -> dict[str, Any]:
        """Return the columns with their values; a number that needs values is None where there are none."""
        keys = _NUMBERS if self.spread is None else (*_NUMBERS, *_PERCENTILES)
        numbers = dict.fromkeys(keys) if self.moments is None else {key: self.key(key) for key in keys}
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": self.shape,
            "numel": self.numel,
            **numbers,
            "count": self.count,
            "note": self.note or None,
        }


@dataclass(frozen=True, slots=True)
class Stats:
    """The answer."""

    path: str
    tensors: Sequence[Row]
    total: Row | None = None
    """All of them together, tied ones counted once."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each tensor, for a DataFrame; `total` is not among them."""
        return [row.facts() for row in self.tensors]
