"""How structural edits are carried out: planned as changes, then written as a new file in the place of the old one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from ckpt_cli.changes import Changes
from ckpt_cli.errors import RefusedError, UsageError, about
from ckpt_cli.files import journal
from ckpt_cli.files.caches import refuse_cached
from ckpt_cli.files.copying import Progress, copy_into, no_progress
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.overlay import Overlay
from ckpt_cli.files.replace import copy_as, creating, keep_as, replacing_folder
from ckpt_cli.files.replace_set import replacing_set
from ckpt_cli.formats import Rewriter, open_checkpoint, rewriting
from ckpt_cli.formats.folder import index_of
from ckpt_cli.formats.shard_set_write import Rewriting as SetRewriting
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.edit import Edit
from ckpt_cli.ops.outputs import check_output, check_output_folder, writing


@dataclass(frozen=True, slots=True)
class Planned:
    """What an edit makes of a checkpoint, and how it is to be told."""

    changes: Changes
    verb: str
    """In the past tense: `renamed`."""
    changed: Sequence[str] = ()
    also_changed: Sequence[str] = ()
    check: Callable[[], None] | None = None
    """Raises, once all is written and before it takes its place, where the result must not stand."""


Plan = Callable[[Checkpoint], Planned]


@dataclass(frozen=True, slots=True)
class Options:
    """What every edit can be told."""

    output: str | None = None
    dry_run: bool = False
    backup: bool = False
    progress: Progress = field(default=no_progress)


def rewrite(path: str, plan: Plan, options: Options) -> Edit:
    """Carry out a plan, all or nothing: to `options.output`, or to what takes the place of `path`.

    Raises RefusedError for a file in a content-addressed cache, BusyError while another process writes it.
    """
    if options.output is None:
        refuse_cached(path)
    elif options.backup:
        raise UsageError("--backup is for edits in place: with an output the old file stays as it is")
    with about(path), closing(open_checkpoint(path, write=options.output is None and not options.dry_run)) as opened:
        if options.output is not None and opened.is_set:
            check_output_folder(options.output)
        elif options.output is not None:
            check_output(options.output, path, "leave -o out to edit it in place")
        planned = plan(opened)
        if options.output is None:
            _require_no_index(path, planned)
        work = rewriting(opened, planned.changes)
        done = Edit(
            path=path,
            output=options.output or path,
            changed=tuple(planned.changed),
            also_changed=tuple(planned.also_changed),
            bytes_written=work.nbytes,
            in_place=options.output is None,
            dry_run=options.dry_run,
            verb=planned.verb,
            patched=False,
            renamed=planned.changes.names,
        )
        if isinstance(work, SetRewriting):
            return _rewrite_set(opened, work, planned, done, options)
        if options.output is None:
            with closing(Overlay(opened.container.files)) as overlay:
                if work.patch(overlay):
                    return _patch(opened, overlay, done, options)
        if options.dry_run:
            return replace(done, bytes_written=work.size())
        return _replace(work, planned, done, options)


def _require_no_index(path: str, planned: Planned) -> None:
    """Refuse to change in one shard alone what the index beside it says of it."""
    index = index_of(path)
    changes = planned.changes
    if index and (changes.names or changes.dropped or changes.tensors or changes.root):
        whole = os.path.join(os.path.dirname(path), index)
        raise RefusedError(
            f"it is one shard of {index}, which would not be true of it any more",
            hint=f"name the whole set to edit it ({whole}), or write the result elsewhere with -o OUT",
        )


def _patch(checkpoint: Checkpoint, overlay: Overlay, done: Edit, options: Options) -> Edit:
    """The edit as patches in place: of a header, or of a pickle."""
    checkpoint.container.seal(overlay)
    kept = None
    if not options.dry_run:
        if options.backup and overlay:
            kept = copy_as(checkpoint.container.files[0], f"{done.path}.bak")
        journal.apply(overlay)
    return _with_backups(replace(done, bytes_written=overlay.nbytes, patched=True), kept)


def _replace(work: Rewriter, planned: Planned, done: Edit, options: Options) -> Edit:
    """The edit as a new file."""
    with writing(done.output, mode_of=done.path) as target:
        _write(work, planned, target, options)
        kept = keep_as(done.path, f"{done.path}.bak") if options.backup else None
        nbytes = os.fstat(target.fd).st_size
    return _with_backups(replace(done, bytes_written=nbytes), kept)


def _write(work: Rewriter, planned: Planned, target: LocalFile, options: Options) -> None:
    """Write one file, and look whether it may stand."""
    work.write(target, options.progress)
    if planned.check is not None:
        planned.check()
    work.verify(target.path)


def _with_backups(done: Edit, *kept: str | None) -> Edit:
    names = tuple(name for name in kept if name is not None)
    return replace(done, backup=names[0] if names else None, backups=names)


def _rewrite_set(checkpoint: Checkpoint, work: SetRewriting, planned: Planned, done: Edit, options: Options) -> Edit:
    """The edit as new shards and a new index: in place of the old ones, or in a new folder."""
    files = {os.path.basename(file.path): file for file in checkpoint.container.files}
    unchanged = [files[name] for name in work.unchanged] if options.output is not None else []
    nbytes = work.size() + sum(file.size for file in unchanged)
    done = replace(done, bytes_written=nbytes, removed=tuple(work.removed))
    if options.output is None:
        for name in _replaced(work):
            _require_replaceable(files[name], dry_run=options.dry_run)
    if options.dry_run:
        return done
    if options.output is not None:
        with replacing_folder(options.output) as folder:
            _write_set(work, planned, options, lambda name: _create(folder, name, files))
            for file in unchanged:
                with creating(os.path.join(folder, os.path.basename(file.path)), mode_of=file.path) as target:
                    copy_into(file, target, options.progress)
        return done
    folder = os.path.dirname(files[work.first].path)
    with replacing_set(folder, work.first) as replacement:
        _write_set(work, planned, options, replacement.create)
        replacement.removed.extend(work.removed)
        kept = [keep_as(files[name].path, f"{files[name].path}.bak") for name in _replaced(work) if options.backup]
    return _with_backups(done, *kept)


def _require_replaceable(file: LocalFile, *, dry_run: bool) -> None:
    """Refuse to replace a file of a set that only a link stands for, or that may not be written."""
    refuse_cached(file.path)
    if not dry_run and not file.writable:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file.path)
    if os.path.islink(file.path):
        raise RefusedError(
            "it is a symbolic link, so it cannot be replaced together with the other files of the set",
            path=file.path,
            hint="write the result elsewhere with -o OUT",
        )


def _replaced(work: SetRewriting) -> list[str]:
    return [*work.names, *work.removed]


def _create(folder: str, name: str, files: dict[str, LocalFile]) -> LocalFile:
    with creating(os.path.join(folder, name), mode_of=files[name].path) as target:
        pass
    return LocalFile(target.path, write=True)


def _write_set(work: SetRewriting, planned: Planned, options: Options, create: Callable[[str], LocalFile]) -> None:
    """Write the shards that change and the index."""
    for part in work.parts:
        target = create(part.name)
        part.work.write(target, options.progress)
        os.fsync(target.fd)
        part.work.verify(target.path)
    if planned.check is not None:
        planned.check()
    if work.index is not None:
        name, content = work.index
        target = create(name)
        journal.write_all(target.fd, content, 0)
        os.fsync(target.fd)
