"""`ckpt lora`: the commands for LoRA adapters."""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.arrays.factors import EXACT, RANDOMIZED
from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, TensorsOnly, ToFormat, new_checkpoint
from ckpt_cli.cli.options import (
    DryRun,
    Format,
    Json,
    JsonReport,
    Style,
    WeightsOnly,
    checkpoint_argument,
    complete_floats,
    opened,
)
from ckpt_cli.cli.output import answer, report, style_of, talk
from ckpt_cli.cli.progress import Jobs, watched
from ckpt_cli.edits.avg_options import path_and_number
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.lora_extract import extract
from ckpt_cli.edits.lora_merge import MergeOptions, merge
from ckpt_cli.edits.lora_resize import resize
from ckpt_cli.edits.lora_write import AdapterOptions
from ckpt_cli.errors import about
from ckpt_cli.ops.lora import Adapter, LoraInfo, adapter_of, describe
from ckpt_cli.ops.lora_names import matched_with
from ckpt_cli.render.json import json_text
from ckpt_cli.render.lora import (
    extract_json,
    extract_text,
    info_json,
    info_summary,
    info_text,
    merge_json,
    merge_text,
    resize_json,
    resize_text,
)

Alpha = Annotated[float | None, typer.Option("--alpha", metavar="N", help="The alpha, where the adapter says none.")]


Rank = Annotated[int, typer.Option("--rank", min=1, metavar="R", help="The highest rank of the factors.")]


def _use_own_threads() -> None:
    """Have numpy multiply on the thread that asks for it: blocks are small, others would wait."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


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
    to: ToFormat = None,
    max_shard: MaxShard = None,
    tensors_only: TensorsOnly = False,
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
    _use_own_threads()
    parted = [path_and_number(argument) for argument in adapters]
    with new_checkpoint(
        jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
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
                output=new,
            ),
        )
    if json:
        report(json_text(merge_json(done)))
    else:
        talk(merge_text(done))


def info_command(
    adapter: Annotated[
        str, checkpoint_argument("ADAPTER", "An adapter of PEFT, kohya or diffusers: a file or folder.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Say which tensors of this model are meant.")
    ] = None,
    style: Format = Style.auto,
    json: Json = False,
) -> None:
    """Describe a LoRA adapter: rank, alpha and scaling of each module.

    The shape is that of what is added. With --base, each row also has the tensor of the model that is meant, and the
    exit code is 1 where the model does not have some of them.

    Example: ckpt lora info adapter --base base.safetensors
    """
    layout = style_of(style, json=json)
    with opened(adapter) as checkpoint, about(adapter):
        found = _described(adapter_of(checkpoint, adapter, any_alpha=True), base)
    answer(json_text(info_json(found)) if layout == "json" else info_text(found, layout))
    if layout == "tsv":
        talk(info_summary(found))
    raise typer.Exit(1 if found.unmatched else 0)


def _described(adapter: Adapter, base: str | None) -> LoraInfo:
    """Return the facts of an adapter, with the tensors of a model that it means if there is one."""
    if base is None:
        return describe(adapter)
    with opened(base) as model:
        return describe(adapter, base, matched_with(adapter, model, base))


class Svd(str, Enum):
    """The values of `--svd`: how singular values are found."""

    randomized = RANDOMIZED
    exact = EXACT


def extract_command(
    base: Annotated[str, checkpoint_argument("BASE", "The model before the training.")],
    tuned: Annotated[str, checkpoint_argument("TUNED", "The model after it.")],
    rank: Rank,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The new folder.")],
    svd: Annotated[
        Svd, typer.Option("--svd", help="Find the largest singular values by random projections, or all exactly.")
    ] = Svd.randomized,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of the random projections.")] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="The dtype of the factors.", autocompletion=complete_floats)
    ] = "float32",
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Extract a LoRA adapter from what a training changed.

    Each matrix that differs becomes the product of two factors of rank R at most, the nearest one to the difference,
    and the residual says which part of it that leaves out. Other tensors that differ are taken whole. DIR is in PEFT's
    layout: ckpt lora merge and PEFT add it to BASE. One tensor is in memory at a time.

    Example: ckpt lora extract base.safetensors merged.safetensors --rank 4 -o x
    """
    with watched() as on_progress:
        options = AdapterOptions(dtype_named(dtype), dry_run=dry_run, on_progress=on_progress)
        done = extract(base, tuned, output, rank, options, svd=svd.value, seed=seed)
    if json:
        report(json_text(extract_json(done)))
    else:
        talk(extract_text(done))


def resize_command(
    adapter: Annotated[
        str, checkpoint_argument("ADAPTER", "An adapter of PEFT, kohya or diffusers: a file or folder.")
    ],
    rank: Rank,
    output: OutputOf,
    force: Force = False,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Give the modules of a LoRA adapter a lower rank.

    The product of each module becomes the nearest one of rank R, scaled as before; the residual says which part of it
    that leaves out. Modules of lower ranks stay as they are. OUT keeps the layout: a folder with the new ranks in its
    config for PEFT, else a safetensors file.

    Example: ckpt lora resize adapter --rank 2 -o smaller
    """
    with watched() as on_progress:
        done = resize(adapter, output, rank, AdapterOptions(force=force, dry_run=dry_run, on_progress=on_progress))
    if json:
        report(json_text(resize_json(done)))
    else:
        talk(resize_text(done))
