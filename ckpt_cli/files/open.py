"""Opening the files of a checkpoint: an edit that was interrupted is finished first, and writers take turns."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from ckpt_cli.errors import BusyError, ChangedError, CkptError, UnsupportedError
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.hidden_files import (
    is_journal,
    is_temporary,
    journal_path,
    staging_path,
    target_of_journal,
    temporary_path,
)
from ckpt_cli.files.lock import PATIENCE, is_own, lock, pauses
from ckpt_cli.files.places import begin_all, folder_of, identity_at, is_listed, is_plain_name, place_of
from ckpt_cli.files.source import Identity, LocalFile, SourceFile
from ckpt_cli.files.system import allow_open_files, open_folder
from ckpt_cli.files.unchanged import has_journal, release, share


class _Closeable(Protocol):
    def close(self) -> None:
        """Close its files."""


T = TypeVar("T", bound=_Closeable)


class UnfinishedEditError(Exception):
    """A journal lies beside one file of several; what is locked must be free before the edit can be finished."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Opener:
    """Opens one checkpoint's files: to read them, locked until `release`, or to patch them, locked until closed."""

    def __init__(self, *, write: bool = False) -> None:
        self.write = write
        """True if the files are to be patched: each is then locked until it is closed."""
        self._files: list[tuple[LocalFile, bool]] = []
        """Those that were opened, and whether each is locked."""
        self._folder: tuple[str, Identity | None] | None = None

    def open(self, path: str, *, part: bool = False) -> SourceFile:
        """A file, free of journals; a `part` of a set that may not be written is opened to be read.

        Raises OSError where it cannot be opened, BusyError while another process writes it, UnsupportedError where it
        is to be written and does not lie on this machine's disk.
        """
        place = place_of(path)
        if not place.is_local:
            if self.write:
                raise UnsupportedError(
                    "it does not lie on this machine's disk, so it cannot be edited in place",
                    path=path,
                    hint="-o OUT writes an edited copy",
                )
            return place.open(path)
        if not self.write:
            return self._open_to_read(path)
        try:
            return self._open_to_write(path)
        except OSError as error:
            if not part or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._finish(path)
            return LocalFile(path)

    def open_all(self, paths: Sequence[str]) -> list[SourceFile]:
        """The other files of a set, all or none."""
        for path in paths:  # before any is locked: what is left of an edit of several needs the locks of several
            self._finish(path)
        allow_open_files(len(paths))
        begin_all([path for path in paths if not is_listed(folder_of(path))])
        opened: list[SourceFile] = []
        with closed_on_error(opened):
            for path in paths:
                opened.append(self.open(path, part=True))  # noqa: PERF401 - those before one that fails are closed
        return opened

    def remove_left_overs(self, folder: str) -> None:
        """Remove what a killed process had begun to write for files that are not there yet, before an edit in place."""
        if self.write and place_of(folder).is_local:
            _remove_temporaries(folder or os.curdir)

    def release(self) -> None:
        """Let other processes write the files again that were opened to be read."""
        for file, locked in () if self.write else self._files:
            if file.fd >= 0:
                release(file, locked=locked)

    def note_folder(self, path: str) -> None:
        """Note the state of a folder before its files are listed."""
        if place_of(path).is_local:
            self._folder = path, identity_at(path)

    def is_consistent(self) -> bool:
        """True if the files that are open show one state of the checkpoint: none changed or was replaced meanwhile."""
        files = [(file, locked) for file, locked in self._files if file.fd >= 0]
        if len(files) > 1 and any(identity_at(file.path) != file.seen for file, _ in files):
            return False
        return self.write or not any(
            not locked and (file.has_changed() or has_journal(file.path)) and not is_own(file.fd)
            for file, locked in files
        )

    def has_changed(self) -> bool:
        """True if a file, or the folder, is not in the state any more in which it was opened."""
        if self._folder is not None and identity_at(self._folder[0]) != self._folder[1]:
            return True
        return any(identity_at(file.path) != file.seen for file, _ in self._files)

    def _open_to_read(self, path: str) -> LocalFile:
        while True:
            try:
                file = LocalFile(path)
            except FileNotFoundError:  # perhaps an interrupted edit puts it there
                if not self._finish(path):
                    raise
                continue
            try:
                locked = share(file)
                current = os.path.samestat(file.look_again(), os.stat(path))
                other = _edited_elsewhere(file)
            except FileNotFoundError:
                file.close()
                continue
            except BaseException:
                file.close()
                raise
            if current and other is None and not (has_journal(path) and not is_own(file.fd)):
                self._files.append((file, locked))
                return file
            file.close()  # replaced, or left half edited, while we waited for the lock
            self._finish(other or path)

    def _open_to_write(self, path: str) -> LocalFile:
        """The file, locked, free of journals and still the one that the path names."""
        while True:
            self._finish(path)
            file = LocalFile(path, write=True)
            try:
                lock(file)
                current = os.path.samestat(file.look_again(), os.stat(path))
                other = _edited_elsewhere(file)
            except BaseException:
                file.close()
                raise
            if current and other is None and not has_journal(path):
                self._files.append((file, True))
                _remove_left_overs(path)
                return file
            file.close()  # replaced, or left half edited, while we waited for the lock
            if other is not None:
                self._finish(other)

    def _finish(self, path: str) -> bool:
        """Finish an interrupted edit of a file; True if there was one.

        Raises UnfinishedEditError where other files are locked.
        """
        if not place_of(path).is_local or not has_journal(path):
            return False
        if any(file.fd >= 0 for file, _ in self._files):
            raise UnfinishedEditError(path)
        _recover(path)
        return True


@contextmanager
def closed_on_error(files: Sequence[SourceFile]) -> Iterator[None]:
    """Context manager: the files are closed where the block raises."""
    try:
        yield
    except BaseException:
        for file in files:
            file.close()
        raise


def open_beside_writers(path: str, read: Callable[[Opener], T], *, write: bool = False) -> T:
    """Return the result of `read` on a checkpoint's files, read again where they changed in the meantime.

    Raises ChangedError where they do not stop changing.
    """
    tries: Iterator[None] | None = None
    while True:
        opener = Opener(write=write)
        try:
            found = read(opener)
            if opener.is_consistent():
                opener.release()
                return found
            found.close()
        except UnfinishedEditError as error:
            _recover(error.path)
        except (BusyError, ChangedError):
            raise
        except (CkptError, OSError):
            if not opener.has_changed():
                raise
        tries = tries or pauses(PATIENCE)
        if next(tries, False) is False:
            raise ChangedError(path)


def finish_edits(folder: str) -> None:
    """Finish every edit of files of a folder that was interrupted, before its names are listed: some may go.

    Waits while another process puts a new checkpoint into it.
    """
    if not place_of(folder).is_local or not _journals(folder):
        return
    from ckpt_cli.files.lock import wait_for

    with suppress(FileNotFoundError):
        fd = open_folder(staging_path(folder))
        try:
            wait_for(fd, folder)
        finally:
            os.close(fd)
    for target in _journals(folder):
        _recover(os.path.join(folder, target))


def _journals(folder: str) -> list[str]:
    """The names of the files in a folder that have a journal beside them."""
    targets = []
    for name in filter(is_journal, sorted(os.listdir(folder))):
        target = target_of_journal(name) or _target_by_content(folder, name)
        if target:
            targets.append(target)
    return targets


def _target_by_content(folder: str, name: str) -> str | None:
    """Return the name of the file whose journal has a digest for a name; None if it is not such a journal, or torn."""
    from ckpt_cli.files.journal.apply import target_of

    log = os.path.join(os.path.realpath(folder), name)
    with suppress(CkptError, OSError):
        target = target_of(log)
        if target and is_plain_name(target) and journal_path(os.path.join(folder, target)) == log:
            return target
    return None


def _recover(path: str) -> None:
    if os.path.lexists(journal_path(path)):
        from ckpt_cli.files.journal.apply import recover

        recover(path)


def _edited_elsewhere(file: LocalFile) -> str | None:
    """The other name of a file, a hard link, under which an interrupted edit is to be finished."""
    if file.links == 1:
        return None
    from ckpt_cli.files.journal.pointer import edited_elsewhere

    return edited_elsewhere(file)


def _remove_left_overs(path: str) -> None:
    """Remove what a killed process had begun to write in the place of a file, of its backup, or into its folder."""
    real = spelled(path)
    staging = staging_path(os.path.dirname(real))
    for left in (temporary_path(path), temporary_path(f"{real}.bak"), staging):
        if os.path.lexists(left):
            from ckpt_cli.files.atomic import remove_unlocked

            remove_unlocked(left)
            if left == staging and not os.path.lexists(staging):
                _remove_temporaries(os.path.dirname(real))


def _remove_temporaries(folder: str) -> None:
    """Remove files that a killed process had written, or moved from a staging folder, to their temporary names."""
    from ckpt_cli.files.atomic import remove_unlocked

    names = os.listdir(folder)
    if not any(map(is_journal, names)):  # else they may be what an interrupted edit is finished from
        for name in filter(is_temporary, names):
            remove_unlocked(os.path.join(folder, name))
