"""Backups: old files kept as NAME.bak, NAME.bak.2, NAME.bak.3 and so on; a backup never takes the place of another.

All backups of one edit have the same number, one above the highest that any file of the checkpoint has, so that the
highest number is the newest edit. A file that is about to be replaced gets a second name, one that is about to be
patched is copied. Each name is claimed exclusively. Where an edit was stopped after it had kept the very same backup,
the next one uses that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from ckpt_cli.errors import CkptError
from ckpt_cli.files.atomic import take_after, temporary_of
from ckpt_cli.files.copy import copy_into
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.hidden_files import one_folder, require_fitting
from ckpt_cli.files.outcome import Outcome, outcome_of, stating
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import create_private, link, sync, sync_folder
from ckpt_cli.files.undo_record import (
    Fingerprint,
    RecordedFile,
    fingerprint,
    fingerprint_of,
    record_of,
    write_record,
)

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

_DIGITS = 18
"""Digits that the number of a backup may have."""

_COMPARED = 8 << 20
"""Bytes of two files compared at a time."""


def backup_name(name: str, number: int) -> str:
    """The name of a file's backup; the first one has no number."""
    return f"{name}.bak" if number == 1 else f"{name}.bak.{number}"


def parse_backup(backup: str) -> tuple[str, int] | None:
    """The file whose backup is called so, and the backup's number; None for a name that is not a backup's."""
    name, _, tail = backup.rpartition(".")
    if tail == "bak":
        return (name, 1) if name else None
    is_number = tail.isascii() and tail.isdecimal() and len(tail) <= _DIGITS and tail[0] != "0" and tail != "1"
    return (name.removesuffix(".bak"), int(tail)) if is_number and name.endswith(".bak") and len(name) > 4 else None


class Backups:
    """The backups of one edit, all in one folder."""

    def __init__(self) -> None:
        self.paths: tuple[str, ...] = ()
        """The paths at which the old files are kept, in the order of the files."""
        self._folder = ""
        self._made: list[tuple[str, str]] = []
        """Each file with its backup, of those that this edit made."""
        self._files: list[RecordedFile] = []

    def keep_replaced(self, new: Mapping[str, str | None], others: Iterable[str] = ()) -> None:
        """Keep files that are about to be replaced.

        `new` is the path of the complete new content by the path of each file, None for a file that is removed; files
        that are not there yet are noted only. `others` are all files of the checkpoint.
        """
        kept = self._keep([path for path in new if os.path.lexists(path)], others, _link, _is_link_or_same)
        self._record(kept, {path: fingerprint_of(content) if content else None for path, content in new.items()})

    def keep_patched(self, overlay: Overlay) -> None:
        """Keep the files that an overlay is about to patch; `note_patched` is to be called after that."""
        files = {file.path: file for file in overlay.touched}
        others = [file.path for file in overlay.files]

        def make(path: str, backup: str) -> None:
            _copy(files[path], backup)

        def is_kept(path: str, backup: str) -> bool:
            return _is_copy(files[path], backup)

        _part_links(files.values(), others)
        kept = self._keep(list(files), others, make, is_kept)
        self._record(kept, {path: _as_patched(overlay, file) for path, file in files.items()})

    def note_patched(self) -> None:
        """Note when the patched files were written, by which a later change of a large file is seen.

        The edit is done by now, so it does not fail where this does: the backup is then restored by force only.
        """
        if any(file.after is not None and not file.after.is_whole for file in self._files):
            with stating(os.path.join(self._folder, self._files[0].name)) as stage, suppress(OSError, CkptError):
                stage.outcome = Outcome.DONE
                self._write_times()

    def _write_times(self) -> None:
        """Write the record of the edit again, with the times at which the files were last written (in ns)."""
        noted = []
        for file in self._files:
            mtime_ns = os.stat(os.path.join(self._folder, file.name)).st_mtime_ns
            after = file.after and Fingerprint(file.after.size, file.after.digest, mtime_ns)
            noted.append(RecordedFile(file.name, file.backup, after))
        write_record(self._folder, noted)

    def withdraw(self) -> None:
        """Remove backups that are second names of files which an edit failed to replace."""
        with suppress(OSError):
            left = [backup for path, backup in self._made if not _unlinked(path, backup)]
            if self._made and self._files and not left:
                os.unlink(record_of(self._folder, self._files))
            self._made = []

    def _keep(
        self,
        paths: Sequence[str],
        others: Iterable[str],
        make: Callable[[str, str], object],
        is_kept: Callable[[str, str], bool],
    ) -> dict[str, str]:
        """Make the backup of each file; returns them by the file."""
        real = {path: spelled(path) for path in paths}
        self._folder = one_folder(real.values(), paths[0])
        names = {os.path.basename(path) for path in real.values()}
        number, there = highest(self._folder, names | {os.path.basename(spelled(path)) for path in others})
        stopped = {path for path in paths if os.path.basename(real[path]) in there}
        if not stopped or not there <= names or not all(is_kept(p, backup_name(real[p], number)) for p in stopped):
            number, stopped = number + 1, set()
        while not self._claim(real, number, stopped, make):  # another process has taken a name
            number, stopped = number + 1, set()
        sync_folder(self._folder)
        self.paths = tuple(backup_name(real[path] if os.path.islink(path) else path, number) for path in paths)
        return {path: backup_name(real[path], number) for path in paths}

    def _claim(
        self, real: Mapping[str, str], number: int, stopped: set[str], make: Callable[[str, str], object]
    ) -> bool:
        """Make all backups of a number but those that a stopped edit had made; False where a name is taken."""
        made: list[str] = []
        try:
            for file in real.values():
                require_fitting(
                    backup_name(file, number), "leave --backup out, or write the result to a new file with -o OUT"
                )
            for path, file in real.items():
                backup = backup_name(file, number)
                if path not in stopped:
                    make(path, backup)
                    made.append(backup)
                    self._made.append((file, backup))
        except BaseException as error:
            for backup in made:
                with suppress(OSError):
                    os.unlink(backup)
            self._made = []
            if isinstance(error, FileExistsError):
                return False
            raise
        return True

    def _record(self, kept: Mapping[str, str], after: Mapping[str, Fingerprint | None]) -> None:
        """Write the record of the edit, with the backup and the new state of each file; raises OSError."""
        self._files = [
            RecordedFile(os.path.basename(spelled(path)), os.path.basename(backup), after[path])
            for path, backup in kept.items()
        ]
        self._files += [RecordedFile(os.path.basename(path), None, after[path]) for path in after if path not in kept]
        write_record(self._folder, self._files)


@contextmanager
def keeping() -> Iterator[Backups]:
    """The backups of an edit that the block carries out; second names of files that stayed go where it fails.

    Where the next command completes the edit, they are needed still.
    """
    backups = Backups()
    try:
        yield backups
    except BaseException as error:
        if outcome_of(error) is not Outcome.UNFINISHED:
            backups.withdraw()
        raise


def highest(folder: str, names: Iterable[str]) -> tuple[int, set[str]]:
    """The highest number of the backups of some files of a folder, and the files that have one of that number."""
    wanted, number, found = set(names), 0, set[str]()
    for parsed in map(parse_backup, os.listdir(folder)):
        if parsed is None or parsed[0] not in wanted or parsed[1] < number:
            continue
        if parsed[1] > number:
            number, found = parsed[1], set()
        found.add(parsed[0])
    return number, found


def same_content(one: str, other: str) -> bool:
    """True if two regular files have the same bytes."""
    with LocalFile(one, follow=False) as ours, LocalFile(other, follow=False) as theirs:
        return _same_bytes(ours, theirs)


def _as_patched(overlay: Overlay, file: SourceFile) -> Fingerprint:
    """Fingerprint a file as it will be once the overlay's patches are written."""
    return fingerprint(overlay.size(file), lambda offset, nbytes: overlay.read(file, offset, nbytes))


# --- ways to keep a file ---------------------------------------------------------------------------------------------


def _part_links(files: Iterable[SourceFile], others: Iterable[str]) -> None:
    """Remove newest backups that are only second names of files which are about to be patched.

    An edit that was stopped before it replaced the file leaves one, and it would change together with the file.
    """
    real = {spelled(file.path): file for file in files}
    folder = os.path.dirname(next(iter(real)))
    number, there = highest(folder, {os.path.basename(spelled(path)) for path in (*real, *others)})
    for path, file in real.items():
        backup = backup_name(path, number)
        if os.path.basename(path) in there and os.path.samestat(os.lstat(backup), os.fstat(file.fd)):
            os.unlink(backup)


def _link(path: str, backup: str) -> None:
    """Give a file a second name; raises FileExistsError where that is taken."""
    try:
        link(spelled(path), backup)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with LocalFile(spelled(path)) as file:  # a file system without hard links
            _copy(file, backup)


def _copy(file: SourceFile, backup: str) -> None:
    """Copy a file with its owner, permissions and time; raises FileExistsError where the name is taken."""
    first = backup_name(spelled(file.path), 1)  # one temporary name for all numbers: the next edit clears it
    with temporary_of(first) as target:
        old = os.fstat(file.fd)
        take_after(target.fd, old)
        copy_into(file, target)
        os.utime(target.fd, ns=(old.st_atime_ns, old.st_mtime_ns))
        sync(target.fd)
        _claim_name(target.path, backup)


def _claim_name(temporary: str, backup: str) -> None:
    """Move a complete file to a name that must be free."""
    try:
        link(temporary, backup)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(create_private(backup))
        os.replace(temporary, backup)


def _is_link_or_same(path: str, backup: str) -> bool:
    """True if a backup that an edit made which was stopped is this file, or a copy of it."""
    if os.path.samestat(os.lstat(backup), os.stat(path)):
        return True
    with LocalFile(spelled(path)) as file:
        return _is_copy(file, backup)


def _is_copy(file: SourceFile, backup: str) -> bool:
    """True if a backup that an edit made which was stopped is a copy of a file: as large, as old, and the same."""
    now, old = os.fstat(file.fd), os.lstat(backup)
    same = (now.st_size, now.st_mtime_ns) == (old.st_size, old.st_mtime_ns) and not os.path.samestat(now, old)
    if not same or not stat.S_ISREG(old.st_mode):
        return False
    with LocalFile(backup, follow=False) as copy:
        return _same_bytes(file, copy)


def _same_bytes(one: SourceFile, other: SourceFile) -> bool:
    """True if two open files have the same bytes, which are read some megabytes at a time."""
    return one.size == other.size and all(
        one.read(at, min(_COMPARED, one.size - at)) == other.read(at, min(_COMPARED, one.size - at))
        for at in range(0, one.size, _COMPARED)
    )


def _unlinked(path: str, backup: str) -> bool:
    """Remove a backup that is the file itself under another name; False where it is not."""
    if not os.path.samestat(os.lstat(backup), os.lstat(path)):
        return False
    os.unlink(backup)
    return True
