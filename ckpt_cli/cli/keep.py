"""`ckpt keep`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import (
    Backup,
    DryRun,
    Exclude,
    File,
    JsonReport,
    Names,
    Optimizer,
    Output,
    Verbose,
    WeightsOnly,
)
from ckpt_cli.cli.output import edit
from ckpt_cli.edits.optimizer import carrying
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.rm import plan_keep, plan_root
from ckpt_cli.errors import UsageError


def keep_command(
    file: File,
    names: Names = None,
    exclude: Exclude = None,
    root: Annotated[
        str | None, typer.Option("--root", metavar="PREFIX", help="Make what is below PREFIX the whole checkpoint.")
    ] = None,
    optimizer: Optimizer = None,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Take all entries out but some.

    With --exclude alone, all entries stay but those that it selects. With --root, what is below PREFIX becomes the
    whole checkpoint: the state_dict of a training checkpoint, say. Of an optimizer that stays, the states of parameters
    that go do too, where it is known which are theirs.

    Example: ckpt keep train.ckpt --root model -o model.pt
    """
    if (root is None) == (not names and not exclude):
        raise UsageError("keep takes names or --exclude, or --root PREFIX")
    if root is not None:
        edit(
            file,
            lambda checkpoint: plan_root(checkpoint, root),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
    else:
        edit(
            file,
            carrying(lambda checkpoint: plan_keep(checkpoint, names or (), exclude or ()), optimizer),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
