"""Reading beside writers: no document is read while a file is patched, and no answer mixes two states of a file.

While a document is read, its files are locked shared, so that a writer waits. Values are read without a lock; whoever
reads them asks at the end whether a file changed. Where a writer holds the lock for long and patches nothing (it
writes a new file that takes the old one's place), and where the file system has no locks, the document is read without
a lock and its files are compared afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ckpt_cli.errors import BusyError, ChangedError, CkptError
from ckpt_cli.files import system
from ckpt_cli.files.hidden_files import journal_path
from ckpt_cli.files.lock import PATIENCE, is_own, pauses, try_share
from ckpt_cli.files.places import open_file
from ckpt_cli.files.source import LocalFile, SourceFile

_STILL, _STILL_HELD = 0.2, 5.0
"""Seconds for which a file that a writer has locked must stay as it is before it is read all the same; the second
where its lock would be held to the end."""

_TICK = 20_000_000
"""Nanoseconds that two changes may be apart and have one time of change, at most."""


_held = False


@contextmanager
def holding() -> Iterator[None]:
    """Keep the shared lock of each file that is opened to be read within the block until the file is closed."""
    global _held
    before, _held = _held, True
    try:
        yield
    finally:
        _held = before


def share(file: LocalFile) -> bool:
    """Lock a file that is to be read; False where it is read without a lock, True where it is locked.

    Waits while a writer patches it; raises BusyError after `PATIENCE` seconds.
    """
    free = try_share(file.fd)
    if free is not False or is_own(file.fd):
        return free is True
    state, since = os.fstat(file.fd), time.monotonic()
    for _ in pauses(PATIENCE):
        if (free := try_share(file.fd)) is not False:
            return free is True
        now = os.fstat(file.fd)
        if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns) or has_journal(file.path):
            state, since = now, time.monotonic()
        elif time.monotonic() - since > (_STILL_HELD if _held else _STILL):
            return False
    raise BusyError("another process is writing it; try again when it is done", path=file.path)


def open_to_scan(path: str) -> SourceFile:
    """A file of which every byte may be read, without waiting for a writer but within `holding`."""
    file = open_file(path)
    file.was_read = True
    if _held and isinstance(file, LocalFile):
        share(file)
        file.look_again()
    return file


def has_journal(path: str) -> bool:
    """True if an edit of a file was interrupted, or is under way."""
    return os.path.lexists(journal_path(path))


def release(file: LocalFile, *, locked: bool) -> None:
    """Let writers change a file whose document was read, and note from then on whether values are read from it.

    A file that changed just now stays locked for a moment: a change within the same tick of the file system's clock
    could not be seen later.
    """
    file.on_read = file.note_read
    if not locked or _held:
        return
    end = time.monotonic() + _TICK / 1e9
    while _is_fresh(file) and time.monotonic() < end:
        time.sleep(0.0005)
    system.unlock(file.fd)


def _is_fresh(file: LocalFile) -> bool:
    """True if a change that is made now could have the same time as the last one."""
    now, is_exact = system.change_time_ns()
    return 0 <= (file.seen[3] - now if is_exact else now - file.seen[3]) <= _TICK


def require_unchanged(files: Iterable[SourceFile]) -> None:
    """Raise ChangedError where the content of an open file is not the one that was opened."""
    for file in files:
        if file.has_changed():
            raise ChangedError(file.path)


def settle(files: Sequence[SourceFile]) -> None:
    """Raise ChangedError where a file that values were read from changed; what it does later says nothing of these."""
    require_unchanged(file for file in files if file.was_read)
    for file in files:
        if file.was_read:
            file.was_read, file.on_read = False, file.note_read


@contextmanager
def unchanged(files: Sequence[SourceFile]) -> Iterator[None]:
    """Raise ChangedError, also in place of another error, where values were read from a file that changed meanwhile.

    Files that are open to be written are left out: they are locked, and change by the edit itself.
    """
    files = [file for file in files if not file.writable]
    try:
        yield
    except (CkptError, OSError) as error:
        if any(file.was_read and file.has_changed() for file in files):
            raise ChangedError(next(file.path for file in files if file.has_changed())) from error
        raise
    require_unchanged(file for file in files if file.was_read)
