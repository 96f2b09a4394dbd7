"""`ckpt untie`."""

from __future__ import annotations

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, SomeNames, Verbose, WeightsOnly
from ckpt_cli.cli.output import edit
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.tie import plan_untie


def untie_command(
    file: File,
    names: SomeNames,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Give tensors storages of their own.

    Example: ckpt untie model.pt 4.weight
    """
    edit(
        file,
        lambda checkpoint: plan_untie(checkpoint, names),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )
