"""`ckpt resize`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import (
    Backup,
    DryRun,
    File,
    JsonReport,
    Optimizer,
    Output,
    Verbose,
    WeightsOnly,
    complete_tensors,
)
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.progress import Jobs, workers
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.resize import ResizeOptions, plan_resize, resize_of


def resize_command(
    file: File,
    sizes: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=ROWS[:INIT]...",
            help="The new number of rows; new ones are the mean of the old ones, zero or normal.",
            autocompletion=complete_tensors,
        ),
    ],
    std: Annotated[float, typer.Option("--std", min=0, help="The standard deviation of normal rows.")] = 0.02,
    seed: Annotated[int, typer.Option("--seed", help="The seed of normal rows.")] = 0,
    optimizer: Optimizer = None,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    jobs: Jobs = 0,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Give embeddings, heads and biases more or fewer rows.

    New rows are the mean of the old ones, or with NAME=ROWS:zero and NAME=ROWS:normal zeros and normal numbers. Names
    that are tied to a tensor follow it, and the states of an optimizer in the file get zeros, where it is known which
    they are. Fewer rows than before keep the first ones.

    Example: ckpt resize model.pt 2.weight=12 2.bias=12:zero
    """
    asked = [resize_of(text) for text in sizes]
    with workers(jobs) as executor:
        options = ResizeOptions(std, seed, optimizer, executor)
        edit(
            file,
            lambda checkpoint: plan_resize(checkpoint, asked, options),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
