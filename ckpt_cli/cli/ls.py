"""`ckpt ls`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_cli.cli.options import (
    AsFiles,
    Exclude,
    File,
    Format,
    Json,
    NamesAndFiles,
    Salvage,
    Style,
    opened,
    opened_or_salvaged,
)
from ckpt_cli.cli.output import Reply, report_lost, style_of, talk, warn_of_danger
from ckpt_cli.cli.several import parted, reply_about
from ckpt_cli.errors import UsageError
from ckpt_cli.ops.ls import list_entries
from ckpt_cli.render.ls import listing_block, to_json, waste_block, waste_to_json

if TYPE_CHECKING:
    from ckpt_cli.formats.salvage.found import Salvaged
    from ckpt_cli.model.checkpoint import Checkpoint, Entry
    from ckpt_cli.ops.ls import Fold


class Sort(str, Enum):
    """The values of `--sort`."""

    name = "name"
    size = "size"
    file = "file"


def ls_command(
    file: File,
    names: NamesAndFiles = None,
    exclude: Exclude = None,
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
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", help="List each parameter with its state in the optimizer, and how that is known."),
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="OTHER", help="With --optimizer: the file with the parameters.")
    ] = None,
    salvage: Salvage = False,
    as_files: AsFiles = False,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """List names, dtypes, shapes and bytes.

    Nothing but the file's own table of contents is read, so any size takes as long. With --salvage, what is lost of a
    cut file is listed on stderr, and the exit code is 1.

    Example: ckpt ls -l model.pt encoder
    """
    layout = style_of(style, json=json)
    files, chosen = parted(file, names)
    if optimizer:
        if long or every or folded or sort or waste or salvage:
            raise UsageError("--optimizer goes with NAMEs, --exclude, --model and --files alone")
        return reply_about(
            files, layout, lambda path: _states(path, chosen, exclude or (), model, layout, as_files=as_files)
        )
    if model is not None:
        raise UsageError("--model goes with --optimizer")

    def ask(path: str) -> Reply:
        with opened_or_salvaged(path, salvage=salvage, as_files=as_files) as (checkpoint, cut):
            if waste:
                return _waste(checkpoint, cut, chosen, exclude or (), layout)
            listing = list_entries(
                checkpoint, chosen,
                values=every, sort=sort and sort.value, exclude=exclude or (), parted=layout == "table",
            )  # fmt: skip
        rows: Sequence[Entry | Fold] = listing.entries
        if folded:
            from ckpt_cli.ops.ls import fold

            rows = fold(listing.entries)
        return Reply(
            listing_block(listing, rows, layout, long=long, values=every, folded=folded),
            lambda: to_json(listing, rows, cut),
            *_after(checkpoint, cut),
        )

    return reply_about(files, layout, ask)


def _states(
    path: str, names: Sequence[str], exclude: Sequence[str], model: str | None, layout: str, *, as_files: bool
) -> Reply:
    """Return the answer of `--optimizer` about one file."""
    from ckpt_cli.ops.optimizer_listing import list_states
    from ckpt_cli.render.optimizer import notes, states_block
    from ckpt_cli.render.optimizer import to_json as states_to_json

    with ExitStack() as stack:
        checkpoint = stack.enter_context(opened(path, as_files=as_files))
        other = None if model is None else stack.enter_context(opened(model))
        listing = list_states(checkpoint, names, exclude=exclude, model=other)

    def aside() -> None:
        warn_of_danger(checkpoint)
        if layout != "table":
            talk("".join(f"{line}\n" for line in notes(listing)))

    return Reply(states_block(listing, layout), lambda: states_to_json(listing), 0, aside)


def _waste(
    checkpoint: Checkpoint, cut: Salvaged | None, names: Sequence[str], exclude: Sequence[str], layout: str
) -> Reply:
    from ckpt_cli.ops.ls import list_waste

    found = list_waste(checkpoint, names, exclude)
    return Reply(waste_block(found, layout), lambda: waste_to_json(checkpoint.path, found), *_after(checkpoint, cut))


def _after(checkpoint: Checkpoint, cut: Salvaged | None) -> tuple[int, Callable[[], None]]:
    """Return the exit code, and what prints the warnings."""

    def aside() -> None:
        warn_of_danger(checkpoint)
        report_lost(cut)

    return (0 if cut is None else 1), aside
