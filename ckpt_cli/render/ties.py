"""Tied names and shared bytes as text and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.render.screen import paint
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import bytes_text, escaped, name_text, shape_text

if TYPE_CHECKING:
    from ckpt_cli.ops.aliasing import Group
    from ckpt_cli.ops.ties import Ties, Verdict

_COLUMNS = (
    Column("how"),
    Column("names"),
    Column("view"),
    Column("storage"),
    Column("bytes", right=True),
    Column("saved", right=True),
)


def to_json(ties: Ties) -> dict[str, object]:
    """Return the groups as docs/json.md describes them."""
    return {
        "path": ties.path,
        "tied": [_group_json(group) for group in ties.tied],
        "overlapping": [_group_json(group) for group in ties.overlapping],
        "co_stored": [_group_json(group) for group in ties.co_stored],
        "aliases": dict(ties.aliases),
        "equal": [{"names": list(group.names), "nbytes": group.nbytes} for group in ties.equal],
        "claim": ties.claim,
    }


def _group_json(group: Group) -> dict[str, object]:
    facts: dict[str, object] = {"names": list(group.names), "storage": group.storage, "nbytes": group.nbytes}
    if group.view is not None:
        shape = list(group.view.shape or ())
        facts |= {"dtype": group.view.dtype.name, "shape": shape, "saved": group.saved}
    return facts


def verdict_to_json(verdict: Verdict) -> dict[str, object]:
    """Return the result of `ties FILE A B`."""
    return asdict(verdict)


def verdict_text(verdict: Verdict) -> str:
    """Return the verdict as a sentence on a line."""
    return f"{paint(escaped(verdict.reason), 'ok' if verdict.tied else 'error')}\n"


def ties_block(ties: Ties, style: str) -> Block:
    """Return one row per group of names that share or repeat bytes; on a terminal, a sentence if there are none."""
    rows = list(_rows(ties, human=style == "table"))
    return Block(_COLUMNS, rows, "" if rows else "every tensor has bytes of its own\n")


def verdict_block(verdict: Verdict) -> Block:
    """Return the result of `ties FILE A B` as a row."""
    return Block((Column("verdict"),), [[escaped(verdict.reason)]])


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
