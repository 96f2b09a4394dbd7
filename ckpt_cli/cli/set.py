"""`ckpt set`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, complete_tensors
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.work import watched
from ckpt_cli.ops.rewrite import Options
from ckpt_cli.ops.set import set_entries
from ckpt_cli.render.edits import edit_text

Assignments = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME[INDEX]=VALUE...",
        help="VALUE is a number, nan, inf, true, false, 1+2j, a list like [1,2], or @FILE.npy; += -= *= /= work too. "
        "Of what is no tensor: JSON, None, or text.",
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
    new: Annotated[bool, typer.Option("--new", help="Add entries that are not there.")] = False,
    json: JsonReport = False,
) -> None:
    """Set elements, slices or whole tensors, and other values.

    In place and all or nothing; tied names change along. Values broadcast as in numpy. A crash at any moment leaves
    the file wholly old or wholly new. What is no tensor (epoch=0, optimizer.param_groups.0.lr=1e-4) keeps its type.

    Example: ckpt set model.pt '2.weight[0,0]=100' '0.bias*=0.5'
    """
    with watched() as told:
        done = set_entries(file, assignments, Options(output, dry_run, backup, told), cast=cast, new=new)
    if json:
        from ckpt_cli.render.jsons import edit_json

        report(edit_json(done))
    else:
        talk(edit_text(done))
