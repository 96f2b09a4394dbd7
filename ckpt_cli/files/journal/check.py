"""The states of the files that a journal of patches is about: which of them the interrupted edit may go on with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum, auto

from ckpt_cli.files.journal.identity import Sample, identity_of
from ckpt_cli.files.journal.log import File, Header, LoggedPatch, patches_of, reach
from ckpt_cli.files.patches import read_padded
from ckpt_cli.files.source import LocalFile

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
