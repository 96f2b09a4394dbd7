"""`ckpt rename`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, Verbose, WeightsOnly, complete_names
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.repeated_options import rules_of
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.rename import plan_rename, renaming


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
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Rename entries: one, a prefix, or many at once.

    Module prefixes in a state_dict's _metadata follow. --strip, --add, --sub and --map may be repeated: after OLD NEW
    they are carried out in the order given, and each must change a name.

    Example: ckpt rename model.pt --strip module
    """
    steps = renaming(old, new, rules_of(ctx))
    edit(
        file,
        lambda checkpoint: plan_rename(checkpoint, steps),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )
