"""Text output of `ties`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import bytes_text, escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.ops.aliasing import Group
    from ckpt_cli.ops.ties import Ties

_COLUMNS = (
    Column("how"),
    Column("names"),
    Column("view"),
    Column("storage"),
    Column("bytes", right=True),
    Column("saved", right=True),
)


def ties_text(ties: Ties, style: str) -> Iterator[str]:
    """Yield one row per group of names that share or repeat bytes; on a terminal, a sentence if there are none."""
    rows = list(_rows(ties, human=style == "table"))
    if not rows and style == "table":
        return iter(["every tensor has bytes of its own\n"])
    return table_text(_COLUMNS, rows, style)


def _rows(ties: Ties, *, human: bool) -> Iterator[list[str]]:
    for how, groups in (("tied", ties.tied), ("overlapping", ties.overlapping), ("co-stored", ties.co_stored)):
        for group in groups:
            yield _group(how, group, human=human)
    for dropped, kept in ties.aliases.items():
        yield ["alias", _names((dropped, kept), human=human), "", "in metadata", "", ""]
    for equal in ties.equal:
        nbytes = bytes_text(equal.nbytes) if human else str(equal.nbytes)
        yield ["equal", _names(equal.names, human=human), "", "stored apart", nbytes, ""]


def _group(how: str, group: Group, *, human: bool) -> list[str]:
    sizes = bytes_text if human else str
    view = "" if group.view is None else f"{group.view.dtype}{shape_text(group.view.shape)}"
    saved = sizes(group.saved) if group.view is not None else ""
    return [how, _names(group.names, human=human), view, escaped(group.storage), sizes(group.nbytes), saved]


def _names(names: tuple[str, ...], *, human: bool) -> str:
    return (", " if human else ",").join(map(name_text, names))
