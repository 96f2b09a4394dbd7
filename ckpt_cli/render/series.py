"""A run over its steps as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.files.places import name_of
from ckpt_cli.render.json import finite, rows, value_json
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import escaped, name_text, shape_text, sparkline

if TYPE_CHECKING:
    from ckpt_cli.ops.series import File, Point, Row, Series

MEASURES = ("norm", "std", "change", "max")
"""What a row can be drawn by."""

_LONG = ("name", "step", "file", "dtype", "shape", "norm", "change", "nan", "std", "max", "mean", "inf", "numel")
"""The columns of rows for other programs."""

_EVENTS = 3
"""Events of a row that a table shows."""


def to_json(series: Series, by: str) -> dict[str, object]:
    """Return the series as docs/json.md describes it."""
    return {
        "files": [_file_json(file) for file in series.files],
        "ordered_by": series.by,
        "by": by,
        "tensors": rows(lambda: (_row_json(series, row) for row in series.tensors)),
        "points": rows(lambda: (_point_json(series, row, point) for row in series.tensors for point in row.points)),
    }


def _file_json(file: File) -> dict[str, object]:
    error = None if file.error is None else str(file.error)
    return {"path": file.path, "step": file.step, "epoch": file.epoch, "error": error}


def _row_json(series: Series, row: Row) -> dict[str, object]:
    events = [
        {"path": series.files[event.file].path, "step": series.files[event.file].step, "what": event.what}
        for event in row.events
    ]
    return {"name": row.name, "count": row.count, "events": events}


def _point_json(series: Series, row: Row, point: Point) -> dict[str, object]:
    file = series.files[point.file]
    return {
        "name": row.name,
        "file": point.file,
        "path": file.path,
        "step": file.step,
        "epoch": file.epoch,
        "dtype": point.dtype,
        "shape": None if point.shape is None else list(point.shape),
        "numel": point.numel,
        "norm": finite(point.norm),
        "mean": None if point.max is None else finite(point.mean),
        "std": None if point.max is None else finite(point.std),
        "max": value_json(point.max),
        "nan": point.nan,
        "inf": point.inf,
        "change": None if point.change is None else finite(point.change),
    }


def series_text(series: Series, by: str, style: str, *, ascii_only: bool = False) -> Iterator[str]:
    """Yield a row for each tensor with its course drawn; for other programs, one for each tensor and file."""
    if style in ("tsv", "csv"):
        columns = [Column(heading) for heading in _LONG]
        return table_text(columns, (_long(series, row, point) for row in series.tensors for point in row.points), style)
    columns = [
        Column("name"),
        Column("shape"),
        *(Column(heading, right=True) for heading in (f"first {by}", f"last {by}", "most change", "at", "nan")),
        Column(by),
        Column("events"),
    ]
    if not any(row.events for row in series.tensors):
        columns.pop()
    shown = (_cells(series, row, by, ascii_only=ascii_only)[: len(columns)] for row in series.tensors)
    return table_text(columns, shown, style)


def _long(series: Series, row: Row, point: Point) -> list[str]:
    file = series.files[point.file]
    numbers = [_exact(value) for value in (point.norm, point.change)]
    more = [_exact(value) for value in (point.std, point.max, point.mean)]
    step = "" if file.step is None else str(file.step)
    place = [name_text(row.name), step, escaped(file.path), point.dtype, shape_text(point.shape)]
    return [*place, *numbers, str(point.nan), *more, str(point.inf), str(point.numel)]


def _exact(value: float | int | None) -> str:
    return "" if value is None else repr(value)


def _cells(series: Series, row: Row, by: str, *, ascii_only: bool) -> list[str]:
    values = [_measure(point, by) for point in row.points]
    known = [value for value in values if value is not None]
    changes = [(point.change, -point.file) for point in row.points if point.change is not None]
    most, place = max(changes, default=(None, 0))
    drawn: list[float | None] = [None] * len(series.files)
    for point, value in zip(row.points, values, strict=True):
        drawn[point.file] = math.nan if point.nan or point.inf else value
    return [
        name_text(row.name) if row.count == 1 else f"{name_text(row.name)} ({row.count})",
        shape_text(row.points[-1].shape) if row.points else "",
        *(_short(value) for value in (known[0] if known else None, known[-1] if known else None, most)),
        "" if most is None else step_text(series, -place),
        str(max((point.nan for point in row.points), default=0)),
        sparkline(drawn, ascii_only=ascii_only),
        _events_text(series, row).replace("→", "->" if ascii_only else "→"),
    ]


def _measure(point: Point, by: str) -> float | None:
    value = getattr(point, by)
    return None if value is None else float(value)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def step_text(series: Series, number: int) -> str:
    """Return what a file is called in a table: its step or epoch where these order the run, else its name."""
    file = series.files[number]
    known = {"step": file.step, "epoch": file.epoch}.get(series.by)
    return escaped(name_of(file.path)) if known is None else str(known)


def _events_text(series: Series, row: Row) -> str:
    """Return what became of the tensor, and from which file on."""
    said = [f"{escaped(event.what)} at {step_text(series, event.file)}" for event in row.events[:_EVENTS]]
    more = f"; and {len(row.events) - _EVENTS} more" if len(row.events) > _EVENTS else ""
    return "; ".join(said) + more
