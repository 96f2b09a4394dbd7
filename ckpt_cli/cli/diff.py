"""`ckpt diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.arrays.compare import Tolerance
from ckpt_cli.cli.options import Exclude, File, Format, Json, Names, Style, checkpoint_argument, opened
from ckpt_cli.cli.output import answer, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.cli.repeated_options import rules_of
from ckpt_cli.ops.diff import Asked, diff
from ckpt_cli.render.diff import diff_text, stat_text, to_json
from ckpt_cli.render.json import json_text

Other = Annotated[str, checkpoint_argument("OTHER", "The checkpoint that it is compared with, of any format.")]


def diff_command(
    ctx: typer.Context,
    file: File,
    other: Other,
    names: Names = None,
    exclude: Exclude = None,
    atol: Annotated[float, typer.Option("--atol", min=0, help="Equal if |a - b| <= atol + rtol * |b|.")] = 0,
    rtol: Annotated[float, typer.Option("--rtol", min=0, help="The same, relative to b.")] = 0,
    equal_nan: Annotated[
        bool, typer.Option("--equal-nan", help="NaN are equal whatever their bits; else only those of the same bits.")
    ] = False,
    _strip: Annotated[
        list[str] | None, typer.Option("--strip", metavar="PREFIX", help="Take a prefix from names, in both.")
    ] = None,
    _sub: Annotated[
        list[str] | None, typer.Option("--sub", metavar="REGEX REPL", help="Replace in names, in both.")
    ] = None,
    first: Annotated[int, typer.Option("--first", min=0, max=1000, metavar="N", help="Show N places of a tensor.")] = 3,
    stat: Annotated[bool, typer.Option("--stat", help="One line a tensor or numbered layer, with a bar.")] = False,
    ignore_dtype: Annotated[
        bool, typer.Option("--ignore-dtype", help="Different dtypes alone are not a difference, only values are.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing; stop at the first difference.")] = False,
    jobs: Jobs = 0,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Compare two checkpoints by value.

    Any formats and shardings: names that only one has, shapes, dtypes, elements with the greatest absolute and relative
    error, the mean one, the norm of a - b relative to that of b, and the cosine; ties, non-tensor entries; metadata if
    both are of one format. Different dtypes are compared in the wider. --strip and --sub may be repeated, and are
    carried out in the order given. Exit 0 means equal, and nothing is printed; 1 means that they differ, 2 trouble.

    Example: ckpt diff model.pt old.pt --rtol 1e-3
    """
    layout = style_of(style, json=json)
    asked = Asked(names or (), rules_of(ctx), quiet, exclude or (), ignore_dtype)
    tolerance = Tolerance(atol, rtol, equal_nan, first)
    with opened(file) as a, opened(other) as b, workers(jobs) as executor, progress() as on_progress:
        found = diff(a, b, asked, tolerance, executor, on_progress)
    if layout == "json" and not quiet:
        answer(json_text(to_json(found)))
    elif not quiet:
        answer(stat_text(found, layout) if stat else diff_text(found, layout))
    raise typer.Exit(0 if found.equal else 1)
