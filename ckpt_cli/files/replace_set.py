"""Several files of one folder replaced as one: written beside their targets, then renamed under a journal.

    .FIRST.ckpt-journal: magic | length u32 | crc u32 of the JSON | JSON
    {"replace": [name…], "remove": [name…], "move": {from: to…}}

The new content of NAME waits as `.NAME.ckpt-tmp`. With the journal complete on disk the set is new: who opens one of
the files next finishes the renames. Before that the set is old. Each other file has a pointer, as a journal of
patches has it (`files/journal.py`).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypedDict

from ckpt_cli.errors import RefusedError
from ckpt_cli.files.durable import sync_folder, write_all
from ckpt_cli.files.hidden import journal_path, temporary_path
from ckpt_cli.files.local import LocalFile
from ckpt_cli.files.owners import take_after, warn_of_lost
from ckpt_cli.files.pointers import remove_journal, write_pointer
from ckpt_cli.files.replace import locked_temporary

MAGIC = b"ckpt-replace-1\n\0"
_HEAD = struct.Struct("<16sII")
_LIMIT = 8 << 20


@dataclass(slots=True)
class Replacement:
    """The files of a set that are being written."""

    folder: str
    first: str
    """The name of the file that the journal stands beside."""
    names: list[str] = field(default_factory=list)
    """Files that get new content."""
    removed: list[str] = field(default_factory=list)
    """Files that go."""
    moved: dict[str, str] = field(default_factory=dict)
    """Durable files of the folder that take other names, {from: to}, in the place of what has these."""
    _lost: dict[str, str | None] = field(default_factory=dict)
    """What of a file's owner and group could not be kept."""
    _open: ExitStack = field(default_factory=ExitStack)

    def create(self, name: str) -> LocalFile:
        """An empty file to write, which is to become `name`."""
        target = os.path.join(self.folder, name)
        file = self._open.enter_context(locked_temporary(target))
        with suppress(FileNotFoundError):
            self._lost[target] = take_after(file.fd, os.stat(target))
        self.names.append(name)
        return file

    def adopt(self, path: str, name: str) -> None:
        """Let a durable file of the same file system, which goes from where it is, become `name`."""
        target = os.path.join(self.folder, name)
        with suppress(FileNotFoundError):
            old = os.stat(target)
            with LocalFile(path, follow=False) as file:
                self._lost[target] = take_after(file.fd, old)
        self._open.enter_context(locked_temporary(target))
        self.names.append(name)
        os.replace(path, temporary_path(target))

    def new_path(self, name: str) -> str:
        """Where the new content of a file waits."""
        return temporary_path(os.path.join(self.folder, name))

    def done(self, file: LocalFile) -> None:
        """Make a file that was written durable."""
        os.fsync(file.fd)


@contextmanager
def replacing_set(folder: str, first: str) -> Iterator[Replacement]:
    """New content for some files of a folder, which all take their places when the block ends well, or none does."""
    work = Replacement(os.path.realpath(folder), first)
    try:
        yield work
        _commit(work)
    except BaseException:
        if not os.path.lexists(journal_path(os.path.join(work.folder, first))):  # else they are needed to finish it
            for name in work.names:
                with suppress(FileNotFoundError):
                    os.unlink(temporary_path(os.path.join(work.folder, name)))
        raise
    finally:
        work._open.close()
    finish(journal_path(os.path.join(work.folder, first)))
    for path, lost in work._lost.items():
        warn_of_lost(path, lost)


def _commit(work: Replacement) -> None:
    """Write the journal and the pointers to it: with them on disk, the set is new."""
    first = os.path.join(work.folder, work.first)
    log = journal_path(first)
    others = [name for name in (*work.names, *work.removed, *work.moved.values()) if name != work.first]
    pointers = [journal_path(os.path.join(work.folder, name)) for name in others]
    raw = json.dumps({"replace": work.names, "remove": work.removed, "move": work.moved}).encode()
    try:
        for pointer in pointers:
            write_pointer(pointer, work.first)
        sync_folder(work.folder)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, _HEAD.pack(MAGIC, len(raw), zlib.crc32(raw)) + raw, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(work.folder)
    except BaseException:
        remove_journal(log, *pointers)
        raise


def finish(log: str) -> bool:
    """Do what a journal says that is complete, and remove it; False for one that is not, which is removed."""
    folder = os.path.dirname(log)
    with LocalFile(log, follow=False) as file:
        plan = _plan(file)
    names: Sequence[str] = ()
    if plan is not None:
        names = [*plan["replace"], *plan["move"].values()]
        for name in plan["replace"]:
            target = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # it was renamed before the stop
                os.replace(temporary_path(target), target)
        for source, name in plan["move"].items():
            with suppress(FileNotFoundError):
                os.replace(os.path.join(folder, source), os.path.join(folder, name))
        for name in plan["remove"]:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
        sync_folder(folder)
        for name in plan["remove"]:  # before the journal goes, as nobody opens what is gone and finds them
            with suppress(FileNotFoundError):
                os.unlink(journal_path(os.path.join(folder, name)))
    pointers = [journal_path(os.path.join(folder, name)) for name in names]
    remove_journal(log, *(pointer for pointer in pointers if pointer != log))
    return plan is not None


class _Plan(TypedDict):
    """What a journal says."""

    replace: list[str]
    remove: list[str]
    move: dict[str, str]


def _plan(file: LocalFile) -> _Plan | None:
    """What the journal says; None where it was cut short."""
    if file.size < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack(file.read(0, _HEAD.size))
    if magic != MAGIC or length > _LIMIT or file.size != _HEAD.size + length:
        return None
    raw = file.read(_HEAD.size, length)
    if zlib.crc32(raw) != crc:
        return None
    plan: _Plan = json.loads(raw)
    plan.setdefault("move", {})
    for name in (*plan["replace"], *plan["remove"], *plan["move"], *plan["move"].values()):
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise RefusedError(
                f"a journal would replace {name!r}, which is no file beside it", path=file.path,
                hint=f"remove it: rm {file.path!r}",
            )  # fmt: skip
    return plan
