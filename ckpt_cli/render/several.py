"""The answer about one file as a part of a table, and the tables and JSON of several files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from ckpt_cli.facts import dataclass
from ckpt_cli.render.json import rows as rows_json
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import escaped


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one answer, before they are laid out."""

    columns: Sequence[Column]
    rows: Iterable[Sequence[str]]
    after: str = ""
    """Lines below a table for people: totals, or a sentence in place of no rows."""
    headed: bool = True
    """False if an answer without rows has no headings either."""


def block_text(block: Block, style: str) -> Iterator[str]:
    """Yield the answer about one file."""
    rows = iter(block.rows)
    if not block.headed:
        first = list(_first(rows))
        rows = chain(first, rows)
        if not first:
            yield from [block.after] if style == "table" and block.after else ()
            return
    yield from table_text(block.columns, rows, style)
    if style == "table" and block.after:
        yield block.after


def _first(rows: Iterator[Sequence[str]]) -> Iterator[Sequence[str]]:
    for row in rows:
        yield row
        return


def blocks_text(blocks: Iterator[tuple[str, Block]], style: str) -> Iterator[str]:
    """Yield one table of the answers about several files, each with its path.

    The column `file` is the first one of a table. Of bare rows and CSV it is the last one, so that the number of a
    column does not depend on how many files there are.
    """
    first = style in ("table", "markdown")
    after: list[str] = []
    begin = next(blocks, None)
    if begin is None:
        return
    columns = begin[1].columns

    def rows() -> Iterator[Sequence[str]]:
        for path, block in chain([begin], blocks):
            file = escaped(path)
            for row in block.rows:
                yield (file, *row) if first else (*row, file)
            after.extend(f"{file}: {line}" for line in block.after.splitlines(keepends=True))

    heads = (Column("file"), *columns) if first else (*columns, Column("file"))
    yield from table_text(heads, rows(), style)
    if style == "table":
        yield from after


def to_json(answers: Callable[[], Iterable[tuple[str, dict[str, object]]]]) -> object:
    """Return a list of the shapes of single files, each with its `path`; of a failure, `path` and `error`."""
    return rows_json(lambda: ({**({} if "path" in shape else {"path": path}), **shape} for path, shape in answers()))
