"""The engine of `set` for more than elements of tensors: values, new entries, and all at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.patching import SET, Edit, apply_in_place, edit_values
from ckpt_cli.edits.set_tensors import assign
from ckpt_cli.edits.set_values import Split, split_assignments
from ckpt_cli.edits.transaction import Options, Planned, refuse_part_of_set, rewrite
from ckpt_cli.errors import UsageError, about
from ckpt_cli.files.backup import keeping
from ckpt_cli.files.content_addressed import refuse_cached
from ckpt_cli.files.copy import counting
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.unchanged import require_unchanged
from ckpt_cli.formats import Rewriter, open_checkpoint, rewriting
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.output import check_output, other_names, own_file, refuse_own, writing


def set_entries(
    path: str,
    assignments: Sequence[str],
    options: Options,
    *,
    cast: bool = False,
    new: bool = False,
    dtype: DType | None = None,
) -> Edit:
    """Carry out assignments to tensors and other values, all or nothing.

    With `new`, names that are not there are added, as tensors of `dtype` where that is given.

    Elements of tensors are patched in place. So is the pickle of a torch zip file, which may become longer; that of an
    older stream where its length stays, and otherwise the file is written anew.
    """

    def split_of(checkpoint: Checkpoint) -> Split:
        return split_assignments(checkpoint, assignments, new=new, cast=cast, dtype=dtype)

    with about(path), closing(open_checkpoint(path)) as opened:
        split, is_set = split_of(opened), opened.is_set
        if is_set and split.tensors and split.changes.added:
            raise UsageError(
                "elements of tensors and new entries of a set of shards are set one after the other",
                hint="run ckpt set twice",
            )
    if split.changes.new_tensors and not split.tensors:
        return rewrite(path, lambda checkpoint: _planned(split_of(checkpoint)), options)
    if not split.names:
        return edit_values(
            path,
            lambda checkpoint, overlay: assign(checkpoint, overlay, assignments, cast=cast),
            output=options.output,
            dry_run=options.dry_run,
            backup=options.backup,
            on_progress=options.on_progress,
            weights_only=options.weights_only,
        )
    _check_target(path, options)
    with about(path), closing(open_checkpoint(path, write=options.output is None and not options.dry_run)) as opened:
        own = own_file(opened, path)
        if options.output is None:
            refuse_cached(own)
        else:
            refuse_own(opened, options.output, "leave -o out to edit it in place")
        split = split_of(opened)
        if options.output is None and not opened.is_set:
            refuse_part_of_set(opened, split.changes)
        with closing(Overlay(opened.container.files)) as overlay:
            changes = assign(opened, overlay, split.tensors, cast=cast)
            opened.container.seal(overlay)
            work = rewriting(opened, split.changes)
            done = Edit(
                path=path,
                output=options.output or path,
                changed=(*changes.changed, *split.names),
                also_changed=changes.also_changed,
                bytes_written=work.nbytes if options.dry_run else 0,
                in_place=options.output is None,
                dry_run=options.dry_run,
                patched=False,
            )
            if options.output is None and work.patch(overlay):
                kept = apply_in_place(overlay, dry_run=options.dry_run, backup=options.backup)
                return replace(done, bytes_written=overlay.nbytes, patched=True, backups=kept)
        done = replace(done, other_names=other_names(options.output or own))
        if options.dry_run:
            return done
        return _replace(work, split, done, own, options, opened.container.files, cast=cast)


def _check_target(path: str, options: Options) -> None:
    """Refuse a file that is not to be edited in place, or an output that cannot be written."""
    if options.output is None:
        refuse_cached(path)
    elif options.backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    else:
        check_output(options.output, path, "leave -o out to edit it in place")


def _planned(split: Split) -> Planned:
    """Entries that are set or added without any element of a tensor; new values are made before they may stand."""
    return Planned(split.changes, SET, split.names, check=lambda: None)


def _replace(
    work: Rewriter, split: Split, done: Edit, own: str, options: Options, files: Sequence[SourceFile], *, cast: bool
) -> Edit:
    """A new file with the new values, whose tensors are then patched before it takes the place of `own`."""
    with keeping() as kept, writing(options.output or own, mode_of=own) as target:
        work.write(target, counting(options.on_progress, lambda: work.nbytes))
        work.verify(target.path)
        if split.tensors:
            _patch_new(target, split.tensors, cast=cast)
        require_unchanged(files)
        if options.backup:
            kept.keep_replaced({own: target.path})
        nbytes = os.fstat(target.fd).st_size
    return replace(done, bytes_written=nbytes, backups=kept.paths)


def _patch_new(target: LocalFile, assignments: Sequence[str], *, cast: bool) -> None:
    with closing(open_checkpoint(target.path)) as checkpoint, closing(Overlay(checkpoint.container.files)) as overlay:
        assign(checkpoint, overlay, assignments, cast=cast)
        checkpoint.container.seal(overlay)
        journal.write_patches(overlay, 0, target)
