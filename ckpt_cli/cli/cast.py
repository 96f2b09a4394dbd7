"""`ckpt cast`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import (
    Backup,
    DryRun,
    Exclude,
    File,
    JsonReport,
    Names,
    Output,
    Raw,
    Verbose,
    WeightsOnly,
    complete_floats,
)
from ckpt_cli.cli.output import edit
from ckpt_cli.cli.progress import workers
from ckpt_cli.edits.cast import dtype_named, plan_cast
from ckpt_cli.edits.plan import EditOptions


def cast_command(
    file: File,
    dtype: Annotated[
        str,
        typer.Argument(
            metavar="DTYPE", help="float32, bfloat16, float16, float8_e4m3fn, ...", autocompletion=complete_floats
        ),
    ],
    names: Names = None,
    exclude: Exclude = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Let values become infinite or zero.")] = False,
    raw: Raw = False,
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Give floating tensors another dtype.

    All of them, or those that are named, with every tensor that shares their bytes. Integers and bools stay as they
    are. Values that would become infinite or zero are counted, and refused without --lossy. Scaled and packed weights
    (fp8 with scales, GPTQ, ...) are refused without --raw. Floats that cannot be cast are named.

    Example: ckpt cast model.pt bfloat16 -o model-bf16.pt
    """
    target = dtype_named(dtype)
    with workers(0) as executor:
        edit(
            file,
            lambda checkpoint: plan_cast(
                checkpoint, target, names or (), exclude=exclude or (), lossy=lossy, raw=raw, executor=executor
            ),
            EditOptions(output, dry_run, backup, weights_only=weights_only),
            json=json,
            verbose=verbose,
        )
