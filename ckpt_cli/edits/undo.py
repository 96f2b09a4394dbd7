"""Undo the newest edit that kept backups."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing

from ckpt_cli.edits.plan import EditResult, Verb
from ckpt_cli.errors import CkptError, RefusedError, about
from ckpt_cli.files.atomic import refuse_cached
from ckpt_cli.files.journal.apply import recover
from ckpt_cli.files.open import Opener, finish_edits, open_beside_writers
from ckpt_cli.files.places import canonical, folder_of, is_folder, is_taken, join, place_of
from ckpt_cli.files.restore import KeptEdit, changed_since, missing_backups, newest_edit, restore
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.runs.read import RunFiles


def undo(path: str, *, force: bool = False, dry_run: bool = False) -> EditResult:
    """Put the highest-numbered backup of a checkpoint back in place, of all files of that edit or of none.

    The backup and its record are then gone. Raises RefusedError where a file changed since the edit, or where no
    record says that it did not, unless `force` is given; and for a file in a content-addressed cache.
    """
    with about(path):
        folder, names = _files_of(path)
        edit = _newest(path, folder, names)
        with closing(_locked(edit, dry_run=dry_run)):
            edit = _newest(path, folder, names)
            for name in edit.restored.values():
                refuse_cached(edit.path(name))
            if gone := missing_backups(edit):
                raise RefusedError(
                    f"the edit kept several files, and of those {gone[0]!r} is not there any more",
                    hint="put it back, or copy the other backups in place by hand",
                )
            if not force:
                _refuse_changed(edit)
            created = edit.created
            if not dry_run:
                restore(edit)
    beside = join(folder_of(path) if not is_folder(path) else path, "")
    return EditResult(
        path=path,
        output=path,
        changed=tuple(edit.restored.values()),
        also_changed=(),
        bytes_written=0,
        in_place=True,
        dry_run=dry_run,
        backups=tuple(f"{beside}{backup}" for backup in edit.restored),
        verb=Verb("restored", "restore"),
        patched=False,
        removed=tuple(created),
    )


def _files_of(path: str) -> tuple[str, list[str] | None]:
    """The folder of a checkpoint and the names of its files; None for all files of a folder that does not open.

    Edits of them that were interrupted are finished.
    """
    if not place_of(path).is_local:
        raise RefusedError("has no backup to restore: it does not lie on this machine's disk")
    real = canonical(path)
    folder = real if is_folder(real) else folder_of(real)
    if folder == real:
        finish_edits(folder)
    else:
        recover(path)
    names = [] if folder == real else [os.path.basename(real)]
    try:
        with closing(open_checkpoint(path)) as checkpoint:
            if isinstance(checkpoint.container, RunFiles):
                return folder, None
            files = [canonical(file.path) for file in checkpoint.container.files]
    except (CkptError, OSError) as error:
        if not is_folder(folder) or newest_edit(folder, names or None) is None:
            raise  # it has no backup either, so this is what is wrong with it
        if isinstance(error, OSError) and is_taken(real):
            raise
        return folder, names or None
    if folder == real and len({folder_of(file) for file in files}) == 1:
        folder = folder_of(files[0])
    return folder, [*names, *(os.path.basename(file) for file in files if folder_of(file) == folder)]


def _newest(path: str, folder: str, names: Sequence[str] | None) -> KeptEdit:
    edit = newest_edit(folder, names)
    if edit is None and is_folder(path):  # the files that it took out are no part of the checkpoint any more
        edit = newest_edit(folder, None)
        edit = None if edit is None or any(is_taken(edit.path(name)) for name in edit.restored.values()) else edit
    if edit is None:
        refuse_cached(path)
        raise RefusedError("has no backup to restore", hint="edits keep one where they are given --backup")
    return edit


def _locked(edit: KeptEdit, *, dry_run: bool) -> ExitStack:
    """Lock all files of the edit that are there, until it is closed; a dry run reads them only."""
    paths = [edit.path(file.name) for file in edit.files]

    def opened(opener: Opener) -> ExitStack:
        files = ExitStack()
        for file in opener.open_all([path for path in paths if is_taken(path)]):
            files.callback(file.close)
        return files

    return open_beside_writers(edit.path(edit.files[0].name), opened, write=not dry_run)


def _refuse_changed(edit: KeptEdit) -> None:
    """Raise where undoing would lose more than the edit."""
    newest = next(iter(edit.restored))
    changed = changed_since(edit)
    if changed and edit.record is None:
        raise RefusedError(
            f"{newest!r} has no record of the edit that kept it (an older ckpt wrote none), so that it is not known "
            f"whether {changed[0]!r} changed since",
            hint="--force restores it all the same",
        )
    if changed:
        raise RefusedError(
            f"{changed[0]!r} changed since the edit that kept {newest!r}, and undoing would lose that change",
            hint="--force restores it all the same",
        )
