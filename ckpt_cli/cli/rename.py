"""`ckpt rename`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ckpt_cli.cli.options import (
    Backup,
    DryRun,
    File,
    JsonReport,
    Of,
    Optimizer,
    OtherOf,
    Output,
    Verbose,
    WeightsOnly,
    complete_names,
)
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.repeated_options import rules_of
from ckpt_cli.edits.optimizer import carrying
from ckpt_cli.edits.plan import EditOptions, Planner
from ckpt_cli.edits.rename import plan_rename, renaming
from ckpt_cli.errors import UsageError


def rename_command(
    ctx: typer.Context,
    file: File,
    old: Annotated[
        str | None, typer.Argument(metavar="[OLD]", help="A name or a prefix.", autocompletion=complete_names)
    ] = None,
    new: Annotated[str | None, typer.Argument(metavar="[NEW]", help="What it becomes.")] = None,
    _strip: Annotated[list[str] | None, typer.Option("--strip", metavar="PREFIX", help="Take a prefix off.")] = None,
    _add: Annotated[
        list[str] | None, typer.Option("--add", metavar="PREFIX", help="Put a prefix before every name.")
    ] = None,
    _sub: Annotated[
        list[str] | None, typer.Option("--sub", metavar="REGEX REPL", help="Replace what matches, as re.sub.")
    ] = None,
    _map: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FILE.json", help="Rename by a JSON map of names or prefixes, all at once."),
    ] = None,
    _pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", metavar="OLD=NEW", help="Rename by a pattern: 'layers.{n}.*=layers.{n+2}.*'."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="OTHER", help="As load_state_dict of OTHER needs it; see ckpt match."),
    ] = None,
    guess: Annotated[bool, typer.Option("--guess", help="Let --like guess by order, place and shape.")] = False,
    of: Of = None,
    other_of: OtherOf = None,
    optimizer: Optimizer = None,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Rename entries: one, a prefix, or many at once.

    Module prefixes in a state_dict's _metadata follow. --strip, --add, --sub and --map may be repeated: after OLD NEW
    they are carried out in the order given, and each must change a name. --like takes the names that ckpt match finds,
    and refuses where several are equally good. Names of parameters in an optimizer's state follow.

    'layers.{n}.*=layers.{n+2}.*' renames by a pattern: {n} is a number, {n:4-7} one of a range, {n:0-30/2} every second
    one, and the new name may have {n+k}, {n-k}, {n*2+1}, {n//2}. Several patterns, --pattern OLD=NEW, go at once.

    Example: ckpt rename model.pt --strip module
    """
    if like is not None:
        if old is not None or rules_of(ctx):
            raise UsageError("--like finds the new names by itself: give no others")
        planner = _planner_like(like, of, other_of, guess=guess)
    elif guess or of is not None or other_of is not None:
        raise UsageError("--guess, --of and --other-of go with --like")
    else:
        steps = renaming(old, new, rules_of(ctx))
        planner = partial(plan_rename, steps=steps)
    edit(
        file,
        carrying(planner, optimizer),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )


def _planner_like(like: str, of: str | None, other_of: str | None, *, guess: bool) -> Planner:
    """Return the plan of `--like`, once the names of the model are read."""
    from ckpt_cli.cli.match import model_at
    from ckpt_cli.edits.rename_like import plan_rename_like

    model = model_at(like, other_of)
    return lambda checkpoint: plan_rename_like(checkpoint, model, of, guess=guess)
