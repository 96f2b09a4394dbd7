"""`ckpt graft`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, Verbose, WeightsOnly
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.progress import Jobs, workers
from ckpt_cli.edits.graft import plan_graft, source_of
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.errors import about
from ckpt_cli.formats import open_checkpoint


def graft_command(
    file: File,
    other: Annotated[
        str, typer.Argument(metavar="OTHER[:PREFIX]", help="The checkpoint with the new tensors, or a part of it.")
    ],
    at: Annotated[
        str | None, typer.Option("--at", metavar="PREFIX", help="Where they go in FILE; by default the same PREFIX.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add tensors of OTHER that FILE lacks.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Leave tensors as they are that OTHER lacks.")] = False,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    jobs: Jobs = 0,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Put tensors of another checkpoint in the places of old ones.

    Names and shapes must match below the two prefixes. In place and all or nothing, and only the tensors are written
    where dtypes are the same too; tied names also change.

    Example: ckpt graft model.pt old.pt:2
    """
    path, prefix = source_of(other)
    with about(path):
        source = open_checkpoint(path)
    with closing(source), workers(jobs) as executor:
        edit(
            file,
            lambda base: plan_graft(base, source, prefix, at, add=add, partial=partial, executor=executor),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
