"""New files and folders that are written for a place elsewhere, and what they have in common with those on the disk.

Nothing is written piecemeal to a server. Each file is staged: written on this machine in a private folder for temporary
files (`TMPDIR` says where), read back, uploaded as one object, and removed. Of several files, those that say what is in
the others go last, so that no reader finds a checkpoint that is not all there. Where something fails, what was uploaded
is removed again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from ckpt_cli.errors import CkptError, RefusedError, UnsupportedError
from ckpt_cli.files.atomic import creating, replacing_folder
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.elsewhere import current
from ckpt_cli.files.outcome import Outcome, outcome_of, state
from ckpt_cli.files.places import files_below, is_at_server, join, name_of
from ckpt_cli.files.source import LocalFile
from ckpt_cli.files.system import sync_folder

if TYPE_CHECKING:
    from ckpt_cli.remote.folder import RemoteFolder

_PIECE = 8 << 20
"""Bytes that are handed to an upload at a time."""

_LAST = r".*\.index\.json|.*\.metadata"
"""Names of files that say what is in others."""

_READ_ONLY = {
    "http": "write a file here, and upload it",
    "https": "write a file here, and upload it",
    "hf": "write a folder here, then: hf upload OWNER/REPO FOLDER",
}
"""The schemes of servers that ckpt does not write to, each with what helps."""


def refuse_read_only(path: str) -> None:
    """Raise UnsupportedError for an output at a kind of server that ckpt does not write to."""
    scheme = path.partition("://")[0].lower() if is_at_server(path) else ""
    if scheme in _READ_ONLY:
        raise UnsupportedError(f"ckpt does not write to {scheme}://", path=path, hint=_READ_ONLY[scheme])


def require_room(output: str, size: Callable[[], int]) -> None:
    """Raise RefusedError where a file of some bytes, asked for only then, cannot be staged before it goes elsewhere."""
    if not is_at_server(output):
        return
    nbytes = size()
    from shutil import disk_usage
    from tempfile import gettempdir

    free = disk_usage(gettempdir()).free
    if nbytes > free:
        raise RefusedError(
            f"a file of {nbytes:,} bytes is written to {gettempdir()} before it is uploaded, where {free:,} are free",
            path=output,
            hint="TMPDIR=FOLDER names another place; --max-shard makes smaller files",
        )


class NewFolder:
    """A folder on the disk that is being filled; its files stay open until it is left."""

    sends_early = False
    """True if a file that is complete can be released, and is gone then."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._files: dict[str, ExitStack] = {}
        self._folders: set[str] = set()
        """The folders in it that have files."""

    def create(self, name: str, *, mode_of: str) -> LocalFile:
        """Create an empty file, which is made durable when it is closed; its name may lie in a folder in this one."""
        if "/" in name:
            folder = os.path.dirname(join(self.path, name))
            os.makedirs(folder, exist_ok=True)
            self._folders.add(folder)
        stack = ExitStack()
        file = stack.enter_context(creating(join(self.path, name), mode_of=mode_of))
        self._files[name] = stack
        return file

    def close(self, name: str) -> None:
        """Make a file that is complete durable, and close it."""
        stack = self._files.pop(name, None)
        if stack is not None:
            stack.close()

    def release(self, name: str) -> None:
        """Let go of a file that is complete and was read back; it stays where the folder does not send early."""
        self.close(name)

    def __enter__(self) -> NewFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._files:
            self._files.popitem()[1].__exit__(kind, error, trace)
        for folder in self._folders if kind is None else ():
            _sync_to(folder, self.path)


def _sync_to(folder: str, top: str) -> None:
    """Make the names in a folder durable, and those of the folders that it lies in below `top`."""
    while folder not in (top, ""):
        if os.path.isdir(folder):
            sync_folder(folder)
        folder = os.path.dirname(folder)


@contextmanager
def new_folder(target: str, progress: Progress = no_progress) -> Iterator[NewFolder]:
    """Context manager: a folder to fill, which becomes `target` when the block ends well, on the disk or elsewhere.

    `target` must not be there, or be an empty folder.
    """
    if is_at_server(target):
        with replacing_elsewhere(target, None, progress) as folder:
            yield folder
    else:
        with replacing_folder(target) as path:
            yield NewFolder(path)


@contextmanager
def replacing_elsewhere(target: str, stale: re.Pattern[str] | None, progress: Progress) -> Iterator[NewFolder]:
    """Context manager: a folder to fill, whose files go to the folder `target` elsewhere.

    With `stale` its files replace others, and those whose names that matches go; without, there must be none.
    """
    with _staging(target) as path:
        folder = _StagedFolder(path, target, stale, progress)
        try:
            with folder:
                yield folder
            folder.send_rest()
        except BaseException as error:
            folder.take_back()
            state(error, outcome_of(error) or folder.outcome, target)
            raise


@contextmanager
def staged_file(target: str, *, replace: bool, progress: Progress = no_progress) -> Iterator[LocalFile]:
    """Context manager: an empty file to write, which becomes `target` elsewhere when the block ends well."""
    with _staging(target) as path:
        staged = os.path.join(path, os.path.basename(name_of(target)) or "new")
        with LocalFile(staged, write=True, create=True) as file:
            try:
                yield file
                _upload(staged, target, replace=replace, progress=progress)
            except BaseException as error:
                state(error, Outcome.UNCHANGED, target)
                raise


class _StagedFolder(NewFolder):
    """A folder of temporary files that go elsewhere."""

    sends_early = True

    def __init__(self, path: str, target: str, stale: re.Pattern[str] | None, progress: Progress) -> None:
        super().__init__(path)
        self._target = target
        self._stale = stale
        self._progress = progress
        self._there = set(_place(target).names_at(target)) if stale is not None else set()
        """The names that were in the folder before."""
        self._sent: list[str] = []
        self.outcome = Outcome.UNCHANGED

    def release(self, name: str) -> None:
        """Send a file and remove it here, unless it is one of those that go last."""
        if not re.fullmatch(_LAST, name):
            self._send(name)

    def send_rest(self) -> None:
        """Send all files that are there, those that say what is in the others last, and remove what is stale."""
        names = [name for name, _ in files_below(self.path)]
        names.sort(key=lambda name: (bool(re.fullmatch(_LAST, name)), name))
        for name in names:
            self._send(name)
        self.outcome = Outcome.DONE
        for name in sorted(self._there - set(self._sent)):
            if self._stale is not None and self._stale.fullmatch(name):
                _place(self._target).remove(join(self._target, name))

    def take_back(self) -> None:
        """Remove what was sent and was not there before."""
        for name in self._sent if self.outcome is not Outcome.DONE else ():
            if name not in self._there:
                with suppress(CkptError, OSError):
                    _place(self._target).remove(join(self._target, name))

    def _send(self, name: str) -> None:
        self.close(name)
        if name in self._there or (self._there and re.fullmatch(_LAST, name)):
            self._begin_to_replace()
        path = os.path.join(self.path, name)
        self._sent.append(name)  # before it is: an interrupt may come between
        replace = self._stale is not None
        _upload(path, join(self._target, name), replace=replace, progress=self._progress)
        os.unlink(path)

    def _begin_to_replace(self) -> None:
        """Remove what says of the old files what is in them, before the first of them is another one."""
        if self.outcome is Outcome.UNCHANGED:
            self.outcome = Outcome.REPLACING
            for name in sorted(self._there):
                if re.fullmatch(_LAST, name) and self._stale is not None and self._stale.fullmatch(name):
                    _place(self._target).remove(join(self._target, name))


def _place(path: str) -> RemoteFolder:
    return current().servers.place_of(path)


@contextmanager
def _staging(target: str) -> Iterator[str]:
    """Context manager: a private folder for temporary files; errors of the system about it name the place it is in."""
    from tempfile import TemporaryDirectory, gettempdir

    with TemporaryDirectory(prefix=".ckpt-upload-") as path:
        try:
            yield path
        except OSError as error:
            if isinstance(error.filename, str) and error.filename.startswith(path):
                error.filename = gettempdir()
            elif error.filename is None:
                error.filename = target
            raise


def _upload(path: str, target: str, *, replace: bool, progress: Progress) -> None:
    """Upload a file; raises RefusedError where there is one at the target already that is not to be replaced."""
    with LocalFile(path) as file:
        try:
            with _place(target).upload(target, replace=replace, nbytes=file.size) as upload:
                for begin in range(0, file.size, _PIECE):
                    piece = file.read(begin, min(_PIECE, file.size - begin))
                    upload.write(memoryview(piece))
                    progress(len(piece))
                upload.done()
        except FileExistsError:
            raise RefusedError("it is there already", path=target) from None


def passes_over(output: str) -> int:
    """Return how many times the bytes of an output are gone through: once to be written, and once to be uploaded."""
    return 2 if is_at_server(output) else 1


Verifier = Callable[[str], None]
"""Raises CkptError where a file of a name in a new folder does not read back as what it should be."""
