"""The record that an edit leaves beside its backups, so that `ckpt undo` knows whether a file changed since.

    .NAME.bak.ckpt-undo: magic | length u32 | crc u32 of the JSON | JSON {"files": [{"name", "backup", "after"}…]}

It stands beside the first backup and has an entry for every file of the edit. `after` is the fingerprint of the file
as the edit left it, or null where the edit removed it; `backup` is null where the edit created the file. The record is
durable before the edit takes effect, so that a crash cannot leave an edit without one, and it is replaced as a whole.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import temporary_of
from ckpt_cli.files.hidden_files import UNDO_RECORD, undo_record_path
from ckpt_cli.files.places import is_plain_name
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import set_mode, sync, sync_folder, user, write_all

_MAGIC = b"ckpt-undo-1\n\0\0\0\0"
_HEAD = struct.Struct("<16sII")
_LIMIT = 8 << 20

_WHOLE = 1 << 20
"""Bytes up to which a fingerprint covers all of a file; of a larger one it covers as many, in samples."""

_SAMPLE = 64 << 10
"""Bytes of one sample."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The state of a file after an edit, to see if it is still the same."""

    size: int
    digest: str
    """SHA-256 of the whole file, or of samples of it."""
    mtime_ns: int | None = None
    """When it was written; None where an edit in place had not yet ended."""

    @property
    def is_whole(self) -> bool:
        """True if it covers every byte, so that the time does not matter."""
        return self.size <= _WHOLE

    def matches(self, now: Fingerprint) -> bool:
        """True if the file is the same: of a large one, of which not all was hashed, the time must be the same too."""
        is_same = (self.size, self.digest) == (now.size, now.digest)
        return is_same and (self.is_whole or self.mtime_ns == now.mtime_ns)


@dataclass(frozen=True, slots=True)
class RecordedFile:
    """One file of an edit, by names within its folder."""

    name: str
    backup: str | None
    """The path of its old content; None where the edit created the file."""
    after: Fingerprint | None
    """The file as the edit left it; None where the edit removed it."""


def fingerprint(size: int, read: Callable[[int, int], bytes], mtime_ns: int | None = None) -> Fingerprint:
    """Fingerprint content that `read(offset, nbytes)` gives."""
    import hashlib

    hashed = hashlib.sha256()
    if size <= _WHOLE:
        hashed.update(read(0, size))
    else:
        count = _WHOLE // _SAMPLE
        for number in range(count):
            hashed.update(read((size - _SAMPLE) * number // (count - 1), _SAMPLE))
    return Fingerprint(size, hashed.hexdigest(), mtime_ns)


def fingerprint_of(path: str) -> Fingerprint:
    """Fingerprint a file; raises FileNotFoundError where it is not there."""
    with LocalFile(path, follow=False) as file:
        return fingerprint(file.size, file.read, os.fstat(file.fd).st_mtime_ns)


def write_record(folder: str, files: Sequence[RecordedFile]) -> None:
    """Write the record of an edit, in the place of one that an edit left which was stopped, and make it durable."""
    named = next(file.name for file in files if file.backup)
    facts = [{"name": file.name, "backup": file.backup, "after": _facts(file.after)} for file in files]
    raw = json.dumps({"files": facts}).encode()
    with temporary_of(os.path.join(folder, f"{named}.bak")) as temporary:  # as its backups: the next edit clears it
        set_mode(temporary.fd, 0o600)
        write_all(temporary.fd, _HEAD.pack(_MAGIC, len(raw), zlib.crc32(raw)) + raw, 0)
        sync(temporary.fd)
        os.replace(temporary.path, record_of(folder, files))
    sync_folder(folder)


def record_of(folder: str, files: Sequence[RecordedFile]) -> str:
    """The path of the record of an edit of some files."""
    return undo_record_path(os.path.join(folder, next(file.backup for file in files if file.backup)))


def records_in(folder: str, listing: Sequence[str]) -> Iterator[tuple[str, list[RecordedFile]]]:
    """Every complete record of a folder, with its path; torn ones and those of other users are passed over."""
    owners = (os.stat(folder).st_uid, user(), 0)
    for name in listing:
        if name.startswith(".") and name.endswith(f".{UNDO_RECORD}"):
            path = os.path.join(folder, name)
            with suppress(OSError, CkptError), LocalFile(path, follow=False) as file:
                if os.fstat(file.fd).st_uid in owners and (files := _files_in(file)):
                    yield path, files


def _facts(after: Fingerprint | None) -> list[object] | None:
    return None if after is None else [after.size, after.digest, after.mtime_ns]


def _files_in(file: LocalFile) -> list[RecordedFile] | None:
    """The files that a record names; None where it was cut short or is not a record."""
    if not _HEAD.size <= file.size <= _HEAD.size + _LIMIT:
        return None
    magic, length, crc = _HEAD.unpack(file.read(0, _HEAD.size))
    raw = file.read(_HEAD.size, file.size - _HEAD.size)
    if magic != _MAGIC or len(raw) != length or zlib.crc32(raw) != crc:
        return None
    try:
        return [_recorded(facts) for facts in json.loads(raw)["files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _recorded(facts: dict[str, Any]) -> RecordedFile:
    name, backup, after = facts["name"], facts["backup"], facts["after"]
    for each in (name, backup):
        if each is not None and not is_plain_name(each):
            raise ValueError("a record names a file of another folder")
    return RecordedFile(name, backup, None if after is None else Fingerprint(*after))
