"""`ckpt convert`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.options import (
    DryRun,
    Exclude,
    File,
    JsonReport,
    Names,
    Raw,
    Salvage,
    WeightsOnly,
    complete_floats,
)
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import watched, workers
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.convert import convert
from ckpt_cli.edits.convert_options import CLONE, ERROR, KEEP_ONE, ConvertOptions, size_of
from ckpt_cli.render.convert import conversion_text, to_json
from ckpt_cli.render.json import json_text


class Shared(str, Enum):
    """The values of `--shared`: how tensors that share bytes are written."""

    keep_one = KEEP_ONE
    clone = CLONE
    error = ERROR


def _complete_formats(incomplete: str) -> list[str]:
    """Return the formats that begin with the typed text."""
    from ckpt_cli.formats.targets import TARGETS

    return [target.name for target in TARGETS if target.name.startswith(incomplete)]


def convert_command(
    file: File,
    output: Annotated[str, typer.Argument(metavar="DST", help="The new file, or the folder of several.")],
    names: Names = None,
    exclude: Exclude = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="pt, pt-legacy, safetensors, npz, hf, hf-bin (shards), dcp.",
            autocompletion=_complete_formats,
        ),
    ] = None,
    select: Annotated[
        str, typer.Option("--select", metavar="PREFIX", help="Make what is below PREFIX the whole.")
    ] = "",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Give floats this dtype.", autocompletion=complete_floats),
    ] = None,
    max_shard: Annotated[
        str | None, typer.Option("--max-shard", metavar="SIZE", help="Write shards of SIZE (5GB) into a folder.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("-a", "--all", help="Of a run, take all entries, not only the model's weights.")
    ] = False,
    shared: Annotated[
        Shared, typer.Option("--shared", help="Keep tied tensors tied, write each by itself, or refuse them.")
    ] = Shared.keep_one,
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Leave out what the new format cannot hold.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Make numpy's values, enums, paths and configs plain, for weights_only.")
    ] = False,
    lossy: Annotated[bool, typer.Option("--lossy", help="Let values become infinite or zero in a cast.")] = False,
    raw: Raw = False,
    salvage: Salvage = False,
    weights_only: WeightsOnly = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST where it is there already.")] = False,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> int:
    """Write a checkpoint in another format.

    The suffix of DST or --to says which: .pt .pth .ckpt .bin, .safetensors, .npz; a folder gets safetensors shards as
    Hugging Face names them, and copies of the config, the tokenizer and other small files beside the old weights. From
    a pickle to .pt every object is kept; a whole module, TorchScript or .pt2 gives its state_dict, and the folder of a
    training run the model's weights (--all takes the optimizer's states too). What the new
    format cannot hold is listed and refused, unless --tensors-only leaves it out. With --salvage, the tensors of a cut
    file that are all there are written, what is lost is listed, and the exit code is 1.

    Example: ckpt convert model.pt converted.safetensors
    """
    options = ConvertOptions(
        to=to,
        select=select,
        names=names or (),
        exclude=exclude or (),
        dtype=dtype_named(dtype) if dtype else None,
        max_shard=size_of(max_shard) if max_shard else None,
        everything=everything,
        shared=shared.value,
        tensors_only=tensors_only,
        plain=plain,
        lossy=lossy,
        raw=raw,
        salvage=salvage,
        weights_only=weights_only,
        force=force,
        dry_run=dry_run,
    )
    with workers(0) if dtype else nullcontext() as executor, watched() as on_progress:
        done = convert(file, output, replace(options, executor=executor, on_progress=on_progress))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(conversion_text(done))
    return 1 if done.is_cut else 0
