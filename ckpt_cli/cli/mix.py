"""`ckpt mix`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.avg import Ints, numbers_of
from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, TensorsOnly, ToFormat, new_checkpoint
from ckpt_cli.cli.options import (
    DryRun,
    JsonReport,
    WeightsOnly,
    complete_floats,
)
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs
from ckpt_cli.edits.avg_options import inputs_of
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.mix import DARE, SLERP, TASK, TIES, MixOptions, mix
from ckpt_cli.render.json import json_text
from ckpt_cli.render.mix import mix_text, to_json


class Method(str, Enum):
    """The values of `--method`."""

    task = TASK
    slerp = SLERP
    ties = TIES
    dare = DARE


def mix_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The checkpoint that the others were trained from.")],
    files: Annotated[
        list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Checkpoints of models that were trained from it.")
    ],
    method: Annotated[Method, typer.Option("--method", help="How they are mixed.")],
    output: OutputOf,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W...", help="The weight of each FILE; else 1."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Divide by the sum of the weights; ties does, others do not."),
    ] = None,
    density: Annotated[
        float, typer.Option("--density", metavar="D", help="Keep this share of what changed; for ties and dare.")
    ] = 1.0,
    t: Annotated[
        float | None, typer.Option("--t", metavar="T", help="How far from BASE, 0, to FILE, 1; for slerp.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="What dare keeps by chance.")] = 0,
    select: Annotated[
        str | None, typer.Option("--select", metavar="PREFIX", help="Mix what is below PREFIX, not the model.")
    ] = None,
    ints: Annotated[Ints, typer.Option("--ints", help="Take integers that differ from this one.")] = Ints.equal,
    common: Annotated[bool, typer.Option("--common", help="Mix the names that all have, keep the others.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Untie names that are tied in some only.")] = False,
    finite: Annotated[bool, typer.Option("--finite", help="Refuse NaN and infinities.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Give the mix this dtype.", autocompletion=complete_floats),
    ] = None,
    to: ToFormat = None,
    max_shard: MaxShard = None,
    tensors_only: TensorsOnly = False,
    weights_only: WeightsOnly = False,
    force: Force = False,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Mix models that were trained from one base.

    task adds to BASE what changed in each FILE, times its weight. ties keeps the greatest changes of each (--density),
    and of those the ones whose sign most weight agrees on. dare keeps a random share of the changes, and divides them
    by it. slerp goes along the arc from BASE to one FILE (--t). Everything is computed in float32 (float64 for
    float64) and rounded once. What is not a floating tensor of the model is that of BASE.

    Example: ckpt mix model.pt old.pt --method task --weights 0.5 -o mixed.pt
    """
    paths, given = inputs_of(files, least=1)
    with new_checkpoint(
        jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        options = MixOptions(
            method=method.value,
            weights=numbers_of(weights, given),
            is_normalized=normalize,
            density=density,
            t=t,
            seed=seed,
            select=select,
            ints=ints.value,
            common=common,
            untie=untie,
            finite=finite,
            dtype=dtype_named(dtype) if dtype else None,
            output=new,
        )
        done = mix(base, paths, output, options)
    if json:
        report(json_text(to_json(done)))
    else:
        talk(mix_text(done))
