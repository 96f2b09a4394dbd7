"""Rows as text in each of the layouts of `--format`; a table on a terminal fits it (`render/fit.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.render import screen

_TABULATE = {"table": "simple", "markdown": "pipe"}
"""The names that tabulate has for the styles."""

_AREA = 24_000_000
"""Characters of a table with aligned columns; tabulate takes a few times as much memory."""

_CELLS = 1_000_000
"""Cells of a table with aligned columns; tabulate spends some microseconds on each."""


@dataclass(frozen=True, slots=True)
class Column:
    """The heading and the alignment of a column, and what a terminal that is too narrow for it does."""

    heading: str
    right: bool = False
    role: str = ""
    """What its cells are (`render/fit.py` lists the roles); empty for what the heading says, if it is a known one."""
    stays: bool = False
    """True if it is never left out where a terminal is too narrow."""


def table_text(columns: Sequence[Column], rows: Iterable[Sequence[str]], style: str) -> Iterator[str]:
    """Yield rows in `style`: `table`, `markdown` and `csv` with headings, `tsv` without.

    A `table` that is made for a terminal has lines no longer than that is wide.
    """
    if style == "tsv":
        for row in rows:
            yield "\t".join(row) + "\n"
    elif style == "csv":
        yield from _csv(chain([[column.heading for column in columns]], rows))
    elif style == "table" and (terminal := screen.current()) is not None:
        from ckpt_cli.render.fit import fitted

        yield from fitted(columns, _bounded(columns, rows), terminal)
    else:
        yield _drawn(columns, rows, style)


def facts_text(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield a line for each label with its text, the texts below each other; on a terminal, they are broken to fit."""
    terminal = screen.current()
    width = max((screen.width_of(label) for label, _ in facts), default=0)
    if terminal is None:
        for label, text in facts:
            yield f"{screen.padded(label, width)}  {text}\n"
        return
    indent = min(width, max(terminal.columns // 3, 20)) + 2
    for label, text in facts:
        first, *more = screen.wrapped(text, terminal.columns - indent, 0)
        if screen.width_of(label) > indent - 2:
            yield "".join(f"{line}\n" for line in screen.wrapped(label, terminal.columns, 4))
            label = ""
        yield f"{screen.padded(label, indent)}{first}\n"
        yield "".join(f"{' ' * indent}{line}\n" for line in more)


def _bounded(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Yield the same rows; raises UnsupportedError for more than can be aligned in bounded memory."""
    size = 0
    for count, row in enumerate(rows, 1):
        size += sum(map(len, row))
        if size > _AREA or count * len(columns) > _CELLS:
            raise UnsupportedError(
                f"these are more than {count - 1:,} rows, too many to align", hint="-f tsv aligns nothing"
            )
        yield row


def _csv(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    import csv
    import io

    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for row in rows:
        writer.writerow(row)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _drawn(columns: Sequence[Column], rows: Iterable[Sequence[str]], style: str) -> str:
    from tabulate import tabulate

    cells = [[cell.replace("|", "\\|") for cell in row] if style == "markdown" else row for row in rows]
    if not cells:
        return ""
    width = sum(max(map(len, column)) for column in zip(*cells, strict=True))
    if width * len(cells) > _AREA or len(columns) * len(cells) > _CELLS:  # one long name makes every row as long
        raise UnsupportedError(
            f"{len(cells):,} rows of {width:,} characters are too many to align", hint="-f tsv aligns nothing"
        )
    text = tabulate(
        cells,
        headers=[column.heading for column in columns],
        tablefmt=_TABULATE[style],
        disable_numparse=True,
        colalign=["right" if column.right else "left" for column in columns],
    )
    return "".join(line.rstrip() + "\n" for line in text.splitlines())
