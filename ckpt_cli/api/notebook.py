"""HTML of checkpoints and tensors for notebooks: facts alone, no values are read; names are text, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from ckpt_cli.model.checkpoint import Deferred, Entry, Tensor
from ckpt_cli.render.text import bytes_text, escaped, shape_text, short, value_beginning

_MOST = 20
"""Entries of a table."""

_WIDTH = 60
"""Characters of a value."""

_NAME = 300
"""Characters of a name."""


def entries_html(title: str, entries: Sequence[Entry], prefix: str = "") -> str:
    """Return a title and a table of the first entries, named by what follows the prefix."""
    rows = (_row(entry, prefix) for entry in islice(entries, _MOST))
    more = f"<p>and {len(entries) - _MOST:,} more</p>" if len(entries) > _MOST else ""
    return f"<div><code>{_text(title)}</code>{_table(('name', 'dtype', 'shape', 'size'), rows)}{more}</div>"


def tensor_html(title: str, tensor: Tensor) -> str:
    """Return a title and a table of a tensor's facts."""
    facts = {
        "dtype": tensor.dtype.name,
        "shape": shape_text(tensor.shape),
        "stride": shape_text(tensor.stride),
        "elements": f"{tensor.numel:,}",
        "size": bytes_text(tensor.nbytes),
        "kind": tensor.kind,
        "requires_grad": str(tensor.requires_grad),
    }
    return f"<div><code>{_text(title)}</code>{_table(tuple(facts), [list(facts.values())])}</div>"


def _row(entry: Entry, prefix: str) -> list[str]:
    name = short(escaped(entry.name[len(prefix) :]), _NAME)
    if isinstance(entry, Tensor):
        return [name, entry.dtype.name, shape_text(entry.shape), bytes_text(entry.nbytes)]
    if isinstance(entry.content, Deferred) and not entry.content.is_loaded:
        return [name, "…", "", ""]
    return [name, short(value_beginning(entry.value), _WIDTH), "", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; every cell is text."""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _text(text: str) -> str:
    return escape(text)
