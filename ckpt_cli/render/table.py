"""Rows as text in each of the layouts of `--format`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.facts import dataclass

_TABULATE = {"table": "simple", "markdown": "pipe"}
"""The names that tabulate has for the styles."""

_AREA = 24_000_000
"""Characters of a table with aligned columns; tabulate takes a few times as much memory."""

_CELLS = 1_000_000
"""Cells of a table with aligned columns; tabulate spends some microseconds on each."""


@dataclass(frozen=True, slots=True)
class Column:
    """The heading and the alignment of a column."""

    heading: str
    right: bool = False


def table_text(columns: Sequence[Column], rows: Iterable[Sequence[str]], style: str) -> Iterator[str]:
    """Yield rows in `style`: `table`, `markdown` and `csv` with headings, `tsv` without."""
    if style == "tsv":
        for row in rows:
            yield "\t".join(row) + "\n"
    elif style == "csv":
        yield from _csv(chain([[column.heading for column in columns]], rows))
    else:
        yield _drawn(columns, rows, style)


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
