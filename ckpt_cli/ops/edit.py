"""How every edit of values is carried out: planned as patches, then written in place or to a new file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from ckpt_cli.errors import RefusedError, UsageError
from ckpt_cli.files import journal
from ckpt_cli.files.caches import refuse_cached
from ckpt_cli.files.hidden import journal_path
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.locks import lock
from ckpt_cli.files.overlay import Overlay
from ckpt_cli.files.replace import copy_into, replacing
from ckpt_cli.formats import open_checkpoint, verify_copy
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.assign import Changes
from ckpt_cli.ops.outputs import check_output, writing

Plan = Callable[[Checkpoint, Overlay], Changes]
"""Fills an overlay with the patches of an edit."""


@dataclass(frozen=True, slots=True)
class Edit:
    """What an edit did, or would do."""

    path: str
    output: str
    """The file that has the result: `path` itself, or the one it was written to."""
    changed: tuple[str, ...]
    also_changed: tuple[str, ...]
    """Tied and overlapping names that changed along."""
    bytes_written: int
    """Bytes of the result that were written: the patches in place, or the whole of a new file."""
    in_place: bool
    dry_run: bool = False
    """Whether nothing was written."""
    backup: str | None = None
    """Where the old file was kept."""


def edit_values(
    path: str, plan: Plan, *, output: str | None = None, dry_run: bool = False, backup: bool = False
) -> Edit:
    """Carry out a plan on the file `path`, all or nothing.

    In place the patches go through a journal; to an `output`, a copy is patched and then renamed into place. Raises
    RefusedError for a file in a content-addressed cache, BusyError while another process writes it.
    """
    if output is None:
        return _edit_in_place(path, plan, dry_run=dry_run, backup=backup)
    if backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    return _edit_to(path, plan, output, dry_run=dry_run)


def _edit_in_place(path: str, plan: Plan, *, dry_run: bool, backup: bool) -> Edit:
    refuse_cached(path)
    opened = open_checkpoint(path) if dry_run else _open_to_write(path)
    with closing(opened) as checkpoint, _planned(checkpoint, plan) as (overlay, changes):
        kept = None
        if not dry_run and overlay:
            kept = _back_up(checkpoint.container.files[0], path) if backup else None
            journal.apply(overlay)
        return Edit(
            path=path,
            output=path,
            changed=changes.changed,
            also_changed=changes.also_changed,
            bytes_written=overlay.nbytes,
            in_place=True,
            dry_run=dry_run,
            backup=kept,
        )


def _open_to_write(path: str) -> Checkpoint:
    """The checkpoint with its file locked, free of journals and still the one that the path names."""
    while True:
        journal.recover(path)
        file = LocalFile(path, write=True)
        try:
            lock(file)
            current = os.path.samestat(os.fstat(file.fd), os.stat(path))
        except BaseException:
            file.close()
            raise
        if current and not os.path.lexists(journal_path(path)):
            return open_checkpoint(path, file=file)
        file.close()  # replaced, or left half edited, while we waited for the lock


@contextmanager
def _planned(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[Overlay, Changes]]:
    """The patches of a plan, with those that the container's checksums need, kept until the block ends."""
    with closing(Overlay(checkpoint.container.files)) as overlay:
        changes = plan(checkpoint, overlay)
        checkpoint.container.seal(overlay)
        yield overlay, changes


def _back_up(file: LocalFile, path: str) -> str:
    """Keep the old file as `PATH.bak`, replacing an older backup."""
    kept = f"{path}.bak"
    if os.path.islink(kept):
        raise RefusedError("a symbolic link stands where the backup goes", path=kept, hint="remove it, or use -o OUT")
    with replacing(kept, mode_of=path) as target:
        copy_into(file, target)
    return kept


def _edit_to(path: str, plan: Plan, output: str, *, dry_run: bool) -> Edit:
    check_output(output, path, "leave -o out to edit it in place")
    with closing(open_checkpoint(path)) as checkpoint, _planned(checkpoint, plan) as (overlay, changes):
        source = checkpoint.container.files[0]
        if not dry_run:
            with writing(output, mode_of=path) as target:
                copy_into(source, target)
                journal.write_patches(overlay, 0, target)
                verify_copy(checkpoint, target.path, output)
        return Edit(
            path=path,
            output=output,
            changed=changes.changed,
            also_changed=changes.also_changed,
            bytes_written=source.size,
            in_place=False,
            dry_run=dry_run,
        )
