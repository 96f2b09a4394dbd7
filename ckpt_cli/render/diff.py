"""The differences between two checkpoints as text and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.render.json import finite, value_json
from ckpt_cli.render.screen import paint
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import escaped, name_text, shape_text, short, value_beginning, value_text

if TYPE_CHECKING:
    from ckpt_cli.ops.differences import Change, Diff

_COLUMNS = (
    Column("what"),
    Column("name"),
    Column("a"),
    Column("b"),
    Column("differing", right=True),
    Column("max abs", right=True),
    Column("max rel", right=True),
    Column("first"),
    Column("mean abs", right=True),
    Column("rel L2", right=True),
    Column("cosine", right=True),
)

_WIDTH = 40
"""Characters of a cell in a table."""


def to_json(diff: Diff) -> dict[str, object]:
    """Return the differences as docs/json.md describes them."""
    return {
        "equal": diff.equal,
        "only_a": list(diff.only_a),
        "only_b": list(diff.only_b),
        "changed": [_change_json(change) for change in diff.changed],
        "values": [{"name": fact.name, "a": value_json(fact.a), "b": value_json(fact.b)} for fact in diff.values],
        "ties": [{"names": list(tie.names), "a": tie.a, "b": tie.b} for tie in diff.ties],
        "metadata": [{"key": fact.name, "a": fact.a, "b": fact.b} for fact in diff.metadata],
        "tensors": {
            "equal": diff.tensors_equal,
            "differ": len(diff.differing),
            "only_a": diff.tensors_only_a,
            "only_b": diff.tensors_only_b,
        },
    }


def _change_json(change: Change) -> dict[str, object]:
    return {
        "name": change.name,
        "what": change.what,
        "differing": change.differing,
        "numel": change.numel,
        "max_abs": value_json(change.max_abs),
        "max_rel": value_json(change.max_rel),
        "first": [list(index) for index in change.first],
        "mean_abs": value_json(change.mean_abs),
        "relative_l2": value_json(change.relative_l2),
        "cosine": value_json(change.cosine),
        "a": _side_json(change.a),
        "b": _side_json(change.b),
    }


def _side_json(value: object) -> object:
    """Return a fact, or the values at the first places; complex numbers as pairs."""
    if isinstance(value, list):
        return [_side_json(item) for item in value]
    if isinstance(value, complex):
        return [finite(value.real), finite(value.imag)]
    return value_json(value)


def diff_text(diff: Diff, style: str) -> Iterator[str]:
    """Yield one row per difference, and in a table a line of totals; nothing if there are no differences."""
    rows = list(_rows(diff, human=style == "table"))
    if rows:
        yield from table_text(_COLUMNS, rows, style)
    if rows and style == "table":
        yield totals_text(diff)


def totals_text(diff: Diff) -> str:
    """Return the line of totals: how many tensors are equal, differ, or are in one only."""
    counts = (
        (diff.tensors_equal, "equal", "ok"),
        (len(diff.differing), "differ", "changed"),
        (diff.tensors_only_a, "only in A", "less"),
        (diff.tensors_only_b, "only in B", "more"),
    )
    return ", ".join(paint(f"{count:,} {what}", colour if count else "") for count, what, colour in counts) + "\n"


_BAR = 40
"""Characters of the longest bar of `diff --stat`."""


def stat_text(diff: Diff, style: str) -> Iterator[str]:
    """Yield a line for each tensor, or for several of numbered layers, with a bar; then the totals."""
    rows = diff.by_layer()
    human = style == "table"
    most = max(
        (row.relative_l2 for row in rows if row.relative_l2 is not None and row.relative_l2 < math.inf), default=0
    )
    cells = (
        [
            name_text(row.name),
            str(row.count),
            row.what,
            f"{row.differing} of {row.numel}"
            if row.differing is not None and human
            else _value_text(row.differing, human=human),
            _value_text(row.relative_l2, human=human),
            _bar(row.relative_l2, most),
        ]
        for row in rows
    )
    if rows:
        yield from table_text(_STAT, list(cells), style)
    if human and rows:
        yield totals_text(diff)


_STAT = (
    Column("name"),
    Column("tensors", right=True),
    Column("what"),
    Column("differing", right=True),
    Column("rel L2", right=True),
    Column("bar"),
)


def _bar(value: float | None, most: float) -> str:
    """Return a bar as long as a value is to the greatest one; what cannot be compared has a question mark."""
    if value is None:
        return "?"
    return "+" * (_BAR if value == math.inf or not most else max(round(_BAR * value / most), 1))


def _rows(diff: Diff, *, human: bool) -> Iterator[list[str]]:
    rest = [""] * 7
    for what, names in (("only in a", diff.only_a), ("only in b", diff.only_b)):
        for name in names:
            yield [what, name_text(name), "", "", *rest]
    for change in diff.changed:
        yield _change(change, human=human)
    for fact in diff.values:
        yield ["entry", name_text(fact.name), *(_fact(side, human=human) for side in (fact.a, fact.b)), *rest]
    for tie in diff.ties:
        sides = ["tied" if side else "apart" for side in (tie.a, tie.b)]
        yield ["tie", (", " if human else ",").join(map(name_text, tie.names)), *sides, *rest]
    for fact in diff.metadata:
        yield ["metadata", escaped(fact.name), *(_fact(side, human=human) for side in (fact.a, fact.b)), *rest]


def _change(change: Change, *, human: bool) -> list[str]:
    sides = [_side(side, human=human) for side in (change.a, change.b)]
    if change.what == "shape":
        sides = [shape_text(side) if isinstance(side, list) else "?" for side in (change.a, change.b)]
    if change.differing is None:
        return [change.what, name_text(change.name), *sides, *[""] * 7]
    count = f"{change.differing} of {change.numel}" if human else str(change.differing)
    errors = [_value_text(error, human=human) for error in (change.max_abs, change.max_rel)]
    first = " ".join(map(shape_text, change.first))
    numbers = (change.mean_abs, change.relative_l2, change.cosine)
    return [
        *(change.what, name_text(change.name), *sides, count, *errors, first),
        *(_value_text(number, human=human) for number in numbers),
    ]


def _side(side: object, *, human: bool) -> str:
    """Return the text of a fact, or of the values at the first places."""
    if isinstance(side, list):
        return " ".join(_value_text(value, human=human) for value in side)
    return escaped(str(side))


def _value_text(value: object, *, human: bool) -> str:
    if isinstance(value, float) and human:
        return f"{value:.5g}"
    return "" if value is None else escaped(str(value))


def _fact(value: object, *, human: bool) -> str:
    if value is None:
        return ""
    return short(value_beginning(value), _WIDTH) if human else value_text(value)
