"""`ckpt ls`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.options import File, Format, Json, Names, Salvage, Style, opened_or_salvaged
from ckpt_cli.cli.output import answer, report_lost, style_of, warn_of_danger
from ckpt_cli.ops.ls import list_entries
from ckpt_cli.render.json import json_text
from ckpt_cli.render.ls import listing_text, to_json, waste_text, waste_to_json

if TYPE_CHECKING:
    from ckpt_cli.model.checkpoint import Checkpoint, Entry
    from ckpt_cli.ops.ls_fold import Fold


class Sort(str, Enum):
    """The values of `--sort`."""

    name = "name"
    size = "size"
    file = "file"


def ls_command(
    file: File,
    names: Names = None,
    long: Annotated[
        bool,
        typer.Option("-l", "--long", help="Add kind, requires_grad, device, stride, storage, offset, tie, layout."),
    ] = False,
    every: Annotated[bool, typer.Option("-a", "--all", help="Add non-tensor entries.")] = False,
    folded: Annotated[bool, typer.Option("--fold", help="Fold numbered layers into one row.")] = False,
    sort: Annotated[
        Sort | None, typer.Option("--sort", help="By name, by size (largest first) or by place in the file.")
    ] = None,
    waste: Annotated[bool, typer.Option("--waste", help="List storages larger than their tensors instead.")] = False,
    salvage: Salvage = False,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """List names, dtypes, shapes and bytes.

    Nothing but the file's own table of contents is read, so any size takes as long. With --salvage, what is lost of a
    cut file is listed on stderr, and the exit code is 1.

    Example: ckpt ls -l model.pt encoder
    """
    layout = style_of(style, json=json)
    with opened_or_salvaged(file, salvage=salvage) as (checkpoint, cut):
        if waste:
            _answer_waste(checkpoint, names or (), layout)
            warn_of_danger(checkpoint)
            return report_lost(cut)
        listing = list_entries(checkpoint, names or (), values=every, sort=sort and sort.value)
    rows: Sequence[Entry | Fold] = listing.entries
    if folded:
        from ckpt_cli.ops.ls_fold import fold

        rows = fold(listing.entries)
    if layout == "json":
        answer(json_text(to_json(listing, rows, cut)))
    else:
        answer(listing_text(listing, rows, layout, long=long, values=every, folded=folded))
    warn_of_danger(checkpoint)
    return report_lost(cut)


def _answer_waste(checkpoint: Checkpoint, names: Sequence[str], layout: str) -> None:
    from ckpt_cli.ops.ls import list_waste

    found = list_waste(checkpoint, names)
    if layout == "json":
        answer(json_text(waste_to_json(checkpoint.path, found)))
    else:
        answer(waste_text(found, layout))
