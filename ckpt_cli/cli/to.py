"""`ckpt to`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.options import Backup, DryRun, File, JsonReport, Output, Verbose, WeightsOnly, complete_devices
from ckpt_cli.cli.several import edit_each
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.edits.to import device_named, plan_to
from ckpt_cli.errors import UsageError


def to_command(
    file: File,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[FILE]... DEVICE",
            help="More checkpoints, then the device: cpu, cuda:0, mps, ...",
            autocompletion=complete_devices,
        ),
    ],
    output: Output = None,
    dry_run: DryRun = False,
    backup: Backup = False,
    weights_only: WeightsOnly = False,
    verbose: Verbose = False,
    json: JsonReport = False,
) -> None:
    """Change the device that torch.load puts tensors on.

    torch.load puts tensors where they were saved, unless it is given a map_location: ckpt to FILE cpu makes a file
    load on a machine without a GPU. No value changes. Files of torch.save only: others record no devices.

    Example: ckpt to gpu.pt cpu
    """
    *more, name = arguments
    device = device_named(name)
    if more and output is not None:
        raise UsageError("-o OUT takes the result of one checkpoint", hint="name the files one by one")
    code = edit_each(
        [file, *more],
        lambda checkpoint: plan_to(checkpoint, device),
        EditOptions(output, dry_run, backup, weights_only=weights_only),
        json=json,
        verbose=verbose,
    )
    if code:
        raise typer.Exit(code)
