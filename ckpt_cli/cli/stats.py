"""`ckpt stats`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.options import Exclude, File, Format, Json, NamesAndFiles, Style, opened
from ckpt_cli.cli.output import Reply, ascii_only, style_of
from ckpt_cli.cli.progress import Jobs, progress, workers
from ckpt_cli.cli.several import parted, reply_about
from ckpt_cli.ops.stats_lines import stats_of
from ckpt_cli.render.stats import stats_block, to_json


class Line(str, Enum):
    """The values of `--by`."""

    row = "row"
    column = "column"


class Key(str, Enum):
    """The values of `--sort`: the columns."""

    name = "name"
    numel = "numel"
    min = "min"
    max = "max"
    mean = "mean"
    std = "std"
    norm = "norm"
    zeros = "zeros"
    nan = "nan"
    inf = "inf"
    outlier = "outlier"


def stats_command(
    file: File,
    names: NamesAndFiles = None,
    exclude: Exclude = None,
    total: Annotated[bool, typer.Option("--total", help="Add a row of all together, tied ones once.")] = False,
    sort: Annotated[Key | None, typer.Option("--sort", help="By a column, greatest first; names from a to z.")] = None,
    bad: Annotated[bool, typer.Option("--nan", help="List only tensors with NaN or infinities.")] = False,
    fold: Annotated[bool, typer.Option("--fold", help="One row for the tensors of numbered layers.")] = False,
    percentiles: Annotated[
        bool,
        typer.Option("--percentiles", help="Add p1, p50, p99, largest |x| / std, counts by powers of two."),
    ] = False,
    by: Annotated[
        Line | None,
        typer.Option("--by", help="A line for each row (first index) or column (second index) of matrices."),
    ] = None,
    jobs: Jobs = 0,
    style: Format = Style.auto,
    json: Json = False,
) -> int:
    """Summarize the values of each tensor.

    Least, greatest, mean, standard deviation (n - 1, as torch.std), norm and a histogram of the finite ones; how many
    are zero, NaN and infinite. Complex numbers count by their magnitude, quantized ones as what they stand for. Each
    byte is read once, in bounded memory.

    Example: ckpt stats model.pt --sort std
    """
    layout = style_of(style, json=json)
    files, chosen = parted(file, names)
    key = sort and str(sort.value)

    def ask(path: str) -> Reply:
        with opened(path) as checkpoint, workers(jobs) as executor, progress() as on_progress:
            found = stats_of(
                checkpoint, chosen, executor, on_progress, by=by and str(by.value),
                exclude=exclude or (), sort=key, bad_only=bad, total=total, folded=fold, percentiles=percentiles,
            )  # fmt: skip
        block = stats_block(found, layout, ascii_only=ascii_only(), percentiles=percentiles, drawn=by is None)
        return Reply(block, lambda: to_json(found))

    return reply_about(files, layout, ask)
