"""`ckpt rm`."""

from __future__ import annotations

from ckpt_cli.cli.options import (
    Backup,
    DryRun,
    Exclude,
    File,
    JsonReport,
    Optimizer,
    Output,
    SomeNames,
    Verbose,
    WeightsOnly,
)
from ckpt_cli.cli.output import edit
from ckpt_cli.edits.optimizer import carrying
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.rm import plan_rm


def rm_command(
    file: File,
    names: SomeNames,
    exclude: Exclude = None,
    optimizer: Optimizer = None,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Take entries out.

    A prefix takes all that is below it, and the container of that name with it. The states of an optimizer in the
    file go with their parameters, where it is known which are theirs.

    Example: ckpt rm train.ckpt optimizer
    """
    edit(
        file,
        carrying(lambda checkpoint: plan_rm(checkpoint, names, exclude or ()), optimizer),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )
