"""How edits happen, all but `convert` and `undo`: open once, plan, check, then patch in place or write new files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from ckpt_cli.edits.folded import fold_names
from ckpt_cli.edits.in_place import (
    hinting_at_outputs,
    refuse_joined,
    refuse_links,
    refuse_part_of_set,
    refuse_same_names,
    require_writable,
    require_writable_at,
)
from ckpt_cli.edits.plan import MANY, EditOptions, EditPlan, EditResult, Planner
from ckpt_cli.errors import UnsupportedError, UsageError, about, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import refuse_cached
from ckpt_cli.files.backup import keeping
from ckpt_cli.files.copy import Progress, counting
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.new_folder import passes_over, require_room
from ckpt_cli.files.outcome import stating
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.places import is_file
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.unchanged import require_unchanged, unchanged
from ckpt_cli.formats import open_checkpoint, rewriting, verify_copy
from ckpt_cli.model.changes import entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.output import (
    check_output,
    check_output_folder,
    other_names,
    own_file,
    refuse_own,
    writing,
)

if TYPE_CHECKING:
    from ckpt_cli.edits.files_beside import Beside
    from ckpt_cli.formats.writing import Rewriter, SetRewriter

_IN_PLACE = "leave -o out to edit it in place"


def transaction(path: str, plan: Planner, options: EditOptions, already: Checkpoint | None = None) -> EditResult:
    """Carry out the plan of an edit, all or nothing: to `options.output`, or to what takes the place of `path`.

    The checkpoint is opened once, and locked until the edit is done unless it goes elsewhere. For an output it may be
    open already, which closes it; it is used up. What fits is patched in
    place through a journal; anything else becomes a new file, or new files of a set.
    Raises CkptError where the plan cannot be made or carried out, RefusedError for a file in a content-addressed
    cache, BusyError while another process writes it, OSError.
    """
    if options.output is not None and options.backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    write = options.output is None and not options.dry_run
    with (
        about(path),
        hinting_at_outputs(options),
        closing(already or open_checkpoint(path, write=write)) as opened,
        unchanged(opened.container.files),
        closing(Overlay(opened.container.files)) as overlay,
    ):
        own = own_file(opened, path)
        _check_target(opened, path, own, options)
        planned = plan(opened)
        if options.output is None and not opened.is_set:
            refuse_part_of_set(opened, planned.changes)
        if planned.patch is not None:
            refuse_joined(opened, planned)
            planned.patch(opened, overlay)
            opened.container.seal(overlay)
        elements = overlay.touched
        work = rewriting(opened, planned.changes) if planned.is_structural else None
        done = _result(path, planned, options, opened)
        return _Transaction(opened, own, planned, options, overlay, work, elements).carry_out(done)


def _check_target(checkpoint: Checkpoint, path: str, own: str, options: EditOptions) -> None:
    """Raise before any work is done where the result cannot be written."""
    if checkpoint.fixed:
        raise UnsupportedError(
            checkpoint.fixed,
            path=checkpoint.path,
            hint=f"ckpt convert {quoted(checkpoint.path)} OUT.safetensors writes the model, to be edited there",
        )
    if options.output is None:
        refuse_cached(own)
        if options.dry_run and is_file(own):
            require_writable_at(own)
    elif checkpoint.is_set:
        check_output_folder(options.output)
        refuse_same_names(checkpoint)
    else:
        check_output(options.output, path, _IN_PLACE)
        refuse_own(checkpoint, options.output, _IN_PLACE)


def _result(path: str, plan: EditPlan, options: EditOptions, checkpoint: Checkpoint) -> EditResult:
    """Return the part of an edit's result that follows from its plan."""
    return EditResult(
        path=path,
        output=options.output or path,
        changed=tuple(plan.changed),
        also_changed=tuple(plan.also_changed),
        bytes_written=0,
        in_place=options.output is None,
        dry_run=options.dry_run,
        verb=plan.verb,
        remaining=tuple(plan.remaining),
        fit=plan.fit,
        renamed=plan.renamed,
        carried=tuple(plan.carried),
        left=tuple(plan.left),
        placed=plan.placed,
        notes=tuple(plan.notes),
        folded=fold_names(checkpoint, plan.changed) if len(plan.changed) > MANY and not plan.changes.names else (),
    )


@dataclass(frozen=True, slots=True)
class _Transaction:
    """An edit that is planned, about to be written."""

    checkpoint: Checkpoint
    own: str
    """The file that an edit of a single file replaces."""
    plan: EditPlan
    options: EditOptions
    overlay: Overlay
    """The patches of the old files: those of elements, then those of a document that fits in place."""
    work: Rewriter | SetRewriter | None
    """The work of the format, a `SetRewriter` for a set; None where only elements change."""
    elements: Sequence[SourceFile]
    """The files with elements that change."""

    @property
    def _of_file(self) -> Rewriter | None:
        """The work, of a checkpoint that is one file."""
        return cast("Rewriter | None", self.work)

    @property
    def _of_set(self) -> SetRewriter | None:
        """The work, of a checkpoint that is a set."""
        return cast("SetRewriter | None", self.work)

    def carry_out(self, done: EditResult) -> EditResult:
        """Write the edit in the cheapest way that it allows; returns the result."""
        if done.dry_run and self.plan.check is not None:
            self._rehearse(self.plan.check)
        if done.in_place and (self.work is None or self.work.patch(self.overlay)):
            return self._patch(done)
        if self.checkpoint.is_set:
            if self._of_set is not None and not done.in_place:
                self._of_set.for_new_folder()
            return self._rewrite_set(done)
        done = replace(done, other_names=other_names(done.output if not done.in_place else self.own))
        return replace(done, bytes_written=self._nbytes()) if done.dry_run else self._rewrite_file(done)

    def _nbytes(self) -> int:
        """The bytes of new files, without those of a set that stay as they are."""
        files = self.checkpoint.container.files
        return self.work.nbytes if self.work is not None else sum(file.size for file in files)

    def _progress(self) -> Progress:
        passes = passes_over(self.options.output or "")
        return counting(self.options.on_progress, lambda: self._nbytes() * passes)

    def _rehearse(self, check: Callable[[], None]) -> None:
        """Make the new bytes and drop them, to find out whether the result might stand."""
        for content in self.plan.changes.contents.values():
            if content.make is not None:
                content.make(lambda _: None)
        check()

    def _check(self) -> None:
        """Raise where what was written must not take its place."""
        if self.plan.check is not None:
            self.plan.check()

    # --- in place ----------------------------------------------------------------------------------------------------

    def _patch(self, done: EditResult) -> EditResult:
        """Patch the files in place, all or nothing: elements, headers, pickles, an index."""
        touched = self.overlay.touched
        for file in touched:
            refuse_cached(file.path)
        if self.checkpoint.is_set and self.work is not None:
            refuse_links(touched)
        require_writable(touched, dry_run=done.dry_run)
        done = replace(done, bytes_written=self.overlay.nbytes, patched=True)
        if done.dry_run or not touched:
            return done
        with keeping() as kept:
            if self.options.backup:
                with stating(touched[0].path):
                    kept.keep_patched(self.overlay)
            journal.apply(self.overlay)
            kept.note_patched()
        return replace(done, backups=kept.paths)

    # --- one new file ------------------------------------------------------------------------------------------------

    def _rewrite_file(self, done: EditResult) -> EditResult:
        """Write a new file, in the place of the old one where no other is named."""
        from ckpt_cli.edits.new_set import copy_patched

        work, progress = self._of_file, self._progress()
        output = self.own if done.in_place else done.output
        require_room(output, self._nbytes)
        with keeping() as kept, writing(output, mode_of=self.own, progress=progress) as target:
            if work is None:
                copy_patched(self.overlay, self.overlay.files[0], target, progress)
                verify_copy(self.checkpoint, target.path, done.output)
            else:
                work.write(target, progress)
                self._check()
                work.verify(target.path)
                self._patch_copy(target)
            require_unchanged(self.checkpoint.container.files)
            if self.options.backup:
                kept.keep_replaced({self.own: target.path})
            nbytes = os.fstat(target.fd).st_size
        return replace(done, bytes_written=nbytes, backups=kept.paths)

    def _patch_copy(self, target: LocalFile) -> None:
        """Put the new bytes of elements into a rewritten file, in which they lie elsewhere."""
        if self.plan.patch is None:
            return
        with closing(open_checkpoint(target.path)) as copy, closing(Overlay(copy.container.files)) as overlay:
            self.plan.patch(copy, overlay)
            copy.container.seal(overlay)
            journal.write_patches(overlay, overlay.files[0], target)

    # --- the files of a set ------------------------------------------------------------------------------------------

    def _rewrite_set(self, done: EditResult) -> EditResult:
        """Write the shards that change, and the index: in place of the old ones, or in a new folder."""
        work = self._of_set
        if work is not None:
            behind = work.unreferenced if done.in_place else 0
            done = replace(done, removed=tuple(work.removed), unreferenced=behind)
        if work is None or not done.in_place:
            beside = None if self.options.weights_only else self._beside(done.output)
            done = replace(done, beside=beside)
            if done.dry_run:
                staying = self._files(*work.unchanged) if work is not None else ()
                return replace(done, bytes_written=self._nbytes() + sum(file.size for file in staying))
            return self._write_folder(done)
        files = self._files(*work.names, *work.removed)
        if not set(files).isdisjoint(self.elements):
            raise UsageError(
                "elements of tensors and other values of one file, which has to be written again, are set one after "
                "the other in a set of files",
                hint="run ckpt set twice",
            )
        files += self.elements
        for file in files:
            refuse_cached(file.path)
        refuse_links(files)
        require_writable(files, dry_run=done.dry_run)
        done = replace(done, other_names=other_names(*(file.path for file in files)))
        return replace(done, bytes_written=self._nbytes()) if done.dry_run else self._replace_files(done, work)

    def _files(self, *names: str) -> list[SourceFile]:
        """The files of the set that have some names, in the set's order."""
        from ckpt_cli.formats.runs.read import name_within

        return [file for file in self.checkpoint.container.files if name_within(self.checkpoint, file) in names]

    def _beside(self, output: str) -> Beside | None:
        """Return the files beside a set that is written to a new folder."""
        from ckpt_cli.edits.files_beside import files_beside, stale_dtype

        beside = files_beside(self.checkpoint, output)
        if beside is None:
            return None
        after = entries_after(self.checkpoint.entries, self.plan.changes)
        tensors = (entry for entry in after if isinstance(entry, Tensor))
        return replace(beside, stale=stale_dtype(self.checkpoint, tensors)).with_edits(self.plan.beside)

    def _write_folder(self, done: EditResult) -> EditResult:
        """Write all files of a set to a new folder."""
        from ckpt_cli.edits.new_set import NewSet

        new = NewSet(self.checkpoint, self.plan, self.overlay, self._of_set, done.beside, self._check)
        require_room(done.output, new.staged)
        return replace(done, bytes_written=new.write(done.output, self._progress()))

    def _replace_files(self, done: EditResult, work: SetRewriter) -> EditResult:
        """Write new files of a set, which then take the places of the old ones all at once."""
        from ckpt_cli.edits.new_set import copy_patched, write_set
        from ckpt_cli.files.journal.replace import replacing_set
        from ckpt_cli.formats.runs.read import name_within

        files = {name_within(self.checkpoint, file): file for file in self.checkpoint.container.files}
        folder = os.path.dirname(files[work.first].path)
        patched = [name for name, file in files.items() if file in self.elements]
        with keeping() as kept, replacing_set(folder, work.first) as replacement:

            def create(name: str) -> LocalFile:
                return replacement.create(name, mode_of=files[work.first].path)

            progress = self._progress()
            nbytes = write_set(work, create, progress, self._check, files.values())
            for name in patched:
                copy = create(name)
                copy_patched(self.overlay, files[name], copy, progress)
                replacement.done(copy)
                nbytes += copy.size
            replacement.removed.extend(work.removed)
            if self.options.backup:
                new: dict[str, str | None] = {
                    files[name].path if name in files else os.path.join(folder, name): replacement.new_path(name)
                    for name in (*work.names, *patched)
                }
                new |= dict.fromkeys(files[name].path for name in work.removed)
                kept.keep_replaced(new, (file.path for file in files.values()))
        return replace(done, bytes_written=nbytes, backups=kept.paths)
