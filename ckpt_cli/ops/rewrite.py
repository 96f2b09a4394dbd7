"""How structural edits are carried out: planned as changes, then written as a new file in the place of the old one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from ckpt_cli.changes import Changes
from ckpt_cli.errors import UsageError
from ckpt_cli.files import journal
from ckpt_cli.files.caches import refuse_cached
from ckpt_cli.files.copying import Progress, no_progress
from ckpt_cli.files.overlay import Overlay
from ckpt_cli.files.replace import copy_as, keep_as
from ckpt_cli.formats import Rewriter, open_checkpoint, rewriting
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
    """Bytes of the result that were written: the patches in place, or the whole of a new file."""
    in_place: bool
    """Whether the old file was patched rather than replaced by a new one."""
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
    with closing(open_checkpoint(path, write=options.output is None and not options.dry_run)) as checkpoint:
        changes = plan(checkpoint)
        work = rewriting(checkpoint, changes)
        if options.output is None:
            with closing(Overlay(checkpoint.container.files)) as overlay:
                if work.patch(overlay):
                    return _patched(checkpoint, changes, overlay, options)
        return _replaced(checkpoint, changes, work, options, progress)


def _patched(checkpoint: Checkpoint, changes: Changes, overlay: Overlay, options: Options) -> Rewrite:
    """The edit as patches in place: of a header, or of a pickle."""
    path, kept = checkpoint.path, None
    if not options.dry_run:
        if options.backup and overlay:
            kept = copy_as(checkpoint.container.files[0], f"{path}.bak")
        journal.apply(overlay)
    return Rewrite(path, path, changes, overlay.nbytes, in_place=True, dry_run=options.dry_run, backup=kept)


def _replaced(
    checkpoint: Checkpoint, changes: Changes, work: Rewriter, options: Options, progress: Progress
) -> Rewrite:
    """The edit as a new file."""
    path, kept, nbytes = checkpoint.path, None, work.nbytes
    output = options.output or path
    if not options.dry_run:
        with writing(output, mode_of=path) as target:
            work.write(target, progress)
            work.verify(target.path)
            kept = keep_as(path, f"{path}.bak") if options.backup else None
            nbytes = os.fstat(target.fd).st_size
    return Rewrite(path, output, changes, nbytes, in_place=False, dry_run=options.dry_run, backup=kept)
