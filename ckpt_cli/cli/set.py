"""`ckpt set`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, Verbose, WeightsOnly, complete_tensors
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.progress import Jobs, expression_sources, workers
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.set import plan_set
from ckpt_cli.edits.set_new import dtype_of_new
from ckpt_cli.errors import UsageError

Assignments = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME[INDEX]=VALUE...",
        help="VALUE is a number, nan, inf, true, false, 1+2j, a list like [1,2], or @FILE.npy; += -= *= /= work too. "
        "For non-tensor entries: JSON, None, or text; text that begins with @ is quoted as JSON: 'note=\"@x\"'.",
        autocompletion=complete_tensors,
    ),
]


def set_command(
    file: File,
    assignments: Assignments,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    cast: Annotated[
        bool, typer.Option("--cast", help="Convert values that the dtype cannot hold, instead of refusing them.")
    ] = False,
    new: Annotated[bool, typer.Option("--new", help="Add entries that are not there.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Add tensors of this dtype: numbers, lists, arrays; with --new."),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option("--replace", metavar="nan|inf|-inf=VALUE", help="Replace NaN or infinities in the tensors named."),
    ] = None,
    jobs: Jobs = 0,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Set elements, slices or whole tensors, and other values.

    In place and all or nothing; tied names also change. Values broadcast as in numpy. A crash at any moment leaves
    the file wholly old or wholly new. Other values (epoch=0, optimizer.param_groups.0.lr=1e-4) keep their type.
    With --new, NAME=@FILE.npy adds a tensor; so does a number or a list with --dtype, and an expression of tensors:
    cat(a, b), stack, split(x, 3)[0], x[0:10], x.T, permute, reshape, copy, cast(x, float16), zeros([2, 3], float32),
    ones, full, normal([2, 3], std=0.02, seed=1), + - * /, and FILE:NAME for a tensor of another file.

    With --replace nan=0, the arguments are NAMEs, '*' for all: only the blocks that have such values are written.

    Put quotes around each argument: a shell takes brackets and asterisks for patterns of files. zsh refuses
    2.weight[0,0]=1 without quotes ("no matches found"), bash passes it on only where no file matches.

    Example: ckpt set model.pt '2.weight[0,0]=100' '0.bias*=0.5'
    """
    options = EditOptions(output, dry_run, backup, weights_only=weights_only)
    if replace:
        if new or cast or dtype is not None:
            raise UsageError("--replace goes with none of --new, --cast and --dtype")
        from ckpt_cli.edits.set_replace import plan_replace, replacements_of

        values = replacements_of(replace)
        with workers(jobs) as executor:
            edit(
                file,
                lambda checkpoint: plan_replace(checkpoint, assignments, values, executor),
                options,
                json=json,
                verbose=verbose,
            )
        return
    if dtype is not None and not new:
        raise UsageError("--dtype is that of new tensors: it goes with --new")
    wanted = None if dtype is None else dtype_of_new(dtype)
    with expression_sources(jobs) if new else nullcontext() as of:
        edit(
            file,
            lambda checkpoint: plan_set(checkpoint, assignments, cast=cast, new=new, dtype=wanted, of=of),
            options,
            json=json,
            verbose=verbose,
        )
