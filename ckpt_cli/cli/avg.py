"""`ckpt avg`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, ToFormat, new_checkpoint
from ckpt_cli.cli.options import DryRun, JsonReport, WeightsOnly, complete_floats
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs
from ckpt_cli.edits.avg import average
from ckpt_cli.edits.avg_options import AvgOptions, inputs_of
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.combine import EQUAL, FIRST, LAST, MAX
from ckpt_cli.errors import UsageError
from ckpt_cli.render.avg import avg_text, to_json
from ckpt_cli.render.json import json_text


class Ints(str, Enum):
    """The values of `--ints`: what becomes of integers that differ."""

    equal = EQUAL
    first = FIRST
    last = LAST
    max = MAX


def avg_command(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE[:WEIGHT]...", help="Checkpoints of one model, folders of them or globs."),
    ],
    output: OutputOf,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W...", help="The weight of each; 1 where nothing is said.")
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", metavar="DECAY", help="Average as an EMA over the files would.")
    ] = None,
    latest: Annotated[int | None, typer.Option("--last", metavar="N", help="Take only the last N.")] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Divide by the sum of the weights.")
    ] = True,
    select: Annotated[
        str | None, typer.Option("--select", metavar="PREFIX", help="Average what is below PREFIX, not the model.")
    ] = None,
    rest: Annotated[
        str, typer.Option("--rest", metavar="first|last|N|drop", help="Take everything else from this one.")
    ] = LAST,
    ints: Annotated[Ints, typer.Option("--ints", help="Take integers that differ from this one.")] = Ints.equal,
    common: Annotated[bool, typer.Option("--common", help="Average the names that all have, keep the others.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Untie names that are tied in some only.")] = False,
    finite: Annotated[bool, typer.Option("--finite", help="Refuse NaN and infinities.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Give the averages this dtype.", autocompletion=complete_floats),
    ] = None,
    to: ToFormat = None,
    max_shard: MaxShard = None,
    weights_only: WeightsOnly = False,
    force: Force = False,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Average checkpoints of one model.

    The floating tensors of the model are summed in float32 (float64 for float64), in the order of the files, and
    rounded once. Everything else, such as the state of an optimizer, is that of the last file or of --rest. Integers
    that differ are refused, but for counters such as num_batches_tracked. Names must be the same in all files, and
    tied names stay tied. The formats of the files may differ: OUT has the format that its name says. Nothing is held
    in memory but a few pieces.

    Example: ckpt avg old.pt model.pt -o average.pt
    """
    paths, given = inputs_of(files, latest)
    numbers = numbers_of(weights, given)
    with new_checkpoint(jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only) as new:
        done = average(
            paths,
            output,
            AvgOptions(
                weights=numbers,
                is_normalized=normalize,
                ema=ema,
                select=select,
                rest=rest,
                ints=ints.value,
                common=common,
                untie=untie,
                finite=finite,
                dtype=dtype_named(dtype) if dtype else None,
                output=new,
            ),
        )
    if json:
        report(json_text(to_json(done)))
    else:
        talk(avg_text(done))


def numbers_of(weights: str | None, given: Sequence[float | None]) -> list[float]:
    """Return the weights of `--weights`, or those after colons; none where nothing is said."""
    if weights is not None:
        if any(weight is not None for weight in given):
            raise UsageError("weights come after a colon or from --weights, not from both")
        return [_number(text) for text in weights.split(",")]
    if all(weight is None for weight in given):
        return []
    return [1.0 if weight is None else weight for weight in given]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a weight", hint="--weights 0.7,0.3, say") from None
