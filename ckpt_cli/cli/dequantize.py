"""`ckpt dequantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, TensorsOnly, ToFormat, new_checkpoint
from ckpt_cli.cli.options import (
    DryRun,
    File,
    JsonReport,
    WeightsOnly,
    complete_floats,
)
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs
from ckpt_cli.edits.cast import dtype_named
from ckpt_cli.edits.dequantize import dequantize
from ckpt_cli.render.dequantize import dequantized_text, to_json
from ckpt_cli.render.json import json_text


def dequantize_command(
    file: File,
    output: OutputOf,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, bfloat16 or float16; else that of the model before.",
            autocompletion=complete_floats,
        ),
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
    """Write quantized weights as plain floats.

    The scheme is found by names, shapes, dtypes and the quantization_config of config.json: fp8 and int8 with scales,
    NVFP4, MXFP4, packed integers of compressed-tensors, GPTQ and AWQ, bitsandbytes, torchao, torch's own. What is not
    certain is refused. Values are those of each scheme's own dequantizer. Scales and other helpers go, weights take
    their plain names, everything else stays; the config.json of a new folder has no quantization_config any more.

    Example: ckpt dequantize fp8.safetensors -o plain.safetensors
    """
    with new_checkpoint(
        jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        done = dequantize(
            file,
            output,
            dtype_named(dtype) if dtype else None,
            new,
        )
    if json:
        report(json_text(to_json(done)))
    else:
        talk(dequantized_text(done))
