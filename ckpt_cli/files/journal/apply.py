"""Patches in place, all or nothing, by a redo and undo log beside the file (`files/journal/log.py`).

The journal is complete on disk before the first patch, and is removed after the last one is on disk. So a journal
without its trailer means that nothing was patched, and one with it can be rolled forward at any time, as long as the
files are those that it was written for (`State`). One of which nothing was patched yet is dropped. Where a file
becomes longer or shorter, the bytes beyond its end count as zeros, old or new.

An edit of several files has one journal, beside the first of them; the others lie in the same folder, or in folders in
it. Beside each other one a pointer is made durable
before the journal and removed after it, and a file with several names gets a note (`files/journal/pointer.py`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from enum import Enum, auto

from ckpt_cli.errors import CkptError, FormatError, RefusedError
from ckpt_cli.files.disk import spelled
from ckpt_cli.files.hidden_files import journal_path, open_journal, require_trusted, several_folders
from ckpt_cli.files.journal.log import (
    MAGIC,
    File,
    Header,
    LoggedPatch,
    Sample,
    header_of,
    identity_of,
    is_complete,
    patches_of,
    reach,
    write_journal,
)
from ckpt_cli.files.journal.pointer import (
    forget_edit,
    names_in,
    neighbour,
    note_edit,
    pointed_to,
    remove_journal,
    top_folder,
    write_pointer,
)
from ckpt_cli.files.lock import lock
from ckpt_cli.files.outcome import Outcome, interrupts_deferred, state, stating
from ckpt_cli.files.patches import Overlay, read_padded
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.files.system import read_at, sync, sync_folder, write_all

_REPLACES = b"ckpt-replace-"
"""The first bytes of another kind of journal: one of files that are replaced (`files/journal/replace.py`)."""


def apply(overlay: Overlay) -> int:
    """Write an overlay's patches into its files, which the caller has locked; returns bytes written, journal included.

    The journal stands beside the first file that is patched, and a pointer to it beside each further one. On any
    error or interrupt the old bytes are put back; the error has the outcome (`files/outcome.py`).
    """
    files = overlay.touched
    if not files:
        return 0
    files = _with_first(overlay, files)
    first, *others = (spelled(file.path) for file in files)
    log, pointers = journal_path(first), [journal_path(other) for other in others]
    with stating(files[0].path) as stage:
        try:
            journalled = _prepare(files, overlay)
        except BaseException:
            with interrupts_deferred(), suppress(OSError):  # a journal that stays is dropped: nothing was patched
                _clear(files, log, *pointers)
            raise
        stage.outcome = Outcome.UNFINISHED
        try:
            for file in files:
                _patch(overlay, file)
        except BaseException:
            with interrupts_deferred(), suppress(OSError, CkptError):  # what fails here is left to the next recovery
                _put_back(log, files)
                stage.outcome = Outcome.UNCHANGED
                _clear(files, log, *pointers)
            raise
        stage.outcome = Outcome.DONE
        with interrupts_deferred():
            _clear(files, log, *pointers)
    return journalled + overlay.nbytes


def _with_first(overlay: Overlay, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Return the files of a journal, first the one that it stands beside: others lie in its folder, or in one there.

    It is one that is patched where one of these lies there.
    """
    top = top_folder((os.path.realpath(file.path) for file in files), files[0].path)
    there = [file for file in (*files, *overlay.files) if os.path.dirname(os.path.realpath(file.path)) == top]
    if not there:
        raise several_folders(files[0].path)
    return [there[0], *(file for file in files if file is not there[0])]


def _prepare(files: Sequence[SourceFile], overlay: Overlay) -> int:
    """Make the journal durable, and all that leads to it; returns its size in bytes."""
    first, *others = (spelled(file.path) for file in files)
    for other in others:
        write_pointer(other, first)
    for folder in dict.fromkeys(map(os.path.dirname, others)):
        sync_folder(folder)
    journalled = write_journal(journal_path(first), overlay, files)
    sync_folder(os.path.dirname(first))
    for file in overlay.touched:
        note_edit(file)
    return journalled


def _patch(overlay: Overlay, file: SourceFile) -> None:
    """Write the patches of one file durably."""
    write_patches(overlay, file, file)
    if overlay.size(file) != file.size:
        os.ftruncate(file.fd, overlay.size(file))
    sync(file.fd)


def _clear(files: Iterable[SourceFile], log: str, *pointers: str) -> None:
    """Remove the journal, after the notes that lead to it and before the pointers."""
    for file in files:
        forget_edit(file)
    remove_journal(log, *pointers)


def target_of(log: str) -> str | None:
    """The name of the file that a journal or a pointer lies beside, from its content; None where it does not say."""
    names = names_in(log)
    if names:
        return names[-1]
    with open_journal(log) as journal:
        if journal.read(0, min(len(MAGIC), journal.size)).startswith(_REPLACES):
            from ckpt_cli.files.journal import replace as replace_set

            return replace_set.first_of(journal)
        header = header_of(journal)
    return header["files"][0]["name"] if header else None


def recover(path: str) -> bool:
    """Finish what an interrupted edit of `path` began; True when the file was brought to its new state.

    An edit that had not begun to patch is dropped. Waits while the edit is still running. Raises RefusedError when
    the journal belongs to other bytes.
    """
    log, real, pointer = journal_path(path), spelled(path), None
    if not os.path.lexists(log):
        return False
    owner = pointed_to(log)
    if owner is not None and (os.path.lexists(owner) or os.path.lexists(journal_path(owner))):
        pointer, log, real = log, journal_path(owner), owner
    try:
        return _recover_from(log, real, path, pointer)
    except (OSError, KeyboardInterrupt) as error:
        state(error, Outcome.UNFINISHED, path)
        raise


def _recover_from(log: str, real: str, path: str, pointer: str | None) -> bool:
    """Finish what the journal `log` beside the file `real` holds; a `pointer` to it brought us there from `path`."""
    with ExitStack() as opened:
        first = _open_locked(real, path, opened)
        if not os.path.lexists(log):  # the other process finished while we waited, or had not begun to patch
            if pointer is not None and pointed_to(pointer) == real:
                remove_journal(pointer)
            return False
        journal = opened.enter_context(open_journal(log))
        owner = os.stat(os.path.dirname(log)) if first is None else os.fstat(first.fd)
        require_trusted(journal, owner.st_uid, path)
        if journal.read(0, min(len(MAGIC), journal.size)).startswith(_REPLACES):
            from ckpt_cli.files.journal import replace as replace_set

            return replace_set.finish(log)
        header = header_of(journal)
        names = [entry["name"] for entry in header["files"][1:]] if header else []
        others = [neighbour(log, name) for name in names]
        files = [first, *(_open_to_finish(other, path, opened) for other in others)]
        for file in filter(None, files[1:]):
            require_trusted(journal, os.fstat(file.fd).st_uid, path)
        whole = header is not None and is_complete(journal, header) and _finish(journal, header, files, [real, *others])
        _clear(filter(None, files), log, *map(journal_path, others), *([pointer] if pointer else []))
        return whole


def _open_locked(real: str, path: str, opened: ExitStack) -> LocalFile | None:
    """Open and lock the file that has the name now: while we waited, another one may have taken its place."""
    while True:
        with ExitStack() as attempt:
            file = _open_to_finish(real, path, attempt)
            if file is None:
                return None
            lock(file)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fd), os.lstat(real)):
                    opened.push(attempt.pop_all())
                    return file


def _open_to_finish(real: str, path: str, opened: ExitStack) -> LocalFile | None:
    """Open a file of an interrupted edit to write it; None where it is gone, or something else has its name."""
    try:
        return opened.enter_context(LocalFile(real, write=True, follow=False))
    except FormatError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
            return None
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise CkptError(
            "an interrupted edit must be finished before it can be read, and it may not be written",
            path=path,
            hint="run any ckpt command on it as a user who may write it",
        ) from error


def _finish(journal: LocalFile, header: Header, files: Sequence[LocalFile | None], paths: Sequence[str]) -> bool:
    """Complete the patches where every file is the one that they are meant for, else undo them in those that are.

    Returns True if they are complete. Raises RefusedError where a file was saved again since: what was undone stays
    so, and the journal stays as well.
    """
    states = states_of(journal, header, files)
    if State.BEGUN in states and not any(kind in _NOT_OURS for kind in states):
        for patch in patches_of(journal):
            file = files[patch.file]
            if file is not None:
                write_all(file.fd, patch.new, patch.offset)
        _cut(files, [entry["new_size"] for entry in header["files"]])
        return True
    written = (State.BEGUN,) if State.STALE in states else (State.BEGUN, State.OLD)
    ours = [file if kind in written else None for file, kind in zip(files, states, strict=True)]
    _put_back(journal.path, ours, compare=False)
    if State.STALE in states:
        pairs = zip(paths, states, strict=True)
        intact = [f"{path} is as it was before the edit" for path, kind in pairs if kind not in _NOT_OURS]
        raise RefusedError(
            "a journal of an interrupted edit lies beside it, but the file has been replaced or changed since",
            path=paths[states.index(State.STALE)],
            hint=f"if this file is whole, remove the journal: rm {journal.path!r}",
            details=intact,
        )
    return False


def write_patches(overlay: Overlay, file: SourceFile, target: SourceFile) -> None:
    """Write the patches of a file into `target`: that file, or a copy of it."""
    for patch in overlay.patches(file):
        write_all(target.fd, overlay.new_bytes(patch), patch.offset)


def patch_copies(overlay: Overlay) -> None:
    """Write an overlay's patches durably into its files, which were just written and are not in their place yet."""
    for file in overlay.touched:
        with LocalFile(file.path, write=True) as target:
            write_patches(overlay, file, target)
            sync(target.fd)


def _put_back(log: str, files: Sequence[SourceFile | None], *, compare: bool = True) -> None:
    """Put the old bytes back from the journal, those that are there already only without `compare`.

    After an error of the disk, what is read may not be what is on the disk: then they are all written.
    """
    if not any(files):
        return
    with open_journal(log) as journal:
        header = header_of(journal)
        sizes = [entry["size"] for entry in header["files"]] if header else []
        for patch in patches_of(journal) if header else ():
            file = files[patch.file]
            old = patch.old[: max(sizes[patch.file] - patch.offset, 0)]
            if file is not None and not (compare and read_at(file.fd, len(old), patch.offset) == old):
                write_all(file.fd, old, patch.offset)
        _cut(files, sizes)


def _cut(files: Sequence[SourceFile | None], sizes: Sequence[int]) -> None:
    """Give files the sizes that they are to have, and make all that was written durable."""
    for file, size in zip(files, sizes, strict=True):
        if file is not None:
            if os.fstat(file.fd).st_size != size:
                os.ftruncate(file.fd, size)
            sync(file.fd)


# --- the states of the files: which of them the interrupted edit may go on with --------------------------------------

_SECTOR = 4096
"""Bytes that a crash leaves wholly old or wholly new, but for the one where it stopped."""


class State(Enum):
    """A file, compared with what the journal says of it."""

    UNTOUCHED = auto()
    """Nothing was written since the journal was."""
    OLD = auto()
    """Each patched range holds old bytes, but something was written."""
    BEGUN = auto()
    """Each patched range holds old and new bytes."""
    STALE = auto()
    """Another file, or one that was saved again since."""
    GONE = auto()


_NOT_OURS = (State.STALE, State.GONE)
"""States of files that an interrupted edit leaves alone."""


def states_of(journal: LocalFile, header: Header, files: Sequence[LocalFile | None]) -> list[State]:
    """The state of each file of a complete journal; None stands for one that is not there."""
    now = identity_of(os.fstat(journal.fd))
    is_copy = header["journal"] is not None and not header["journal"].is_inode(now)
    comparisons = [
        None if file is None else _Comparison(entry, file, by_inode=not is_copy)
        for entry, file in zip(header["files"], files, strict=True)
    ]
    for patch in patches_of(journal):
        comparison = comparisons[patch.file]
        if comparison is not None:
            comparison.take(patch)
    return [State.GONE if each is None else each.state(now.mtime) for each in comparisons]


class _Comparison:
    """One file, compared patch by patch."""

    def __init__(self, entry: File, file: LocalFile, *, by_inode: bool) -> None:
        self._entry = entry
        self._file = file
        self._now = identity_of(os.fstat(file.fd))
        self._by_inode = by_inode and entry["identity"] is not None
        self._is_old = file.size == entry["size"]
        self._sample = Sample(min(entry["size"], entry["new_size"]))
        self._is_stale = not min(entry["size"], entry["new_size"]) <= file.size <= reach(entry)
        if self._by_inode and entry["identity"] is not None:
            self._is_stale |= not entry["identity"].is_inode(self._now)

    def take(self, patch: LoggedPatch) -> None:
        """Compare a patched range."""
        end = patch.offset + len(patch.new)
        if self._is_stale or end > reach(self._entry):
            self._is_stale = True
            return
        now = read_padded(self._file, patch.offset, len(patch.new))
        if now != patch.old:
            self._is_old = False
            self._is_stale = not _is_between(patch, now)
        self._sample.exclude(patch.offset, end)

    def state(self, written: int) -> State:
        """The state after all patches; the journal was written at the time `written`."""
        was = self._entry["identity"]
        if self._is_stale or (was is not None and self._sample.checksum(self._file) != self._entry["sample"]):
            return State.STALE
        is_touched = was is None or was.mtime != self._now.mtime
        if self._is_old:
            return State.OLD if is_touched else State.UNTOUCHED
        # A patch makes the file newer than its journal; an older time was set by whoever put an old copy in its place.
        return State.STALE if self._by_inode and is_touched and self._now.mtime < written else State.BEGUN


def _is_between(patch: LoggedPatch, now: bytes) -> bool:
    """True if each byte is an old or a new one, as an interrupted patch leaves them."""
    for at in range(0, len(now), _SECTOR):
        old, new, found = (data[at : at + _SECTOR] for data in (patch.old, patch.new, now))
        if found not in (old, new) and any(byte not in pair for byte, *pair in zip(found, old, new, strict=True)):
            return False
    return True
