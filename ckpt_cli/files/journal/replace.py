"""Several files of a folder, or of folders in it, replaced as one: written beside them, then renamed under a journal.

    .FIRST.ckpt-journal: magic | length u32 | crc u32 of the JSON | JSON

    {"first": name, "journal": identity, "remove": [{"name", "old": identity}…],
     "replace": [{"name", "from": name or null, "new": identity, "old": identity or null}…]}

The new content of NAME waits as `.NAME.ckpt-tmp`, or as the file that "from" names. With the journal complete on disk
the set is new: who opens one of the files next finishes the renames, unless a file was saved again since. Before that
the set is old. Each other file has a pointer, as a journal of patches has it (`files/journal/apply.py`). The version
before had the names only.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from typing import Any

from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.atomic import locked_temporary, take_after, warn_of_lost
from ckpt_cli.files.hidden_files import journal_path, open_journal, require_trusted, temporary_path
from ckpt_cli.files.journal.log import Identity, identity_of, parsed_identity
from ckpt_cli.files.journal.pointer import is_name_below, remove_journal, write_pointer
from ckpt_cli.files.lock import try_lock
from ckpt_cli.files.outcome import Outcome, Stage, interrupts_deferred, stating
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import create_private, sync, sync_folder, write_all

MAGIC = b"ckpt-replace-2\n\0"
_BEFORE = b"ckpt-replace-1\n\0"
"""Begins a journal of the version before, which has no identities."""
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
    """Durable files of the folder that take other names, {from: to}, in the place of what has these.

    The caller has them locked, so that no reader finishes the set at the same time.
    """
    _lost: dict[str, str | None] = field(default_factory=dict)
    """The parts of a file's owner and group that could not be kept."""
    _open: ExitStack = field(default_factory=ExitStack)

    def create(self, name: str, mode_of: str | None = None) -> LocalFile:
        """An empty file to write, which is to become `name`; where there is none yet, it is like the file `mode_of`."""
        target = os.path.join(self.folder, name)
        file = self._open.enter_context(locked_temporary(target))
        like = target if mode_of is None or os.path.lexists(target) else mode_of
        with suppress(FileNotFoundError):
            self._lost[target] = take_after(file.fd, os.stat(like))
        self.names.append(name)
        return file

    def adopt(self, path: str, name: str) -> None:
        """Let a durable file of the same file system, which goes from where it is, become `name`."""
        target = os.path.join(self.folder, name)
        with locked_temporary(target):
            file = self._open.enter_context(LocalFile(path, follow=False))
            with suppress(OSError):
                try_lock(file.fd)  # it takes the place of a locked file, and is not to be taken for a leftover
            with suppress(FileNotFoundError):
                self._lost[target] = take_after(file.fd, os.stat(target))
            self.names.append(name)
            os.replace(path, temporary_path(target))

    def new_path(self, name: str) -> str:
        """Return the path of the new content of a file, until it replaces the old one."""
        return temporary_path(os.path.join(self.folder, name))

    def done(self, file: LocalFile) -> None:
        """Make a file that was written durable."""
        sync(file.fd)


@contextmanager
def replacing_set(folder: str, first: str) -> Iterator[Replacement]:
    """New content for some files of a folder, which all take their places when the block ends well, or none does.

    An error has the outcome.
    """
    work = Replacement(os.path.realpath(folder), first)
    log = journal_path(os.path.join(work.folder, first))
    with stating(folder) as stage, work._open:  # locked to the end, so that no reader finishes it at the same time
        try:
            yield work
            _commit(work)
            stage.outcome = Outcome.UNFINISHED
        except BaseException:
            if os.path.lexists(log):  # then the new files are needed to finish it
                stage.outcome = Outcome.UNFINISHED
            else:
                for name in work.names:
                    with suppress(OSError):
                        os.unlink(temporary_path(os.path.join(work.folder, name)))
            raise
        with interrupts_deferred():
            finish(log, stage)
        for path, lost in work._lost.items():
            warn_of_lost(path, lost)


def _commit(work: Replacement) -> None:
    """Write the journal and the pointers to it: with them on disk, the set is new."""
    log = journal_path(os.path.join(work.folder, work.first))
    names = (*work.names, *work.moved.values(), *work.removed)
    others = [os.path.join(work.folder, name) for name in names if name != work.first]
    try:
        for other in others:
            write_pointer(other, os.path.join(work.folder, work.first))
        _sync_folders(work.folder, names)
        _write(log, work)
        sync_folder(work.folder)
    except BaseException:
        with interrupts_deferred(), suppress(OSError):
            remove_journal(log, *map(journal_path, others))
        raise


def _sync_folders(folder: str, names: Iterable[str]) -> None:
    """Make the names of some files durable, which lie in a folder or in folders in it."""
    for each in dict.fromkeys([folder, *(os.path.dirname(os.path.join(folder, name)) for name in names)]):
        sync_folder(each)


def _write(log: str, work: Replacement) -> None:
    """Write the journal, durably."""
    fd = create_private(log)
    try:
        sources = [(None, name) for name in work.names] + list(work.moved.items())
        replaced = [_Renaming(name, _identity(os.path.join(work.folder, name)), source) for source, name in sources]
        removed = [_Renaming(name, _identity(os.path.join(work.folder, name))) for name in work.removed]
        plan = {
            "first": work.first,
            "journal": identity_of(os.fstat(fd)),
            "replace": [
                {"name": each.name, "from": each.source, "new": _identity(each.waits_at(work.folder)), "old": each.old}
                for each in replaced
            ],
            "remove": [{"name": each.name, "old": each.old} for each in removed],
        }
        raw = json.dumps(plan).encode()
        write_all(fd, _HEAD.pack(MAGIC, len(raw), zlib.crc32(raw)) + raw, 0)
        sync(fd)
    finally:
        os.close(fd)


def _identity(path: str) -> Identity | None:
    """The identity of what a path names, which may be nothing."""
    try:
        return identity_of(os.lstat(path))
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The content of a journal."""

    first: str | None
    replace: list[_Renaming]
    remove: list[_Renaming]
    journal: Identity | None
    """The journal itself as it was written; None in one of the version before."""


@dataclass(frozen=True, slots=True)
class _Renaming:
    """One file that is replaced, or that goes."""

    name: str
    old: Identity | None
    """The file before; None for one that is new."""
    source: str | None = None
    """The name of the file that takes its place; None for its temporary file."""
    new: Identity | None = None
    """The file that takes its place."""

    def waits_at(self, folder: str) -> str:
        """The path of the file that takes its place."""
        if self.source is not None:
            return os.path.join(folder, self.source)
        return temporary_path(os.path.join(folder, self.name))


def first_of(journal: LocalFile) -> str | None:
    """The name of the file that the journal lies beside, as it says itself."""
    plan = _plan(journal)
    return plan.first if plan else None


def finish(log: str, stage: Stage | None = None) -> bool:
    """Do what a journal says that is complete, and remove it; False for one that is not, which is removed.

    Raises RefusedError, before anything is done, where a file that it would replace or remove was saved again since.
    """
    stage = stage or Stage()
    folder = os.path.dirname(log)
    with open_journal(log) as file:
        plan = _plan(file)
        if plan is not None:
            waiting = _waiting(folder, plan, file)
    if plan is None:
        remove_journal(log)
        return False
    for each in waiting:
        with suppress(FileNotFoundError):  # another process finishes it, too
            os.replace(each.waits_at(folder), os.path.join(folder, each.name))
    for each in plan.remove:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, each.name))
    _sync_folders(folder, [each.name for each in (*plan.replace, *plan.remove)])
    stage.outcome = Outcome.DONE
    for each in plan.remove:  # before the journal goes, as nobody opens what is gone and finds them
        with suppress(FileNotFoundError):
            os.unlink(journal_path(os.path.join(folder, each.name)))
    pointers = [journal_path(os.path.join(folder, each.name)) for each in plan.replace]
    remove_journal(log, *(pointer for pointer in pointers if pointer != log))
    return True


def _waiting(folder: str, plan: _Plan, journal: LocalFile) -> list[_Renaming]:
    """The new files that are still to be put in their places; raises RefusedError where one must not be."""
    by_inode = plan.journal is not None and plan.journal.is_inode(identity_of(os.fstat(journal.fd)))
    waiting = [each for each in plan.replace if _is_waiting(folder, each, by_inode=by_inode)]
    for each in (*waiting, *plan.remove):
        _require_same(folder, each, journal, by_inode=by_inode, is_old_version=plan.journal is None)
    _require_content(folder, [each for each in plan.replace if each not in waiting], journal.path)
    for source in [each.waits_at(folder) for each in waiting if each.source is not None]:
        with suppress(FileNotFoundError):
            require_trusted(journal, os.lstat(source).st_uid, source)
    return waiting


def _is_waiting(folder: str, renaming: _Renaming, *, by_inode: bool) -> bool:
    """True if the new file is still to be put in its place."""
    now = _identity(renaming.waits_at(folder))
    if now is None or renaming.new is None:
        return now is not None
    return now == renaming.new if by_inode else now.size == renaming.new.size


def _require_same(
    folder: str, renaming: _Renaming, journal: LocalFile, *, by_inode: bool, is_old_version: bool
) -> None:
    """Refuse to replace or to remove a file that is not the one that the journal was written for."""
    path = os.path.join(folder, renaming.name)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    require_trusted(journal, found.st_uid, path)
    if is_old_version:
        is_same = found.st_mtime_ns <= os.fstat(journal.fd).st_mtime_ns
    elif by_inode:
        is_same = identity_of(found) == renaming.old
    else:  # a copy of the folder, where inodes and times say nothing
        is_same = renaming.old is not None and found.st_size == renaming.old.size
    if not is_same:
        raise RefusedError(
            "a journal of an interrupted edit of several files would replace it, but it was saved again since",
            path=path,
            hint=f"if the files are as you want them, remove the journal: rm {journal.path!r}",
        )


def _require_content(folder: str, done: Sequence[_Renaming], log: str) -> None:
    """Raise RefusedError where new content is gone that never took its place."""
    for each in done:
        path = os.path.join(folder, each.name)
        if each.old not in (None, each.new) and _identity(path) == each.old:
            raise RefusedError(
                "an interrupted edit of several files cannot be finished: the new content of this one is gone",
                path=path,
                hint=f"to keep the files as they are now, remove the journal: rm {log!r}",
            )


def _plan(file: LocalFile) -> _Plan | None:
    """Return the content of a journal; None where it was cut short, or ckpt did not write it."""
    if file.size < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack(file.read(0, _HEAD.size))
    if magic not in (MAGIC, _BEFORE) or length > _LIMIT or file.size != _HEAD.size + length:
        return None
    raw = file.read(_HEAD.size, length)
    if zlib.crc32(raw) != crc:
        return None
    try:
        plan = _parsed(json.loads(raw), has_identities=magic == MAGIC)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    sources = [each.source for each in plan.replace if each.source is not None]
    folder = os.path.dirname(file.path)
    names = [each.name for each in (*plan.replace, *plan.remove)]
    for name in (*names, *sources):
        if not is_name_below(name, folder):
            raise RefusedError(
                f"a journal would replace {name!r}, which is not a file beside or below it", path=file.path,
                hint=f"remove it: rm {file.path!r}",
            )  # fmt: skip
    return plan


def _parsed(plan: Any, *, has_identities: bool) -> _Plan:
    """The journal's JSON as data; raises ValueError, TypeError or KeyError for anything else."""
    if not has_identities:
        old = [[_Renaming(str(name), None) for name in plan[key]] for key in ("replace", "remove")]
        return _Plan(None, old[0], old[1], None)
    replace = [
        _Renaming(str(each["name"]), _noted(each["old"]), _name(each["from"]), _noted(each["new"]))
        for each in plan["replace"]
    ]
    remove = [_Renaming(str(each["name"]), _noted(each["old"])) for each in plan["remove"]]
    return _Plan(str(plan["first"]), replace, remove, parsed_identity(plan["journal"]))


def _name(value: object) -> str | None:
    """A name that may be absent."""
    return None if value is None else str(value)


def _noted(value: object) -> Identity | None:
    """An identity that may be absent."""
    return None if value is None else parsed_identity(value)
