"""Structural edits: planned as changes, then written as a new file in the place of the old one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckpt_cli.edits.files_beside import Beside, copy_beside, files_beside, stale_dtype
from ckpt_cli.edits.patching import Edit, Verb, apply_in_place
from ckpt_cli.errors import RefusedError, UsageError, about
from ckpt_cli.files.atomic import creating, replacing_folder
from ckpt_cli.files.backup import keeping
from ckpt_cli.files.content_addressed import refuse_cached
from ckpt_cli.files.copy import OnProgress, Progress, copy_into, counting, no_progress
from ckpt_cli.files.fsync import write_all
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.unchanged import require_unchanged, unchanged
from ckpt_cli.formats import Rewriter, open_checkpoint, rewriting
from ckpt_cli.formats.sharded.names import index_of
from ckpt_cli.model.changes import Changes, entries_after
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.output import check_output, check_output_folder, other_names, own_file, refuse_own, writing

if TYPE_CHECKING:
    from ckpt_cli.formats.sharded.rewrite import Rewriting as SetRewriting


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of an edit: changes to a checkpoint, and facts for the report."""

    changes: Changes
    verb: Verb
    changed: Sequence[str] = ()
    also_changed: Sequence[str] = ()
    check: Callable[[], None] | None = None
    """Raises, once all is written and before it takes its place, where the result must not stand."""
    left: Sequence[str] = ()
    """Names that were meant too, but must stay as they are."""
    sources: Sequence[LocalFile] = ()
    """Open files that the result is made from, which must not change until it is written."""
    placed: Mapping[str, str] = field(default_factory=dict)
    """In which files each key of metadata changes, where a checkpoint has several, in words."""
    remaining: Sequence[str] = ()
    """Names that still have the bytes of what was taken out."""


Plan = Callable[[Checkpoint], Planned]

_IN_PLACE = "leave -o out to edit it in place"


@dataclass(frozen=True, slots=True)
class Options:
    """Options that every edit has."""

    output: str | None = None
    dry_run: bool = False
    backup: bool = False
    on_progress: OnProgress | None = None
    """Called with bytes done and bytes in all, once the edit takes a while."""
    weights_only: bool = False
    """True if a new folder gets no copies of the files beside the weights."""
    progress: Progress = field(default=no_progress)
    """Called with the number of bytes just written; made from `on_progress`."""


def rewrite(path: str, plan: Plan, options: Options) -> Edit:
    """Carry out a plan, all or nothing: to `options.output`, or to what takes the place of `path`.

    Raises RefusedError for a file in a content-addressed cache, BusyError while another process writes it.
    """
    if options.output is not None and options.backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    with (
        about(path),
        closing(open_checkpoint(path, write=options.output is None and not options.dry_run)) as opened,
        unchanged(opened.container.files),
    ):
        if options.output is not None and opened.is_set:
            check_output_folder(options.output)
        elif options.output is not None:
            check_output(options.output, path, _IN_PLACE)
            refuse_own(opened, options.output, _IN_PLACE)
        own = own_file(opened, path)
        if options.output is None:
            refuse_cached(own)
        planned = replace(plan(opened), sources=opened.container.files)
        if options.output is None and not opened.is_set:
            refuse_part_of_set(opened, planned.changes)
        work = rewriting(opened, planned.changes)
        options = replace(options, progress=counting(options.on_progress, lambda: work.nbytes))
        done = Edit(
            path=path,
            output=options.output or path,
            changed=tuple(planned.changed),
            also_changed=tuple(planned.also_changed),
            bytes_written=work.nbytes if options.dry_run else 0,
            in_place=options.output is None,
            dry_run=options.dry_run,
            verb=planned.verb,
            remaining=tuple(planned.remaining),
            patched=False,
            renamed=planned.changes.names,
            left=tuple(planned.left),
            placed=planned.placed,
        )
        if options.dry_run and planned.check is not None:
            _rehearse(planned)
        if options.output is None:
            with closing(Overlay(opened.container.files)) as overlay:
                if work.patch(overlay):
                    return _patch(opened, overlay, done, options)
        if opened.is_set:
            return _rewrite_set(opened, work, planned, done, options)
        done = replace(done, other_names=other_names(options.output or own))
        return done if options.dry_run else _replace(work, planned, done, own, options)


def _beside(checkpoint: Checkpoint, changes: Changes, output: str) -> Beside | None:
    """Return the files beside a set that is written to a new folder."""
    beside = files_beside(checkpoint, output)
    if beside is None:
        return None
    after = (entry for entry in entries_after(checkpoint.entries, changes) if isinstance(entry, Tensor))
    return replace(beside, stale=stale_dtype(checkpoint, after))


def refuse_part_of_set(checkpoint: Checkpoint, changes: Changes) -> None:
    """Refuse to change one shard in a way that would leave its index behind."""
    is_told = changes.names or changes.dropped or changes.tensors or changes.added
    index = index_of(checkpoint.path) if is_told else None
    if index is not None:
        whole = os.path.join(os.path.dirname(checkpoint.path), index)
        raise RefusedError(
            f"is one shard of {index}, which would no longer describe it",
            path=checkpoint.path,
            hint=f"edit the whole set: name {whole}, or -o OUT writes the one shard elsewhere",
        )


def _patch(checkpoint: Checkpoint, overlay: Overlay, done: Edit, options: Options) -> Edit:
    """The edit as patches in place: of headers, of pickles, of an index."""
    if checkpoint.is_set:
        touched = [file for number, file in enumerate(overlay.files) if overlay.touches(number)]
        _require_replaceable(touched, options)
    kept = apply_in_place(overlay, dry_run=options.dry_run, backup=options.backup)
    return replace(done, bytes_written=overlay.nbytes, patched=True, backups=kept)


def _replace(work: Rewriter, planned: Planned, done: Edit, own: str, options: Options) -> Edit:
    """The edit as a new file, in the place of `own` where no other is named."""
    with keeping() as kept, writing(options.output or own, mode_of=own) as target:
        _write(work, planned, target, options)
        if options.backup:
            kept.keep_replaced({own: target.path})
        nbytes = os.fstat(target.fd).st_size
    return replace(done, bytes_written=nbytes, backups=kept.paths)


def _write(work: Rewriter, planned: Planned, target: LocalFile, options: Options) -> None:
    """Write one file, and look whether it may stand."""
    work.write(target, options.progress)
    if planned.check is not None:
        planned.check()
    work.verify(target.path)
    require_unchanged(planned.sources)


def _rewrite_set(checkpoint: Checkpoint, work: SetRewriting, planned: Planned, done: Edit, options: Options) -> Edit:
    """Rewrite some files of a set, or plan it in a dry run."""
    done = replace(done, removed=tuple(work.removed))
    if options.output is not None and not options.weights_only:
        done = replace(done, beside=_beside(checkpoint, planned.changes, options.output))
    if done.in_place:
        names = {*work.names, *work.removed}
        files = [file for file in checkpoint.container.files if os.path.basename(file.path) in names]
        _require_replaceable(files, options)
        done = replace(done, other_names=other_names(*(file.path for file in files)))
    if options.dry_run:
        return _measured(checkpoint, work, done)
    return _replace_set(checkpoint, work, planned, done, options)


def _replace_set(checkpoint: Checkpoint, work: SetRewriting, planned: Planned, done: Edit, options: Options) -> Edit:
    """The edit as new shards and a new index: in place of the old ones, or in a new folder."""
    from ckpt_cli.files.journal.replace import replacing_set

    files = {os.path.basename(file.path): file for file in checkpoint.container.files}
    if options.output is not None:
        with replacing_folder(options.output) as folder, ExitStack() as stack:

            def create(name: str) -> LocalFile:
                return stack.enter_context(creating(os.path.join(folder, name), mode_of=files[name].path))

            nbytes = _write_set(work, planned, options, create)
            for name in work.unchanged:
                with creating(os.path.join(folder, name), mode_of=files[name].path) as target:
                    copy_into(files[name], target, options.progress)
                    nbytes += target.size
            copy_beside(checkpoint, done.beside, folder)
        return replace(done, bytes_written=nbytes)
    folder = os.path.dirname(files[work.first].path)
    with keeping() as kept, replacing_set(folder, work.first) as replacement:
        nbytes = _write_set(work, planned, options, replacement.create)
        replacement.removed.extend(work.removed)
        if options.backup:
            new: dict[str, str | None] = {files[name].path: replacement.new_path(name) for name in work.names}
            new |= dict.fromkeys(files[name].path for name in work.removed)
            kept.keep_replaced(new, (file.path for file in files.values()))
    return replace(done, bytes_written=nbytes, backups=kept.paths)


def _rehearse(planned: Planned) -> None:
    """Make the new bytes and drop them, to look whether they might stand."""
    for content in planned.changes.contents.values():
        if content.make is not None:
            content.make(lambda _: None)
    if planned.check is not None:
        planned.check()


def _measured(checkpoint: Checkpoint, work: SetRewriting, done: Edit) -> Edit:
    """Return the result of a dry run on a set: a new folder has the shards that stay as they are as well."""
    if done.in_place:
        return done
    files = {os.path.basename(file.path): file for file in checkpoint.container.files}
    return replace(done, bytes_written=done.bytes_written + sum(files[name].size for name in work.unchanged))


def _require_replaceable(files: Iterable[LocalFile], options: Options) -> None:
    """Raise where a file of a set must not, or may not, change: what a link leads to may be part of another set too."""
    for file in files:
        refuse_cached(file.path)
        if os.path.islink(file.path):
            raise RefusedError(
                "is a symbolic link, and the files of a set are changed where they lie",
                path=file.path,
                hint="write the result elsewhere with -o OUT",
            )
        if not (os.access(file.path, os.W_OK) if options.dry_run else file.writable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file.path)


def _write_set(work: SetRewriting, planned: Planned, options: Options, create: Callable[[str], LocalFile]) -> int:
    """Write the shards that change and the index; returns their bytes."""
    nbytes = 0
    for part in work.parts:
        target = create(part.name)
        part.work.write(target, options.progress)
        os.fsync(target.fd)
        part.work.verify(target.path)
        nbytes += target.size
    if planned.check is not None:
        planned.check()
    require_unchanged(planned.sources)
    if work.index is not None:
        name, content = work.index
        target = create(name)
        write_all(target.fd, content, 0)
        os.fsync(target.fd)
        nbytes += len(content)
    return nbytes
