"""Parts of every writer: append the bytes of storages to a new file, and read the file back before it takes its name.

Ranges of old files are copied by the kernel, other bytes are written in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from ckpt_cli.errors import CkptError, FormatError
from ckpt_cli.files.copy import CHUNK, Progress, copy_range, no_progress, write_back
from ckpt_cli.files.fsync import write_all
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.model.changes import Content, difference
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

OpenCopy = Callable[[str], Checkpoint]
"""Opens a new file or folder as a checkpoint; writers are given one, as they stand below what opens any format."""


class Appender:
    """Appends to a file from a byte on; without a file it only measures."""

    def __init__(self, target: LocalFile | None, begin: int = 0) -> None:
        self.target = target
        """None to measure only."""
        self._begin = begin
        self.position = 0
        """The byte that is written next, counted from the begin."""
        self._begun = 0
        """The first byte that the system was not asked to write to the disk yet."""

    def append(self, piece: bytes | memoryview) -> None:
        """Append bytes."""
        if self.target is not None:
            write_all(self.target.fd, piece, self._begin + self.position)
        self.position += len(piece)
        self._note_size()
        if self.position - self._begun >= CHUNK:
            self._write_back()

    def append_range(self, source: SourceFile, offset: int, nbytes: int, progress: Progress = no_progress) -> None:
        """Append a range of a file; holes stay holes."""
        if self.target is not None:
            self._write_back()
            copy_range(source, offset, nbytes, self.target, self._begin + self.position, progress)
        self.position = self._begun = self.position + nbytes

    def append_content(self, content: Content, files: Sequence[SourceFile], progress: Progress = no_progress) -> None:
        """Append the bytes of a storage; `files` are what its extents count."""
        if self.target is None:
            self.position += content.nbytes
            return

        def append(piece: bytes | memoryview) -> None:
            self.append(piece)
            progress(len(piece))

        for extent in content.extents or ():
            self.append_range(files[extent.file], extent.offset, extent.nbytes, progress)
        if content.extents is None and content.make is not None:
            content.make(append)
        self._write_back()

    def _write_back(self) -> None:
        if self.target is not None:
            write_back(self.target.fd, self._begin + self._begun, self.position - self._begun)
        self._begun = self.position

    def _note_size(self) -> None:
        if self.target is not None:
            self.target.size = max(self.target.size, self._begin + self.position)


@contextmanager
def reading_back(path: str, open_copy: OpenCopy) -> Iterator[Checkpoint]:
    """Context manager: open a new checkpoint before it takes its name.

    Raises CkptError for each FormatError, also one that is raised within the block for a difference.
    """
    try:
        with closing(open_copy(path)) as copy:
            yield copy
    except FormatError as error:
        raise not_read_back(error.problem) from None


def not_read_back(problem: str) -> CkptError:
    """The error for a new checkpoint that is not what was meant."""
    return CkptError(f"the new file did not read back as it should, so nothing was replaced: {problem}")


def verify_new(wanted: Sequence[Tensor], path: str, open_copy: OpenCopy, *, in_order: bool = True) -> None:
    """Open a new checkpoint before it takes its name, and compare its tensors with those that were meant.

    Raises CkptError where their names, order, dtypes, shapes or ties are others.
    """
    with reading_back(path, open_copy) as copy:
        fault = difference(wanted, copy.entries)
        if in_order and not fault and [entry.name for entry in copy.entries] != [entry.name for entry in wanted]:
            fault = "its tensors are in another order"
    if fault:
        raise not_read_back(fault)


def open_with_safetensors(path: str) -> None:
    """Open a file with the safetensors library; raises FormatError where it refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as reader:
            reader.keys()
    except SafetensorError as error:
        raise FormatError(f"the safetensors library refuses it: {error}") from None
