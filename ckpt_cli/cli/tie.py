"""`ckpt tie`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, SomeNames, Verbose, WeightsOnly
from ckpt_cli.cli.output import edit
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.tie import plan_tie


def tie_command(
    file: File,
    names: SomeNames,
    force: Annotated[bool, typer.Option("--force", help="Take the values of the first where they differ.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Add names that are not there.")] = False,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Make several names one tensor.

    Each further NAME becomes the first one: one storage, one view. Refused where their values differ, unless --force
    says that the first one's count. With --new, a NAME that is not there is added as another name of the first one.

    Example: ckpt tie model.pt embed.weight lm_head.weight
    """
    edit(
        file,
        lambda checkpoint: plan_tie(checkpoint, names, force=force, new=new),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )
