"""`ckpt apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import DryRun, File, JsonReport, Verbose, WeightsOnly
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.progress import Jobs, expression_sources
from ckpt_cli.edits.apply import plan_apply
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.recipe import read_recipe


def apply_command(
    file: File,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file of steps; see docs/combine.md.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The new file or folder.")],
    dry_run: DryRun = False,
    weights_only: WeightsOnly = False,
    jobs: Jobs = 0,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Carry out a recipe of many edits in one pass.

    RECIPE is a TOML file with version = 1 and steps, each of which does what a command does: rename, strip, add, map,
    remove, keep, cast, new tensors by expressions, resize, tie, take tensors of another file, and layers: slices of
    layers of several files, stacked or interleaved. The bytes are those that the commands would write one after the
    other. -n prints the plan.

    Example: ckpt apply model.pt recipe.toml -o new.pt
    """
    steps = read_recipe(recipe)
    with expression_sources(jobs) as of:
        edit(
            file,
            lambda checkpoint: plan_apply(checkpoint, steps, of),
            EditOptions(output, dry_run, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
