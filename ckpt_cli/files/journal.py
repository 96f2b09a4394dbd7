"""Patches in place, all or nothing, by a redo and undo log beside the file (`files/journal_log.py`).

The journal is complete on disk before the first patch, and is removed after the last one is on disk. So a journal
without its trailer means that nothing was patched, and one with it can be rolled forward at any time. Where a file
becomes longer or shorter, the bytes beyond its end count as zeros, old or new.

An edit of several files has one journal, beside the first of them. Beside each other one a pointer is made durable
before the journal and removed after it (`files/pointers.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from ckpt_cli.errors import CkptError, RefusedError
from ckpt_cli.files.durable import sync_folder, write_all
from ckpt_cli.files.hidden import journal_path
from ckpt_cli.files.journal_log import MAGIC, Header, Record, header_of, is_complete, reach, records_of, write_journal
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.locks import lock
from ckpt_cli.files.overlay import Overlay, read_padded
from ckpt_cli.files.pointers import neighbour, pointed_to, remove_journal, write_pointer

_REPLACES = b"ckpt-replace-"
"""What another kind of journal begins with: one of files that are replaced (`files/replace_set.py`)."""

_SECTOR = 4096
"""Bytes that a crash leaves wholly old or wholly new, but for the one where it stopped."""


def apply(overlay: Overlay) -> int:
    """Write an overlay's patches into its files, which the caller has locked; returns bytes written, journal included.

    The journal stands beside the first file that is patched, and a pointer to it beside each further one. On any
    error or interrupt the old bytes are put back.
    """
    touched = [number for number in range(len(overlay.files)) if overlay.touches(number)]
    if not touched:
        return 0
    files = [overlay.files[number] for number in touched]
    _require_one_folder(files)
    path = journal_path(files[0].path)
    pointers = [journal_path(file.path) for file in files[1:]]
    try:
        for pointer in pointers:
            write_pointer(pointer, os.path.basename(os.path.realpath(files[0].path)))
        if pointers:
            sync_folder(os.path.dirname(path))
        journalled = write_journal(path, overlay, touched)
        sync_folder(os.path.dirname(path))
    except BaseException:
        remove_journal(path, *pointers)
        raise
    try:
        for number in touched:
            write_patches(overlay, number, overlay.files[number])
            if overlay.size(number) != overlay.files[number].size:
                os.ftruncate(overlay.files[number].fd, overlay.size(number))
            os.fsync(overlay.files[number].fd)
    except BaseException:
        _roll_back(path, files)
        remove_journal(path, *pointers)
        raise
    remove_journal(path, *pointers)
    return journalled + overlay.nbytes


def recover(path: str) -> bool:
    """Finish what an interrupted edit of `path` began; True when the file was brought to its new state.

    Waits while the edit is still running. Raises RefusedError when the journal belongs to other bytes.
    """
    log = journal_path(path)
    if not os.path.lexists(log):
        return False
    owner = pointed_to(log)
    if owner is not None and not os.path.lexists(owner) and os.path.lexists(journal_path(owner)):
        return _recover_missing(journal_path(owner))
    if not os.path.lexists(os.path.realpath(path)):
        return _recover_missing(log)
    if owner is None or not os.path.lexists(owner):
        return _recover_from(log, os.path.realpath(path), path)
    return _recover_from(journal_path(owner), owner, path, pointer=log)


def _recover_from(log: str, real: str, path: str, pointer: str | None = None) -> bool:
    """Finish what the journal `log` beside the file `real` holds; a `pointer` to it brought us there from `path`."""
    try:
        first = LocalFile(real, write=True)
    except PermissionError as error:
        raise CkptError(
            "an interrupted edit must be finished before it can be read, and it may not be written",
            path=path,
            hint="run any ckpt command on it as a user who may write it",
        ) from error
    with first:
        lock(first)
        if not os.path.lexists(log):  # the other process finished while we waited, or had not begun to patch
            if pointer is not None and pointed_to(pointer) == real:
                remove_journal(pointer)
            return False
        with LocalFile(log, follow=False) as journal, ExitStack() as opened:
            _require_own(journal, first)
            if journal.read(0, min(len(MAGIC), journal.size)).startswith(_REPLACES):
                from ckpt_cli.files import replace_set

                return replace_set.finish(log)
            header = header_of(journal)
            others = [neighbour(log, entry["name"]) for entry in header["files"][1:]] if header else []
            files = [first, *(opened.enter_context(LocalFile(other, write=True, follow=False)) for other in others)]
            whole = header is not None and is_complete(journal, header)
            if header and whole:
                _check_identity(log, header, files, journal)
                for record in records_of(journal):
                    write_all(files[record.file].fd, record.new, record.offset)
                for file, entry in zip(files, header["files"], strict=True):
                    if entry["new_size"] != entry["size"]:
                        os.ftruncate(file.fd, entry["new_size"])
                    os.fsync(file.fd)
        remove_journal(log, *map(journal_path, others), *([pointer] if pointer else []))
        return whole


def _recover_missing(log: str) -> bool:
    """Finish what a journal says whose file is not there: one that was new, or that goes; or remove a mere pointer."""
    from ckpt_cli.files import replace_set

    folder = os.path.dirname(log)
    with LocalFile(log, follow=False) as journal:
        _require_owner(journal, folder, os.stat(folder).st_uid)
        replaces = journal.read(0, min(len(MAGIC), journal.size)).startswith(_REPLACES)
    if replaces:
        return replace_set.finish(log)
    remove_journal(log)
    return False


def _require_own(journal: LocalFile, file: LocalFile) -> None:
    """Refuse a journal that somebody laid beside the file who may not be one who writes it."""
    _require_owner(journal, file.path, os.fstat(file.fd).st_uid)


def _require_owner(journal: LocalFile, path: str, uid: int) -> None:
    owner = os.fstat(journal.fd).st_uid
    if owner not in (uid, os.geteuid(), 0):
        raise RefusedError(
            f"a journal that another user (id {owner}) wrote lies beside it",
            path=path,
            hint=f"if you do not trust that user, remove it: rm {journal.path!r}",
        )


def _require_one_folder(files: Sequence[LocalFile]) -> None:
    """Refuse to patch files together that no one journal can stand beside."""
    folders = {os.path.dirname(os.path.realpath(file.path)) for file in files}
    if len(folders) > 1:
        raise RefusedError(
            "its files lie in several folders, so that they cannot be changed as one",
            path=files[0].path,
            hint="write the result elsewhere with -o OUT",
        )


def write_patches(overlay: Overlay, number: int, target: LocalFile) -> None:
    """Write the patches of file `number` into `target`: that file, or a copy of it."""
    for patch in overlay.patches(number):
        write_all(target.fd, overlay.new_bytes(patch), patch.offset)


def _check_identity(log: str, header: Header, files: Sequence[LocalFile], journal: LocalFile) -> None:
    """Refuse to roll forward over a file that is not the one the journal was written for."""
    entries = header["files"]
    stale = [
        file.path
        for file, entry in zip(files, entries, strict=True)
        if not min(entry["size"], entry["new_size"]) <= file.size <= reach(entry)
    ]
    for record in [] if stale else records_of(journal):
        file = files[record.file]
        if record.offset + len(record.new) > reach(entries[record.file]) or not _is_between(record, file):
            stale.append(file.path)
            break
    if stale:
        raise RefusedError(
            "a journal of an interrupted edit lies beside it, but the file has been replaced or changed since",
            path=stale[0],
            hint=f"if this file is whole, remove the journal: rm {log!r}",
        )


def _is_between(record: Record, file: LocalFile) -> bool:
    """Whether each byte is an old or a new one, as an interrupted patch leaves them."""
    for at in range(0, len(record.new), _SECTOR):
        old, new = record.old[at : at + _SECTOR], record.new[at : at + _SECTOR]
        now = read_padded(file, record.offset + at, len(new))
        if now not in (old, new) and any(byte not in pair for byte, *pair in zip(now, old, new, strict=True)):
            return False
    return True


def _roll_back(path: str, files: Sequence[LocalFile]) -> None:
    """Put the old bytes back from the journal; what fails here is left to the next recovery."""
    with LocalFile(path) as journal:
        for record in records_of(journal):
            file = files[record.file]
            write_all(file.fd, record.old[: max(file.size - record.offset, 0)], record.offset)
        for file in files:
            os.ftruncate(file.fd, file.size)
            os.fsync(file.fd)
