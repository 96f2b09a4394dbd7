"""Options of the commands that write a new checkpoint of others, declared and taken once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ckpt_cli.cli.progress import watched, workers
from ckpt_cli.edits.convert_options import size_of
from ckpt_cli.edits.derive import DeriveOptions

OutputOf = Annotated[str, typer.Option("-o", "--output", metavar="OUT", help="The new file or folder.")]
ToFormat = Annotated[
    str | None, typer.Option("--to", metavar="FORMAT", help="pt, safetensors, npz, hf, hf-bin (shards), dcp.")
]
MaxShard = Annotated[
    str | None, typer.Option("--max-shard", metavar="SIZE", help="Write shards of SIZE (5GB) into a folder.")
]
TensorsOnly = Annotated[
    bool, typer.Option("--tensors-only", help="Leave out entries that the format of OUT cannot hold.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT where it is there already.")]


@contextmanager
def new_checkpoint(
    jobs: int,
    to: str | None,
    max_shard: str | None,
    *,
    force: bool,
    dry_run: bool,
    weights_only: bool,
    tensors_only: bool = False,
) -> Iterator[DeriveOptions]:
    """Context manager: the options of a new checkpoint, with workers that make it and a line of progress."""
    size = size_of(max_shard) if max_shard else None
    with workers(jobs) as executor, watched() as on_progress:
        yield DeriveOptions(
            to=to,
            max_shard=size,
            force=force,
            dry_run=dry_run,
            tensors_only=tensors_only,
            weights_only=weights_only,
            executor=executor,
            on_progress=on_progress,
        )
