"""Text output of `ls` and `info`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from ckpt_cli.model.checkpoint import Entry, Opaque, Tensor, Value
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.text import bytes_text, count_text, escaped, name_text, shape_text, short, value_beginning

if TYPE_CHECKING:
    from ckpt_cli.ops.info import Summary
    from ckpt_cli.ops.ls import Listing, Waste
    from ckpt_cli.ops.ls_fold import Fold

_BASIC = (Column("name"), Column("dtype"), Column("shape"), Column("bytes", right=True))
_LONG = (
    Column("kind"),
    Column("requires_grad"),
    Column("device"),
    Column("stride"),
    Column("storage"),
    Column("offset", right=True),
    Column("tie"),
    Column("layout"),
)
_VALUE = (Column("value"),)
_COUNT = (Column("count", right=True),)

_LINE = 400
"""Characters of a fact."""

_METADATA = 1000
"""Entries of the metadata that `info` shows."""


def listing_text(
    listing: Listing, rows: Sequence[Entry | Fold], style: str, *, long: bool, values: bool, folded: bool
) -> Iterator[str]:
    """One row an entry; a table ends with a line of totals."""
    columns = (*_BASIC, *(_LONG if long else ()), *(_VALUE if values else ()), *(_COUNT if folded else ()))
    ties = _tie_numbers(listing) if long else {}
    human = style == "table"
    cells = (_cells(row, ties, human=human, long=long, values=values, folded=folded) for row in rows)
    yield from table_text(columns, cells, style)
    if human:
        yield _totals(listing)


def _tie_numbers(listing: Listing) -> dict[str, str]:
    """A number for each group of tied names, in the order of their first ones."""
    numbers: dict[str, str] = {}
    groups: dict[int, str] = {}
    for name, names in listing.tied.items():
        numbers[name] = groups.setdefault(id(names), str(len(groups) + 1))
    return numbers


def _cells(
    row: Entry | Fold, ties: dict[str, str], *, human: bool, long: bool, values: bool, folded: bool
) -> list[str]:
    if isinstance(row, Value):
        blank = [""] * (len(_LONG) if long else 0)
        kind = "object" if isinstance(row.value, Opaque) else type(row.value).__name__
        text = [value_beginning(row.value)] if values else []
        return [name_text(row.name), kind, "", "", *blank, *text, *([""] if folded else [])]
    tensor, nbytes, count = (row, row.nbytes, 1) if isinstance(row, Tensor) else (row.first, row.nbytes, row.count)
    cells = [
        name_text(row.name),
        tensor.dtype.name,
        shape_text(tensor.shape),
        bytes_text(nbytes) if human else str(nbytes),
    ]
    if long:
        places = _places(row, ties) if isinstance(row, Tensor) else [""] * 3
        requires_grad = "yes" if tensor.requires_grad else "no"
        cells += [tensor.kind, requires_grad, escaped(tensor.device), shape_text(tensor.stride), *places, tensor.layout]
    if values:
        cells.append("")
    if folded:
        cells.append(str(count))
    return cells


def _places(tensor: Tensor, ties: dict[str, str]) -> list[str]:
    """Storage, offset and tie, which each of some folded tensors has for itself."""
    storage = "" if tensor.storage is None else escaped(tensor.storage.key)
    return [storage, str(tensor.storage_offset), ties.get(tensor.name, "")]


def _totals(listing: Listing) -> str:
    return (
        f"{count_text(listing.tensors, 'tensor')}, {count_text(listing.parameters, 'parameter')}, "
        f"{bytes_text(listing.nbytes)}, {listing.format}\n"
    )


def waste_text(rows: Sequence[Waste], style: str) -> Iterator[str]:
    """Yield one row per storage that is larger than its views; on a terminal, a sentence if there are none."""
    if not rows and style == "table":
        return iter(["no storage is larger than its tensors\n"])
    sizes = bytes_text if style == "table" else str
    columns = (Column("storage"), *(Column(word, right=True) for word in ("bytes", "used", "waste")), Column("names"))
    cells = (
        [
            escaped(row.storage),
            sizes(row.nbytes),
            sizes(row.used),
            sizes(row.nbytes - row.used),
            ",".join(map(name_text, row.names)),
        ]
        for row in rows
    )
    return table_text(columns, cells, style)


def summary_text(summary: Summary, style: str) -> Iterator[str]:
    """One fact a row."""
    if style == "table":
        width = max(len(label) for label, _ in _facts(summary, human=True))
        for label, text in _facts(summary, human=True):
            yield f"{label:{width}}  {text}\n"
    else:
        yield from table_text((Column("fact"), Column("value")), _facts(summary, human=False), style)


def _format(summary: Summary) -> str:
    """The format's name, with what the container says of its version."""
    version = escaped(summary.version)
    return version if version.startswith(summary.format) else f"{summary.format} ({version})"


def _facts(summary: Summary, *, human: bool) -> list[tuple[str, str]]:
    """Label and text of every fact that there is something to say of."""
    sizes = bytes_text if human else str
    counts = (lambda number: f"{number:,}") if human else str
    facts = [
        ("path", escaped(summary.path)),
        ("format", _format(summary)),
        ("file size", sizes(summary.file_nbytes)),
        ("shards", counts(summary.shards)),
        ("tensors", counts(summary.tensors)),
        ("parameters", counts(summary.parameters)),
        ("tensor bytes", sizes(summary.nbytes)),
    ]
    facts += [
        (f"dtype {name}", f"{count_text(share.tensors, 'tensor')}, {count_text(share.numel, 'parameter')}")
        for name, share in summary.dtypes.items()
    ]
    if summary.values:
        facts.append(("other entries", counts(summary.values)))
    if summary.top_level:
        facts.append(("top level", _some_names(summary.top_level)))
    if summary.ties:
        facts.append(("ties", f"{count_text(summary.ties, 'group')}, {sizes(summary.tie_nbytes)} saved"))
    if summary.waste_nbytes:
        facts.append(("waste", f"{sizes(summary.waste_nbytes)} that no tensor uses"))
    facts += [
        (f"metadata {name_text(key[:_LINE])}", short(escaped(text[: _LINE + 1]), _LINE))
        for key, text in islice(summary.metadata.items(), _METADATA)
    ]
    if len(summary.metadata) > _METADATA:
        facts.append(("metadata", f"{len(summary.metadata) - _METADATA} more"))
    if summary.objects:
        facts.append(("objects", _some_names(summary.objects)))
    return facts


def _some_names(names: Sequence[str]) -> str:
    """The first of some names, as far as they fit on a line."""
    return short(" ".join(name_text(name[:_LINE]) for name in names[:_LINE]), _LINE)
