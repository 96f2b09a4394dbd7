"""`ckpt series`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cache, partial
from typing import Annotated

import typer

from ckpt_cli.cli import read_again as again
from ckpt_cli.cli.boundary import TROUBLE, report_error
from ckpt_cli.cli.options import Format, Json, Style, may_be_file, opened
from ckpt_cli.cli.output import answer, ascii_only, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.cli.several import parted
from ckpt_cli.errors import CkptError
from ckpt_cli.files.places import exists, matching
from ckpt_cli.ops.series import File, series
from ckpt_cli.ops.steps import Source, checkpoints_at
from ckpt_cli.render.json import json_text
from ckpt_cli.render.series import series_text, to_json


class By(str, Enum):
    """The values of `--by`: what is drawn."""

    norm = "norm"
    std = "std"
    change = "change"
    max = "max"


Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE... [NAME]...",
        help="Checkpoints, folders of them or globs; else a name, a prefix or a glob of names.",
    ),
]


def series_command(
    arguments: Arguments,
    by: Annotated[By, typer.Option("--by", help="Draw the course of this; max is the greatest magnitude.")] = By.norm,
    fold: Annotated[bool, typer.Option("--fold", help="One row for the tensors of numbered layers.")] = False,
    jobs: Jobs = 0,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Follow tensors through the checkpoints of a run.

    The checkpoints are put in the order of their steps, which they say themselves (global_step, step, iteration,
    epoch, trainer_state.json, folders such as checkpoint-500), else in the natural order of their names. A row says for
    each tensor the norm, the relative change against the checkpoint before, |W - V| / |V|, and the count of NaN. On a
    terminal it is drawn by --by; elsewhere there is a row for each tensor and checkpoint. Each byte is read once.

    Example: ckpt series old.pt model.pt '*.weight' --fold
    """
    layout = style_of(style, json=json)
    files, names = _files_and_names(arguments)
    failed: list[File] = []

    def on_error(path: str, error: CkptError | OSError) -> None:
        if len(files) == 1:
            raise error
        report_error(error)
        failed.append(File(path, error=error))

    sources = [Source(path, partial(opened, path)) for path in files]
    with workers(jobs) as executor, progress() as on_progress:
        found = series(sources, names, executor, on_progress, folded=fold, on_error=on_error)
    if not found.files:
        raise typer.Exit(TROUBLE)
    for file in found.files:
        if file.error is not None:
            report_error(file.error)
    found = found.with_files(failed)
    if layout == "json":
        answer(json_text(to_json(found, by.value)))
    else:
        answer(series_text(found, by.value, layout, ascii_only=ascii_only()))
    raise typer.Exit(TROUBLE if any(file.error is not None for file in found.files) else 0)


def _files_and_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files and the names; a folder of a run and a glob stand for the checkpoints that they lead to."""
    is_there = cache(exists)
    leads = cache(lambda argument: is_there(argument) or bool(matching(argument)))
    first = next((argument for argument in arguments if leads(argument)), arguments[0])
    again.named[:] = [first]
    at_first = checkpoints_at(first, is_there)
    rest = [argument for argument in arguments if argument != first]
    paths, names = parted(at_first[0], rest, lambda argument: leads(argument) or may_be_file(argument))
    files = [*at_first, *(path for argument in paths[1:] for path in checkpoints_at(argument))]
    return list(dict.fromkeys(files)), names
