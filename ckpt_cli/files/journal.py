"""Patches in place, all or nothing: a redo and undo log beside the file.

    .NAME.ckpt-journal:  magic | header length u32 | header crc u32 | header JSON | record… | trailer
    record:              file u32 | offset u64 | nbytes u64 | crc u32 of (these fields, old, new) | old | new
    trailer:             magic | number of records u64 | crc u32 of every record's crc

The journal is complete on disk before the first patch, and is removed after the last one is on disk. So a journal
without its trailer means that nothing was patched, and one with it can be rolled forward at any time. Where a file
becomes longer or shorter, the bytes beyond its end count as zeros, old or new.

An edit of several files has one journal, beside the first of them. Beside each other one a pointer is made durable
before the journal and removed after it, so that whoever opens only that file finds the journal too:

    .OTHER.ckpt-journal: magic | name of the file that the journal stands beside
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypedDict

from ckpt_cli.errors import CkptError, MalformedError, RefusedError
from ckpt_cli.files.hidden import journal_path
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.locks import lock
from ckpt_cli.files.overlay import Overlay, read_padded

_MAGIC = b"ckpt-journal-1\n\0"
_TRAILER = b"ckpt-journal-end"
_POINTER = b"ckpt-journal-of\n"
_REPLACES = b"ckpt-replace-"
"""What another kind of journal begins with: one of files that are replaced (`files/replace_set.py`)."""
_HEAD = struct.Struct("<16sII")
_RECORD = struct.Struct("<IQQ")
_CRC = struct.Struct("<I")
_END = struct.Struct("<16sQI")
_HEADER_LIMIT = 1 << 20
_RECORD_LIMIT = 16 << 20
_GROWTH_LIMIT = 1 << 30
"""Bytes that an edit in place makes a file longer by at most."""
_SECTOR = 4096
"""Bytes that a crash leaves wholly old or wholly new, but for the one where it stopped."""
_HELD = 1 << 20


class _File(TypedDict):
    """One patched file as the journal's header names it."""

    name: str
    """A name in the journal's own folder, never a path: a journal may not reach elsewhere."""
    size: int
    """Bytes that it has before the edit."""
    new_size: int
    """Bytes that it has after it."""


class _Header(TypedDict):
    """The journal's header."""

    files: list[_File]


@dataclass(frozen=True, slots=True)
class _Record:
    """One patch as the journal keeps it."""

    file: int
    offset: int
    old: bytes
    new: bytes
    crc: int
    """What the journal says that its checksum is."""


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
        journalled = _write_journal(path, overlay, touched)
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
    owner = _pointed_to(log)
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
            if pointer is not None and _pointed_to(pointer) == real:
                remove_journal(pointer)
            return False
        with LocalFile(log, follow=False) as journal, ExitStack() as opened:
            _require_own(journal, first)
            if journal.read(0, min(len(_MAGIC), journal.size)).startswith(_REPLACES):
                from ckpt_cli.files import replace_set

                return replace_set.finish(log)
            header = _header(journal)
            others = [_neighbour(log, entry["name"]) for entry in header["files"][1:]] if header else []
            files = [first, *(opened.enter_context(LocalFile(other, write=True, follow=False)) for other in others)]
            whole = header is not None and _is_complete(journal, header)
            if header and whole:
                _check_identity(log, header, files, _records(journal))
                for record in _records(journal):
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
        replaces = journal.read(0, min(len(_MAGIC), journal.size)).startswith(_REPLACES)
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


def write_pointer(path: str, first: str) -> None:
    """Note beside a file that the journal which is about it stands beside another one, called `first`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, _POINTER + os.fsencode(first), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _pointed_to(log: str) -> str | None:
    """The file beside which the journal stands that a pointer points to; None for a journal or a torn pointer."""
    try:
        with LocalFile(log, follow=False) as pointer:
            if pointer.size > len(_POINTER) + 255 or pointer.read(0, min(len(_POINTER), pointer.size)) != _POINTER:
                return None
            name = os.fsdecode(pointer.read(len(_POINTER), pointer.size - len(_POINTER)))
    except FileNotFoundError:  # the edit ended just now
        return None
    return os.path.join(os.path.dirname(log), os.path.basename(name)) if name else None


def _neighbour(log: str, name: str) -> str:
    """The path of another file that a journal may patch: one beside it, with a pointer back to the journal."""
    path = os.path.join(os.path.dirname(log), os.path.basename(name))
    if not os.path.lexists(journal_path(path)) or journal_path(_pointed_to(journal_path(path)) or path) != log:
        raise RefusedError(
            f"a journal would patch {name!r}, which does not point back to it", path=log, hint=f"remove it: rm {log!r}"
        )
    return path


def write_patches(overlay: Overlay, number: int, target: LocalFile) -> None:
    """Write the patches of file `number` into `target`: that file, or a copy of it."""
    for patch in overlay.patches(number):
        write_all(target.fd, overlay.new_bytes(patch), patch.offset)


def sync_folder(folder: str) -> None:
    """Make the folder's own entries durable: a new, renamed or removed file."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of some bytes at an offset."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


class _Log:
    """Gathers what is written one after another, so that a journal of many patches takes few writes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._held = bytearray()
        self._written = 0

    def add(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._held += piece
        if len(self._held) >= _HELD:
            self.flush()

    def flush(self) -> int:
        """Write what is held; returns the bytes written so far."""
        write_all(self._fd, bytes(self._held), self._written)
        self._written += len(self._held)
        self._held.clear()
        return self._written


def _write_journal(path: str, overlay: Overlay, touched: Sequence[int]) -> int:
    """Write the whole journal of the patched files and make it durable; returns its size in bytes."""
    named: list[_File] = []
    for number in touched:
        file = overlay.files[number]
        name = os.path.basename(os.path.realpath(file.path))
        named.append(_File(name=name, size=file.size, new_size=overlay.size(number)))
    header = json.dumps(_Header(files=named)).encode()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        log = _Log(fd)
        log.add(_HEAD.pack(_MAGIC, len(header), zlib.crc32(header)), header)
        count = total = 0
        for place, number in enumerate(touched):
            for patch in overlay.patches(number):
                fields = _RECORD.pack(place, patch.offset, patch.nbytes)
                old, new = overlay.old_bytes(number, patch), overlay.new_bytes(patch)
                crc = _CRC.pack(zlib.crc32(new, zlib.crc32(old, zlib.crc32(fields))))
                total = zlib.crc32(crc, total)
                count += 1
                log.add(fields, crc, old, new)
        log.add(_END.pack(_TRAILER, count, total))
        size = log.flush()
        os.fsync(fd)
        return size
    finally:
        os.close(fd)


def _header(journal: LocalFile) -> _Header | None:
    """The journal's header where it and the trailer stand, else None."""
    if journal.size < _HEAD.size + _END.size:
        return None
    magic, length, crc = _HEAD.unpack(journal.read(0, _HEAD.size))
    if magic != _MAGIC or length > min(_HEADER_LIMIT, journal.size - _HEAD.size - _END.size):
        return None
    header = journal.read(_HEAD.size, length)
    if zlib.crc32(header) != crc or journal.read(journal.size - _END.size, len(_TRAILER)) != _TRAILER:
        return None
    try:
        parsed = json.loads(header)
        named = [
            _File(name=str(entry["name"]), size=int(entry["size"]), new_size=int(entry["new_size"]))
            for entry in parsed["files"]
        ]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # its checksum holds, but no ckpt wrote it
        return None
    if not named or any(not 0 <= entry["new_size"] <= entry["size"] + _GROWTH_LIMIT for entry in named):
        return None
    return _Header(files=named)


def _reach(entry: _File) -> int:
    """The byte after the last that a patch of a file may write."""
    return max(entry["size"], entry["new_size"])


def _is_complete(journal: LocalFile, header: _Header) -> bool:
    """Whether every record's checksum holds, and the records are those that the trailer counts."""
    files = header["files"]
    if journal.size > _HEADER_LIMIT + (_RECORD.size + _CRC.size + 2) * (1 + sum(map(_reach, files))):
        return False
    _, count, total = _END.unpack(journal.read(journal.size - _END.size, _END.size))
    found = running = 0
    reached = (0, 0)
    try:
        for record in _records(journal):
            if record.file >= len(files) or (record.file, record.offset) < reached or not record.new:
                return False
            reached = (record.file, record.offset + len(record.new))
            fields = _RECORD.pack(record.file, record.offset, len(record.new))
            checksum = zlib.crc32(record.new, zlib.crc32(record.old, zlib.crc32(fields)))
            if checksum != record.crc:
                return False
            running = zlib.crc32(_CRC.pack(checksum), running)
            found += 1
    except MalformedError:
        return False
    return (found, running) == (count, total)


def _records(journal: LocalFile) -> Iterator[_Record]:
    """The records in order, each checked against the journal's size."""
    _, length, _ = _HEAD.unpack(journal.read(0, _HEAD.size))
    position, end = _HEAD.size + length, journal.size - _END.size
    while position < end:
        head = _RECORD.size + _CRC.size
        if position + head > end:
            raise MalformedError("a record is cut short", path=journal.path)
        file, offset, nbytes = _RECORD.unpack(journal.read(position, _RECORD.size))
        (crc,) = _CRC.unpack(journal.read(position + _RECORD.size, _CRC.size))
        position += head
        if nbytes > _RECORD_LIMIT or position + 2 * nbytes > end:
            raise MalformedError("a record is cut short", path=journal.path)
        yield _Record(file, offset, journal.read(position, nbytes), journal.read(position + nbytes, nbytes), crc)
        position += 2 * nbytes


def _check_identity(
    log: str,
    header: _Header,
    files: Sequence[LocalFile],
    records: Iterator[_Record],
) -> None:
    """Refuse to roll forward over a file that is not the one the journal was written for."""
    entries = header["files"]
    stale = [
        file.path
        for file, entry in zip(files, entries, strict=True)
        if not min(entry["size"], entry["new_size"]) <= file.size <= _reach(entry)
    ]
    for record in [] if stale else records:
        file = files[record.file]
        if record.offset + len(record.new) > _reach(entries[record.file]) or not _is_between(record, file):
            stale.append(file.path)
            break
    if stale:
        raise RefusedError(
            "a journal of an interrupted edit lies beside it, but the file has been replaced or changed since",
            path=stale[0],
            hint=f"if this file is whole, remove the journal: rm {log!r}",
        )


def _is_between(record: _Record, file: LocalFile) -> bool:
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
        for record in _records(journal):
            file = files[record.file]
            write_all(file.fd, record.old[: max(file.size - record.offset, 0)], record.offset)
        for file in files:
            os.ftruncate(file.fd, file.size)
            os.fsync(file.fd)


def remove_journal(path: str, *pointers: str) -> None:
    """Remove a journal, and only when that is durable the pointers to it."""
    for paths in ([path], pointers):
        removed = False
        for each in paths:
            with suppress(FileNotFoundError):
                os.unlink(each)
                removed = True
        if removed:
            sync_folder(os.path.dirname(path))
