"""`ckpt compact`."""

from __future__ import annotations

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, Verbose, WeightsOnly
from ckpt_cli.cli.output import edit
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.tie import plan_compact


def compact_command(
    file: File,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Write each storage no larger than its tensors need.

    A tensor that was saved as a slice of a large one keeps all of the large one; ckpt ls --waste lists such storages.

    Example: ckpt compact slices.pt
    """
    edit(
        file, plan_compact, EditOptions(output, dry_run, backup, weights_only=weights_only), json=json, verbose=verbose
    )
