"""Statistics of tensors as text and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli.render.json import finite, rows, value_json
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.ops.stats import Row, Stats

_NUMBERS = ("min", "max", "mean", "std", "norm")
_COUNTS = ("zeros", "nan", "inf")
_COLUMNS = (
    Column("name"),
    Column("dtype"),
    Column("shape"),
    *(Column(heading, right=True) for heading in (*_NUMBERS, *_COUNTS)),
    Column("histogram"),
)

_BARS = "▁▂▃▄▅▆▇█"


def to_json(stats: Stats) -> dict[str, object]:
    """Return the statistics as docs/json.md describes them."""
    return {
        "tensors": rows(lambda: map(_row_json, stats.rows)),
        "total": None if stats.total is None else _row_json(stats.total),
    }


def _row_json(row: Row) -> dict[str, object]:
    """Return one row; numbers that need values are None where there are no values, or no finite ones."""
    found = row.moments
    return {
        "name": row.name,
        "dtype": row.dtype,
        "shape": None if row.shape is None else list(row.shape),
        "numel": row.numel,
        "min": found and value_json(found.least),
        "max": found and value_json(found.most),
        "mean": found and (value_json(found.mean) if found.count else None),
        "std": found and (finite(found.std) if found.count else None),
        "norm": found and finite(found.norm),
        "zeros": found and found.zeros,
        "nan": found and found.nan,
        "inf": found and found.inf,
        "histogram": {"edges": [value_json(edge) for edge in row.edges], "counts": list(row.counts)} if found else None,
        "note": row.note or None,
    }


def stats_block(stats: Stats, style: str) -> Block:
    """Return a row for each tensor: for a person with few digits, a share of zeros and a drawn histogram."""
    shown = [*stats.rows, *([stats.total] if stats.total is not None else [])]
    human = style in ("table", "markdown")
    return Block(_COLUMNS, (_cells(row, human=human) for row in shown))


def _cells(row: Row, *, human: bool) -> list[str]:
    name = name_text(row.name)
    shape = shape_text(row.shape) if row.dtype else f"[{row.numel}]"
    if row.moments is None:
        return [name, row.dtype, shape, *[""] * (len(_NUMBERS) + len(_COUNTS)), escaped(row.note)]
    numbers = [_number_text(row.key(key), human=human) for key in _NUMBERS]
    counts = [str(row.key(key)) for key in _COUNTS]
    if human:
        counts[0] = _share(row.moments.zeros, row.moments.count + row.moments.nan + row.moments.inf)
    drawn = _drawn(row.counts) if human else ",".join(map(str, row.counts))
    return [name, row.dtype, shape, *numbers, *counts, drawn]


def _number_text(number: float | int, *, human: bool) -> str:
    if isinstance(number, int):
        return str(number)
    return f"{number:.5g}" if human else repr(number)


def _share(count: int, whole: int) -> str:
    """Return a percentage, which is 0% or 100% only if it is exactly that."""
    if not count or count == whole:
        return "0%" if not count else "100%"
    return f"{min(max(100 * count / whole, 0.01), 99.99):.4g}%"


def _drawn(counts: Sequence[int]) -> str:
    """Draw counts as bars; a count that is not 0 has at least the smallest bar."""
    most = max(counts, default=0)
    if not most:
        return ""
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] if count else " " for count in counts).rstrip()
