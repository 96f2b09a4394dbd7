"""`ckpt delta`: the commands for what one checkpoint has and another one has not."""

from __future__ import annotations

from typing import Annotated

import typer

from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, TensorsOnly, ToFormat, new_checkpoint
from ckpt_cli.cli.options import DryRun, JsonReport, WeightsOnly
from ckpt_cli.cli.options import checkpoint_argument as checkpoint
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs, watched, workers
from ckpt_cli.edits.delta import CreateOptions, create
from ckpt_cli.edits.delta_apply import apply
from ckpt_cli.render.delta import applied_json, applied_text, delta_text, to_json
from ckpt_cli.render.json import json_text

Base = Annotated[str, checkpoint("BASE", "The checkpoint that the other one was made from.")]


def create_command(
    base: Base,
    tuned: Annotated[str, checkpoint("TUNED", "The checkpoint with the changes.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The new safetensors file.")],
    force: Force = False,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Write what changed from one checkpoint to another.

    Of a tensor of which few elements changed, OUT has these and their places; of others the whole new tensor; of those
    that are the same, nothing. It has the digests of all tensors of BASE, so that it fits no other one. Ties and plain
    values are kept.

    Example: ckpt delta create model.pt old.pt -o changes.safetensors
    """
    with workers(jobs) as executor, watched() as on_progress:
        done = create(base, tuned, output, executor, CreateOptions(force, dry_run, on_progress))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(delta_text(done))


def apply_command(
    base: Base,
    delta: Annotated[str, typer.Argument(metavar="DELTA", help="What delta create wrote.")],
    output: OutputOf,
    to: ToFormat = None,
    max_shard: MaxShard = None,
    tensors_only: TensorsOnly = False,
    weights_only: WeightsOnly = False,
    force: Force = False,
    jobs: Jobs = 0,
    dry_run: DryRun = False,
    json: JsonReport = False,
) -> None:
    """Write the checkpoint that a delta was made of, from its base.

    Its tensors are those bit for bit, in the format and the shards of BASE unless OUT says otherwise. BASE must have
    the very tensors that the delta was made for, in whatever format.

    Example: ckpt delta apply model.pt delta.safetensors -o out.pt
    """
    with new_checkpoint(
        jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        done = apply(base, delta, output, new)
    if json:
        report(json_text(applied_json(done)))
    else:
        talk(applied_text(done))
