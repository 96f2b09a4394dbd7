"""`ckpt lora`: the commands for LoRA adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import DryRun, JsonReport, WeightsOnly, checkpoint_argument, complete_floats
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs, watched, workers
from ckpt_cli.edits.avg_options import path_and_number
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.convert_options import size_of
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.edits.lora_merge import MergeOptions, merge
from ckpt_cli.render.json import json_text
from ckpt_cli.render.lora import merge_json, merge_text

OutputOf = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The new file or folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT where it is there already.")]
MaxShard = Annotated[
    str | None, typer.Option("--max-shard", metavar="SIZE", help="Write shards of SIZE (5GB) into a folder.")
]
Alpha = Annotated[float | None, typer.Option("--alpha", metavar="N", help="The alpha, where the adapter says none.")]


def merge_command(
    base: Annotated[str, checkpoint_argument("BASE", "The model, as a checkpoint of any format.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:SCALE]...", help="Adapters of PEFT, kohya or diffusers: files or folders."),
    ],
    output: OutputOf,
    scale: Annotated[
        float, typer.Option("--scale", metavar="S", help="Multiply the effect of all adapters by S.")
    ] = 1.0,
    alpha: Alpha = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what BASE does not have, instead of refusing.")
    ] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied tensor that changes bytes of its own.")] = False,
    keep_tied: Annotated[
        bool, typer.Option("--keep-tied", help="Change all names of a tied tensor that changes.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Give what changes this dtype.", autocompletion=complete_floats),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="pt, safetensors, npz, hf, hf-bin (shards), dcp.")
    ] = None,
    max_shard: MaxShard = None,
    weights_only: WeightsOnly = False,
    force: Force = False,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Merge LoRA adapters into the weights of a model.

    W becomes W + scaling * B A, in float32, all adapters in their order, and is rounded once to the dtype that it has.
    Rank and alpha are those of the adapter, with its patterns, rsLoRA and DoRA. Whole tensors of the adapter take the
    places of the model's. Everything else is copied: OUT has the format, the shards and the small files of BASE. No
    more is in memory than the factors of a tensor and a few blocks of rows.

    Example: ckpt lora merge base.safetensors adapter -o out.safetensors
    """
    parted = [path_and_number(argument) for argument in adapters]
    with workers(jobs) as executor, watched() as on_progress:
        done = merge(
            base,
            [(path, 1.0 if number is None else number) for path, number in parted],
            output,
            MergeOptions(
                scale=scale,
                alpha=alpha,
                partial=partial,
                untie=untie,
                keep_tied=keep_tied,
                dtype=dtype_named(dtype) if dtype else None,
                output=DeriveOptions(
                    to=to,
                    max_shard=size_of(max_shard) if max_shard else None,
                    force=force,
                    dry_run=dry_run,
                    weights_only=weights_only,
                    executor=executor,
                    on_progress=on_progress,
                ),
            ),
        )
    if json:
        report(json_text(merge_json(done)))
    else:
        talk(merge_text(done))
