"""Edits of values: planned as patches, then written in place or to a new file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ckpt_cli.edits.files_beside import Beside, copy_beside, files_beside
from ckpt_cli.errors import UnsupportedError, UsageError
from ckpt_cli.files.atomic import creating, replacing_folder
from ckpt_cli.files.backup import keeping
from ckpt_cli.files.content_addressed import refuse_cached
from ckpt_cli.files.copy import OnProgress, Progress, copy_into, counting
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.outcome import stating
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.unchanged import require_unchanged, unchanged
from ckpt_cli.formats import open_checkpoint, verify_copy
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.output import check_output, check_output_folder, other_names, refuse_own, writing

if TYPE_CHECKING:
    from ckpt_cli.edits.set_tensors import Changes

Plan = Callable[[Checkpoint, Overlay], "Changes"]
"""Fills an overlay with the patches of an edit."""


class Verb(NamedTuple):
    """The verb for the names that an edit changes."""

    past: str
    """In the past tense: `renamed`."""
    infinitive: str
    """After "would", in a dry run: `rename`."""


SET = Verb("set", "set")


@dataclass(frozen=True, slots=True)
class Edit:
    """The result of an edit, or of its dry run."""

    path: str
    output: str
    """The file that has the result: `path` itself, or the one it was written to."""
    changed: tuple[str, ...]
    also_changed: tuple[str, ...]
    """Tied and overlapping names that also changed."""
    bytes_written: int
    """Bytes of the result that were written: the patches in place, or the whole of a new file."""
    in_place: bool
    dry_run: bool = False
    """True if nothing was written."""
    backups: tuple[str, ...] = ()
    """The paths at which all old files were kept."""
    verb: Verb = SET
    """The verb for the names that changed."""
    patched: bool = True
    """True if an edit in place changed a part of the file only, rather than replacing it by a new one."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The new name of each that got one."""
    removed: tuple[str, ...] = ()
    """Shards of which nothing was left, and that went."""
    left: tuple[str, ...] = ()
    """Names that were meant too, but stay as they are: what a cast cannot cast."""
    placed: Mapping[str, str] = field(default_factory=dict)
    """In which files of a set each key of metadata changed, in words."""
    beside: Beside | None = None
    """The result for the files beside a model's weights, where a new folder was written."""
    other_names: int = 0
    """Further names (hard links) of files that were replaced by new ones: they keep the old files."""
    remaining: tuple[str, ...] = ()
    """Names that still have the bytes of what was taken out."""

    @property
    def backup(self) -> str | None:
        """The path at which the old file was kept, or the first of several; None where none was kept."""
        return self.backups[0] if self.backups else None


def edit_values(
    path: str,
    plan: Plan,
    *,
    output: str | None = None,
    dry_run: bool = False,
    backup: bool = False,
    on_progress: OnProgress | None = None,
    weights_only: bool = False,
) -> Edit:
    """Carry out a plan on the file `path`, all or nothing.

    In place the patches go through a journal; to an `output`, a copy is patched and then renamed into place. Raises
    RefusedError for a file in a content-addressed cache, BusyError while another process writes it.
    """
    if output is None:
        return _edit_in_place(path, plan, dry_run=dry_run, backup=backup)
    if backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    return _edit_to(path, plan, output, dry_run=dry_run, on_progress=on_progress, weights_only=weights_only)


def _edit_in_place(path: str, plan: Plan, *, dry_run: bool, backup: bool) -> Edit:
    refuse_cached(path)
    with (
        closing(open_checkpoint(path, write=not dry_run)) as checkpoint,
        _planned(checkpoint, plan) as (overlay, changes),
    ):
        kept = apply_in_place(overlay, dry_run=dry_run, backup=backup)
        return Edit(
            path=path,
            output=path,
            changed=changes.changed,
            also_changed=changes.also_changed,
            bytes_written=overlay.nbytes,
            in_place=True,
            dry_run=dry_run,
            backups=kept,
        )


def apply_in_place(overlay: Overlay, *, dry_run: bool, backup: bool) -> tuple[str, ...]:
    """Patch the files, all or nothing, unless it is a dry run; returns where backups were kept."""
    touched = [file for number, file in enumerate(overlay.files) if overlay.touches(number)]
    for file in touched:
        refuse_cached(file.path)
        if not dry_run and not file.writable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file.path)
    if dry_run or not touched:
        return ()
    with keeping() as kept:
        if backup:
            with stating(touched[0].path):
                kept.keep_patched(overlay)
        journal.apply(overlay)
        kept.note_patched()
    return kept.paths


@contextmanager
def _planned(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[Overlay, Changes]]:
    """The patches of a plan, with those that the container's checksums need, kept until the block ends."""
    with closing(Overlay(checkpoint.container.files)) as overlay:
        changes = plan(checkpoint, overlay)
        checkpoint.container.seal(overlay)
        yield overlay, changes


def _edit_to(
    path: str, plan: Plan, output: str, *, dry_run: bool, on_progress: OnProgress | None, weights_only: bool = False
) -> Edit:
    with closing(open_checkpoint(path)) as checkpoint, unchanged(checkpoint.container.files):
        if checkpoint.is_set:
            check_output_folder(output)
            _check_names(checkpoint)
        else:
            check_output(output, path, "leave -o out to edit it in place")
            refuse_own(checkpoint, output, "leave -o out to edit it in place")
        with _planned(checkpoint, plan) as (overlay, changes):
            beside = files_beside(checkpoint, output) if checkpoint.is_set and not weights_only else None
            kept_by = 0 if checkpoint.is_set else other_names(output)
            if not dry_run:
                progress = counting(on_progress, lambda: sum(file.size for file in overlay.files))
                if checkpoint.is_set:
                    _write_folder(checkpoint, overlay, output, progress, beside)
                else:
                    _write_file(checkpoint, overlay, output, progress)
            return Edit(
                path=path,
                output=output,
                changed=changes.changed,
                also_changed=changes.also_changed,
                bytes_written=sum(file.size for file in overlay.files),
                in_place=False,
                dry_run=dry_run,
                patched=False,
                beside=beside,
                other_names=kept_by,
            )


def _check_names(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError where two files of a set have one name, in different folders."""
    names = [os.path.basename(file.path) for file in checkpoint.container.files]
    if len(set(names)) < len(names):
        raise UnsupportedError(
            "its files have the same names in several folders, so they cannot be written to one",
            path=checkpoint.path,
            hint="copy the folder, and change the copy",
        )


def _write_file(checkpoint: Checkpoint, overlay: Overlay, output: str, progress: Progress) -> None:
    """A patched copy of the one file."""
    with writing(output, mode_of=checkpoint.path) as target:
        _write_copy(overlay, 0, target, progress)
        verify_copy(checkpoint, target.path, output)
        require_unchanged(overlay.files)


def _write_folder(
    checkpoint: Checkpoint, overlay: Overlay, output: str, progress: Progress, beside: Beside | None
) -> None:
    """Patched copies of all files of a set in a new folder."""
    with replacing_folder(output) as folder:
        for number, file in enumerate(overlay.files):
            with creating(os.path.join(folder, os.path.basename(file.path)), mode_of=file.path) as target:
                _write_copy(overlay, number, target, progress)
        require_unchanged(overlay.files)
        copy_beside(checkpoint, beside, folder)
        is_folder = os.path.isdir(checkpoint.path)
        verify_copy(checkpoint, folder if is_folder else f"{folder}/{os.path.basename(checkpoint.path)}", output)


def _write_copy(overlay: Overlay, number: int, target: LocalFile, progress: Progress) -> None:
    """A copy of one of the files, patched."""
    copy_into(overlay.files[number], target, progress)
    journal.write_patches(overlay, number, target)
