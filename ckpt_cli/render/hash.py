"""Text output of `hash`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import count_text, name_text

if TYPE_CHECKING:
    from ckpt_cli.ops.hash import Hashes, Verdict

_COLUMNS = (Column("hash"), Column("name"))
_DIFFERENCES = (Column("what"), Column("name"))


def hashes_text(hashes: Hashes, style: str) -> Iterator[str]:
    """One row a tensor, the whole checkpoint last."""
    rows = [[digest, name_text(name)] for name, digest in hashes.tensors.items()]
    yield from table_text(_COLUMNS, [*rows, [hashes.checkpoint, "(checkpoint)"]], style)
    if style == "table":
        yield f"{count_text(len(rows), 'tensor')}, {hashes.algorithm}\n"


def verdict_text(verdict: Verdict, style: str) -> Iterator[str]:
    """One row a tensor that is not what the manifest says; nothing where all are."""
    rows = [
        [what, name_text(name)]
        for what, names in (("differs", verdict.differ), ("missing", verdict.missing), ("new", verdict.new))
        for name in names
    ]
    return table_text(_DIFFERENCES, rows, style) if rows else iter(())
