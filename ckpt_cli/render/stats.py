"""Statistics of tensors as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.errors import listed
from ckpt_cli.render import screen
from ckpt_cli.render.json import finite, rows, value_json
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import bars, brief_name, escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.ops.summaries import Row, Stats

_NUMBERS = ("min", "max", "mean", "std", "norm")
_COUNTS = ("zeros", "nan", "inf")
_COLUMNS = (
    Column("name"),
    Column("dtype"),
    Column("shape"),
    *(Column(heading, right=True) for heading in (*_NUMBERS, *_COUNTS)),
    Column("histogram"),
)

_NAMED = 5
"""Tensors without numbers that are named on a terminal, for each reason."""

_MORE = (*(Column(heading, right=True) for heading in ("p1", "p50", "p99", "outlier")), Column("magnitudes"))


def to_json(stats: Stats) -> dict[str, object]:
    """Return the statistics as docs/json.md describes them."""
    return {
        "tensors": rows(lambda: map(row_json, stats.tensors)),
        "total": None if stats.total is None else row_json(stats.total),
    }


def row_json(row: Row) -> dict[str, object]:
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
        "count": row.count,
        "outlier": found and finite(found.outlier),
        **_spread_json(row),
    }


def _spread_json(row: Row) -> dict[str, object]:
    """Return percentiles and magnitudes; None where they were not asked for, or there is nothing to count."""
    spread = row.spread
    keys = ("p1", "p50", "p99")
    if spread is None:
        return {**dict.fromkeys(keys), "magnitudes": None}
    known = map(finite, spread.percentiles) if spread.percentiles else [None] * len(keys)
    magnitudes = {"edges": [finite(edge) for edge in spread.edges], "counts": list(spread.counts)}
    return {**dict(zip(keys, known, strict=True)), "magnitudes": magnitudes}


def stats_block(
    stats: Stats, style: str, *, ascii_only: bool = False, percentiles: bool = False, drawn: bool = True
) -> Block:
    """Return a row for each tensor: for a person with few digits, a share of zeros and a drawn histogram.

    With `percentiles` these, the outlier and the magnitudes come last. Without `drawn` there is no histogram, and the
    last column has the reason where there are no numbers; on a terminal with it, that is said below the table.
    """
    shown = [*stats.tensors, *([stats.total] if stats.total is not None else [])]
    human = style in ("table", "markdown")
    below = drawn and style == "table" and screen.current() is not None  # which may have no room for the histogram
    cells = (_cells(row if not below else replace(row, note=""), human=human, ascii_only=ascii_only) for row in shown)
    if not drawn:
        return Block([*_COLUMNS[:-1], Column("note", role="names")], cells)
    after = "".join(_note_lines(shown)) if below else ""
    if not percentiles:
        return Block(_COLUMNS, cells, after)
    more = (_more(row, human=human, ascii_only=ascii_only) for row in shown)
    return Block([*_COLUMNS, *_MORE], ([*a, *b] for a, b in zip(cells, more, strict=True)), after)


def _note_lines(shown: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each reason for which tensors have no numbers, with the first of their names."""
    names: dict[str, list[str]] = {}
    for row in shown:
        if row.moments is None:
            names.setdefault(row.note, []).append(row.name)
    for note, group in names.items():
        yield f"{listed(group, _NAMED, brief_name)}: {escaped(note)}\n"


def _more(row: Row, *, human: bool, ascii_only: bool) -> list[str]:
    """Return the percentiles, the outlier and the magnitudes."""
    if row.moments is None or row.spread is None:
        return [""] * len(_MORE)
    numbers = [_number_text(row.key(column.heading), human=human) for column in _MORE[:-1]]
    counts = row.spread.counts
    if human:
        drawn = bars(counts, ascii_only=ascii_only)
        ends = [math.log2(edge) if edge < math.inf else 1024 for edge in row.spread.edges]
        return [*numbers, f"{drawn} 2^{ends[0]:.0f}..2^{ends[-1]:.0f}" if ends else ""]
    return [*numbers, ",".join(f"{edge:g}:{count}" for edge, count in zip(row.spread.edges, counts, strict=False))]


def _cells(row: Row, *, human: bool, ascii_only: bool) -> list[str]:
    name = name_text(row.name)
    shape = shape_text(row.shape) if row.dtype else f"[{row.numel}]"
    if row.moments is None:
        return [name, row.dtype, shape, *[""] * (len(_NUMBERS) + len(_COUNTS)), escaped(row.note)]
    numbers = [_number_text(row.key(key), human=human) for key in _NUMBERS]
    counts = [str(row.key(key)) for key in _COUNTS]
    if human:
        counts[0] = _share(row.moments.zeros, row.moments.count + row.moments.nan + row.moments.inf)
    drawn = bars(row.counts, ascii_only=ascii_only) if human else ",".join(map(str, row.counts))
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
