"""`ckpt merge`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_cli.cli.new_checkpoint import Force, MaxShard, OutputOf, TensorsOnly, ToFormat, new_checkpoint
from ckpt_cli.cli.options import DryRun, JsonReport, WeightsOnly
from ckpt_cli.cli.output import report, talk
from ckpt_cli.cli.progress import Jobs
from ckpt_cli.edits.merge import FIRST, LAST, MergeOptions, merge
from ckpt_cli.errors import UsageError
from ckpt_cli.render.json import json_text
from ckpt_cli.render.merge import merge_text, to_json


class Preference(str, Enum):
    """The values of `--prefer`."""

    first = FIRST
    last = LAST


def merge_command(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Checkpoints with different entries.")],
    output: OutputOf,
    prefer: Annotated[
        Preference | None, typer.Option("--prefer", help="Take entries that differ from the first FILE, or the last.")
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option("--prefix", metavar="FILE=PREFIX", help="Put PREFIX. before the names of FILE; may be repeated."),
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
    """Write the union of several checkpoints.

    OUT is the first FILE with the entries that only others have: the shards of a model without an index, a model and
    its adapter, several models in one file. A name that several have must be the same in all of them, bit for bit.
    The formats of the files may differ: OUT has the format that its name says. Tied names stay tied.

    Example: ckpt merge model.pt old.pt --prefix old.pt=old -o both.pt
    """
    prefixes: dict[str, str] = {}
    for text in prefix or ():
        path, equals, before = text.rpartition("=")
        if not equals or not path or path in prefixes:
            raise UsageError(f"{text!r} is not FILE=PREFIX, once for each FILE")
        prefixes[path] = before
    with new_checkpoint(
        jobs, to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        done = merge(files, output, MergeOptions(prefer.value if prefer else None, prefixes, new))
    if json:
        report(json_text(to_json(done)))
    else:
        talk(merge_text(done))
