"""Backups put back in the place of the files that they were kept of, all files of an edit as one."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from contextlib import ExitStack, suppress

from ckpt_cli.errors import BusyError, RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import is_at, take_after, warn_of_lost
from ckpt_cli.files.backup import parse_backup, same_content
from ckpt_cli.files.hidden_files import open_to_lock
from ckpt_cli.files.journal.replace import replacing_set
from ckpt_cli.files.lock import wait_for
from ckpt_cli.files.outcome import Outcome, interrupts_deferred, outcome_of, stating
from ckpt_cli.files.system import sync, sync_folder
from ckpt_cli.files.undo_record import RecordedFile, fingerprint_of, records_in


@dataclass(frozen=True, slots=True)
class KeptEdit:
    """An edit whose backups are there."""

    folder: str
    number: int
    """That of its backups."""
    files: tuple[RecordedFile, ...]
    record: str | None
    """The path of its record; None where it left none, as ckpt did before it could undo, and nothing is known of the
    files as they were after the edit."""

    def path(self, name: str) -> str:
        """The path of a file of the edit, or of a backup."""
        return os.path.join(self.folder, name)

    @property
    def restored(self) -> dict[str, str]:
        """The backups that there are, and the files that they are of: {backup: name}."""
        return {file.backup: file.name for file in self.files if file.backup is not None}

    @property
    def created(self) -> list[str]:
        """Files that the edit created and that are still there."""
        names = [file.name for file in self.files if file.backup is None]
        return [name for name in names if os.path.lexists(self.path(name))]


def newest_edit(folder: str, names: Collection[str] | None = None) -> KeptEdit | None:
    """The edit with the highest-numbered backup of some files of a folder, or of any; None where none has one."""
    listing = os.listdir(folder)
    backups = {name: parsed for name in listing if (parsed := parse_backup(name)) and _is_file(folder, name)}
    edits = []
    recorded = set[str]()
    for path, files in records_in(folder, listing):
        numbers = [backups[file.backup][1] for file in files if file.backup in backups]
        if numbers and (names is None or any(file.name in names for file in files)):
            edits.append((max(numbers), os.stat(path).st_mtime_ns, KeptEdit(folder, max(numbers), tuple(files), path)))
            recorded.update(file.backup for file in files if file.backup is not None)
    by_number: dict[int, list[RecordedFile]] = {}
    for backup, (name, number) in sorted(backups.items()):
        if backup not in recorded and (names is None or name in names):
            by_number.setdefault(number, []).append(RecordedFile(name, backup, None))
    edits += [(number, 0, KeptEdit(folder, number, tuple(files), None)) for number, files in by_number.items()]
    return max(edits, key=lambda edit: edit[:2])[2] if edits else None


def changed_since(edit: KeptEdit) -> list[str]:
    """The files that are neither as the edit left them nor as they were before it."""
    return [file.name for file in edit.files if not _is_as_left(edit, file) and not _is_as_before(edit, file)]


def missing_backups(edit: KeptEdit) -> list[str]:
    """The backups of the edit that are not there any more."""
    return [backup for backup in edit.restored if not _is_file(edit.folder, backup)]


def restore(edit: KeptEdit) -> None:
    """Put all backups of an edit in place, all or nothing, and remove its record.

    The caller has the files locked. They keep the owner, group and permissions that they have now. An error has the
    outcome.
    """
    for backup, name in edit.restored.items():
        if parse_backup(backup) != (name, edit.number):
            raise RefusedError(f"a record says that {backup!r} is the backup of {name!r}", path=edit.record)
    with stating(edit.path(next(iter(edit.restored.values())))) as stage, ExitStack() as locked:
        lost = {name: _prepare(edit, backup, name, locked) for backup, name in edit.restored.items()}
        with interrupts_deferred():
            try:
                _put_back(edit)
            except BaseException as error:
                stage.outcome = outcome_of(error) or Outcome.UNCHANGED
                raise
            stage.outcome = Outcome.DONE
            _clear(edit)
        for name, words in lost.items():
            warn_of_lost(edit.path(name), words)


def _prepare(edit: KeptEdit, backup: str, name: str, locked: ExitStack) -> str | None:
    """Lock a backup, give it the owner and permissions of the file that it replaces, and make it durable.

    The lock lasts until all is done, so that the next edit of the file does not begin before.
    """
    path = edit.path(backup)
    fd = open_to_lock(path)
    locked.callback(os.close, fd)
    wait_for(fd, path)
    if not is_at(path, fd):
        raise BusyError("another process has replaced it; try again", path=path)
    lost = None
    with suppress(FileNotFoundError):
        lost = take_after(fd, os.stat(edit.path(name)))
    sync(fd)
    return lost


def _put_back(edit: KeptEdit) -> None:
    """Let the backups take their places, durably."""
    names, created = list(edit.restored.values()), edit.created
    if len(names) > 1 or created:
        first = next((name for name in names if os.path.lexists(edit.path(name))), names[0])
        with replacing_set(edit.folder, first) as work:
            work.moved.update(edit.restored)
            work.removed.extend(created)
        return
    [(backup, name)] = edit.restored.items()
    with stating(edit.path(name)) as stage:
        os.replace(edit.path(backup), edit.path(name))
        stage.outcome = Outcome.DONE
        sync_folder(edit.folder)


def _clear(edit: KeptEdit) -> None:
    """Remove what is left of an edit that was undone."""
    for backup in edit.restored:
        with suppress(FileNotFoundError):  # where it was the file itself, its rename did nothing
            os.unlink(edit.path(backup))
    if edit.record is not None:
        with suppress(FileNotFoundError):
            os.unlink(edit.record)
    sync_folder(edit.folder)


def _is_file(folder: str, name: str) -> bool:
    """True for a regular file; a symbolic link is not one."""
    try:
        return stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode)
    except FileNotFoundError:
        return False


def _is_as_left(edit: KeptEdit, file: RecordedFile) -> bool:
    if edit.record is None:
        return False
    if file.after is None:
        return not os.path.lexists(edit.path(file.name))
    return _is_file(edit.folder, file.name) and file.after.matches(fingerprint_of(edit.path(file.name)))


def _is_as_before(edit: KeptEdit, file: RecordedFile) -> bool:
    """True where the edit never took effect, or was undone except for the removal of its backups."""
    path = edit.path(file.name)
    if file.backup is None or not _is_file(edit.folder, file.name):
        return file.backup is None and not os.path.lexists(path)
    backup = edit.path(file.backup)
    if not _is_file(edit.folder, file.backup):
        return False
    return os.path.samestat(os.lstat(path), os.lstat(backup)) or same_content(path, backup)
