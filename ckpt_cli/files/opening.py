"""Opening the files of a checkpoint: an edit that was interrupted is finished first, and writers take turns."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

from ckpt_cli.errors import CkptError
from ckpt_cli.files.hidden import is_journal, journal_path, staging_path, target_of_journal, temporary_path
from ckpt_cli.files.local import LocalFile

_MANY = 200
"""Files of a set above which the usual limit of open ones may be met."""


class Opener:
    """Opens one checkpoint's files, to read them or, locked, to patch them."""

    def __init__(self, *, write: bool = False) -> None:
        self.write = write
        """Whether the files are to be patched: each is then locked until it is closed."""

    def open(self, path: str, *, part: bool = False) -> LocalFile:
        """A file, free of journals; a `part` of a set that may not be written is opened to be read.

        Raises OSError where it cannot be opened, BusyError while another process writes it.
        """
        if not self.write:
            return _open_to_read(path)
        try:
            return _open_to_write(path)
        except OSError as error:
            if not part or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return _open_to_read(path)

    def open_all(self, paths: Sequence[str]) -> list[LocalFile]:
        """The other files of a set, all or none."""
        for path in paths:  # before any is locked: what is left of an edit of several needs the locks of several
            _recover(path)
        if len(paths) > _MANY:
            _allow_open_files()
        opened: list[LocalFile] = []
        try:
            for path in paths:
                opened.append(self.open(path, part=True))  # noqa: PERF401 - those before one that fails are closed
        except BaseException:
            for file in opened:
                file.close()
            raise
        return opened


def finish_edits(folder: str) -> None:
    """Finish every edit of files of a folder that was interrupted, before its names are listed: some may go.

    Waits while another process puts a new checkpoint into it.
    """
    if not _journals(folder):
        return
    from ckpt_cli.files.locks import wait_for

    with suppress(FileNotFoundError):
        fd = os.open(staging_path(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
    """The name of the file whose journal has a digest for a name; None for what is no such journal, or is torn."""
    from ckpt_cli.files.journal import target_of

    log = os.path.join(os.path.realpath(folder), name)
    with suppress(CkptError, OSError):
        target = target_of(log)
        if target and os.path.basename(target) == target and journal_path(os.path.join(folder, target)) == log:
            return target
    return None


def _allow_open_files() -> None:
    """Let the process have as many files open as the system allows it."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _recover(path: str) -> None:
    if os.path.lexists(journal_path(path)):
        from ckpt_cli.files.journal import recover

        recover(path)


def _open_to_read(path: str) -> LocalFile:
    """The file, free of journals, those of edits under its other names included."""
    while True:
        _recover(path)
        file = LocalFile(path)
        try:
            other = _edited_elsewhere(file)
        except BaseException:
            file.close()
            raise
        if other is None:
            return file
        file.close()
        _recover(other)


def _edited_elsewhere(file: LocalFile) -> str | None:
    """The other name of a file, a hard link, under which an interrupted edit is to be finished."""
    if file.links == 1:
        return None
    from ckpt_cli.files.links import edited_elsewhere

    return edited_elsewhere(file)


def _open_to_write(path: str) -> LocalFile:
    """The file, locked, free of journals and still the one that the path names."""
    from ckpt_cli.files.locks import lock

    while True:
        _recover(path)
        file = LocalFile(path, write=True)
        try:
            lock(file)
            current = os.path.samestat(os.fstat(file.fd), os.stat(path))
            other = _edited_elsewhere(file)
        except BaseException:
            file.close()
            raise
        if current and other is None and not os.path.lexists(journal_path(path)):
            _remove_left_overs(path)
            return file
        file.close()  # replaced, or left half edited, while we waited for the lock
        if other is not None:
            _recover(other)


def _remove_left_overs(path: str) -> None:
    """Remove what a killed process had begun to write in the place of a file, or of its backup."""
    for left in (temporary_path(path), temporary_path(f"{os.path.realpath(path)}.bak")):
        if os.path.lexists(left):
            from ckpt_cli.files.replace import remove_unlocked

            remove_unlocked(left)
