"""`ckpt rm`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, WeightsOnly, complete_names
from ckpt_cli.cli.run_edit import Options, edit
from ckpt_cli.edits.rm import plan_rm

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME...",
        help="A name, a prefix (a submodule's name), or a glob with * and ?.",
        autocompletion=complete_names,
    ),
]


def rm_command(
    file: File,
    names: Names,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    json: JsonReport = False,
) -> None:
    """Take entries out.

    A prefix takes all that is below it, and the container of that name with it.

    Example: ckpt rm train.ckpt optimizer
    """
    edit(
        file,
        lambda checkpoint: plan_rm(checkpoint, names),
        Options(output, dry_run, backup, weights_only=weights_only),
        json=json,
    )
