"""The entries and the waste of a checkpoint as text and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Entry, Opaque, Tensor, Value
from ckpt_cli.render.json import entry_json, tensor_json
from ckpt_cli.render.json import rows as rows_json
from ckpt_cli.render.screen import paint
from ckpt_cli.render.several import Block
from ckpt_cli.render.table import Column
from ckpt_cli.render.text import bytes_text, count_text, escaped, name_text, shape_text, value_beginning

if TYPE_CHECKING:
    from ckpt_cli.formats.salvage.found import Salvaged
    from ckpt_cli.ops.ls import Fold, Listing, Waste

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

_TIES = 4_000_000
"""Names in all that `tied_with` of the JSON spells out."""

_TIED_TEXT = 200_000_000
"""Characters of these names in all."""


def to_json(listing: Listing, rows: Sequence[Entry | Fold], cut: Salvaged | None = None) -> dict[str, object]:
    """Return the listing as docs/json.md describes it, each entry made when its turn comes.

    Of a `cut` file it says what is lost. Raises UnsupportedError if the entries name too many tied ones.
    """
    if _is_beyond(listing.tied, rows):
        raise UnsupportedError(
            "too many names are tied to list each with all the others",
            hint="ckpt ties FILE lists each group once",
        )
    lost: dict[str, object] = {}
    if cut is not None:
        from ckpt_cli.render.salvage import lost_to_json

        lost = {"problem": cut.problem, "lost": lost_to_json(cut.lost)}
    return {
        "path": listing.path,
        "format": listing.format,
        "entries": rows_json(lambda: (_row_json(row, listing.tied) for row in rows)),
        "tensors": listing.tensors,
        "parameters": listing.parameters,
        "nbytes": listing.nbytes,
        **lost,
    }


def _is_beyond(tied: Mapping[str, list[str]], rows: Sequence[Entry | Fold]) -> bool:
    """True if the names with which the rows are tied are more than are written."""
    lengths: dict[int, int] = {}
    count = text = 0
    for row in rows:
        if (names := tied.get(row.name)) is not None:
            if id(names) not in lengths:
                lengths[id(names)] = sum(map(len, names))
            count += len(names)
            text += lengths[id(names)]
    return count > _TIES or text > _TIED_TEXT


def _row_json(row: Entry | Fold, tied: Mapping[str, list[str]]) -> dict[str, object]:
    if isinstance(row, Tensor):
        return tensor_json(row, tied)
    if isinstance(row, Value):
        return entry_json(row)
    return {
        **tensor_json(row.first, {}),
        "name": row.name,
        "numel": row.first.numel * row.count,
        "nbytes": row.nbytes,
        "storage": None,
        "storage_offset": None,
        "count": row.count,
    }


def waste_to_json(path: str, found: Sequence[Waste]) -> dict[str, object]:
    """Return the storages of `ls --waste`."""
    return {"path": path, "waste": [{**asdict(row), "waste": row.nbytes - row.used} for row in found]}


def listing_block(
    listing: Listing, rows: Sequence[Entry | Fold], style: str, *, long: bool, values: bool, folded: bool
) -> Block:
    """Return a row for each entry; a table ends with a line of totals."""
    columns = (*_BASIC, *(_LONG if long else ()), *(_VALUE if values else ()), *(_COUNT if folded else ()))
    ties = _tie_numbers(listing) if long else {}
    human = style == "table"
    cells = (_cells(row, ties, human=human, long=long, values=values, folded=folded) for row in rows)
    return Block(columns, cells, _totals(listing) if human else "")


def _tie_numbers(listing: Listing) -> dict[str, str]:
    """Return a number for each tied name: groups are numbered in the order of their first names."""
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
    """Return storage, offset and tie, which differ between folded tensors."""
    storage = "" if tensor.storage is None else escaped(tensor.storage.key)
    return [storage, str(tensor.storage_offset), ties.get(tensor.name, "")]


def _totals(listing: Listing) -> str:
    own = listing.parameters if listing.of_model is None else listing.of_model
    others = listing.parameters - own
    counts = [count_text(own, "parameter")] if own or not others else []
    if others:
        counts.append(count_text(others, "other element" if own else "element"))
    facts = [count_text(listing.tensors, "tensor"), *counts, bytes_text(listing.nbytes), listing.format]
    return f"{paint(', '.join(facts), 'heading')}\n"


def waste_block(rows: Sequence[Waste], style: str) -> Block:
    """Return one row per storage that is larger than its views; on a terminal, a sentence if there are none."""
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
    return Block(columns, cells, "" if rows else "no storage is larger than its tensors\n")
