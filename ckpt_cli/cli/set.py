"""`ckpt set`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, complete_tensors
from ckpt_cli.cli.output import answer, talk
from ckpt_cli.errors import about
from ckpt_cli.ops.assign import assign
from ckpt_cli.ops.edit import edit_values
from ckpt_cli.render.edits import edit_text

Assignments = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME[INDEX]=VALUE...",
        help="VALUE is a number, nan, inf, true, false, 1+2j, a list like [1,2], or @FILE.npy; += -= *= /= work too.",
        autocompletion=complete_tensors,
    ),
]


def set_command(
    file: File,
    assignments: Assignments,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    cast: Annotated[
        bool, typer.Option("--cast", help="Convert values that the dtype cannot hold, instead of refusing them.")
    ] = False,
    json: JsonReport = False,
) -> None:
    """Set elements, slices or whole tensors.

    In place and all or nothing; tied names change along. Values broadcast as in numpy. A crash at any moment leaves
    the file wholly old or wholly new.

    Example: ckpt set model.pt '2.weight[0,0]=100' '0.bias*=0.5'
    """
    with about(file):
        edit = edit_values(
            file,
            lambda checkpoint, overlay: assign(checkpoint, overlay, assignments, cast=cast),
            output=output,
            dry_run=dry_run,
            backup=backup,
        )
    if json:
        from ckpt_cli.render.jsons import edit_json

        answer([edit_json(edit)])
    else:
        talk(edit_text(edit))
