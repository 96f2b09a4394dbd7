"""`ckpt series`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli import read_again as again
from ckpt_cli.cli.boundary import TROUBLE, report_error
from ckpt_cli.cli.options import Format, Json, Style, opened
from ckpt_cli.cli.output import answer, ascii_only, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.errors import CkptError
from ckpt_cli.files.places import exists
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.series import File, series
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
    typer.Argument(metavar="FILE... [NAME]...", help="Checkpoints; what is not a file is a name, a prefix or a glob."),
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
    with ExitStack() as stack:
        checkpoints = _opened(files, failed, stack)
        executor, on_progress = stack.enter_context(workers(jobs)), stack.enter_context(progress())
        found = series(checkpoints, names, executor, on_progress, folded=fold)
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
    """Return the files and the names: an argument is a file if there is one of that name."""
    files = [argument for argument in arguments if exists(argument)]
    names = [argument for argument in arguments if argument not in files]
    if not files:
        files, names = names[:1], names[1:]  # opening it says what is wrong
    again.named[:] = files[:1]
    return list(dict.fromkeys(files)), names


def _opened(files: Sequence[str], failed: list[File], stack: ExitStack) -> list[Checkpoint]:
    """Open the checkpoints; one that cannot be opened is reported and does not stop the others."""
    if len(files) == 1:
        return [stack.enter_context(opened(files[0]))]
    checkpoints = []
    for path in files:
        one = _open_one(path, stack)
        if isinstance(one, Checkpoint):
            checkpoints.append(one)
        else:
            report_error(one)
            failed.append(File(path, error=one))
    if not checkpoints:
        raise typer.Exit(TROUBLE)
    return checkpoints


def _open_one(path: str, stack: ExitStack) -> Checkpoint | CkptError | OSError:
    """Open a checkpoint until the stack is closed, or return the error."""
    try:
        return stack.enter_context(opened(path))
    except (CkptError, OSError) as error:
        return error
