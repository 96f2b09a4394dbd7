"""How structural edits are carried out: planned as changes, then written as a new file in the place of the old one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from ckpt_cli.changes import Changes
from ckpt_cli.errors import UsageError
from ckpt_cli.files.caches import refuse_cached
from ckpt_cli.files.copying import Progress, no_progress
from ckpt_cli.files.replace import keep_as
from ckpt_cli.formats import open_checkpoint, rewriting
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.outputs import check_output, writing

Plan = Callable[[Checkpoint], Changes]
"""What an edit makes of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every edit can be told."""

    output: str | None = None
    dry_run: bool = False
    backup: bool = False


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What a structural edit did, or would do."""

    path: str
    output: str
    changes: Changes
    bytes_written: int
    in_place: bool
    dry_run: bool
    backup: str | None = None


def rewrite(path: str, plan: Plan, options: Options, progress: Progress = no_progress) -> Rewrite:
    """Carry out a plan, all or nothing: to `options.output`, or to a new file that takes the place of `path`."""
    if options.output is None:
        refuse_cached(path)
    elif options.backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    else:
        check_output(options.output, path, "leave -o out to edit it in place")
    output = options.output or path
    with closing(open_checkpoint(path, write=options.output is None and not options.dry_run)) as checkpoint:
        changes = plan(checkpoint)
        work = rewriting(checkpoint, changes)
        kept = None
        nbytes = work.nbytes
        if not options.dry_run:
            with writing(output, mode_of=path) as target:
                work.write(target, progress)
                work.verify(target.path)
                kept = keep_as(path, f"{path}.bak") if options.backup else None
                nbytes = os.fstat(target.fd).st_size
        return Rewrite(path, output, changes, nbytes, options.output is None, options.dry_run, kept)
