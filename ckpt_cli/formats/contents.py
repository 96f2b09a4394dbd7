"""Write the bytes of storages to a new file, in any format: ranges of old files by the kernel, other bytes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli.files.copy import CHUNK, Progress, copy_range, no_progress, write_back
from ckpt_cli.files.fsync import write_all
from ckpt_cli.files.source import LocalFile

if TYPE_CHECKING:
    from ckpt_cli.model.changes import Content


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

    def append_range(self, source: LocalFile, offset: int, nbytes: int, progress: Progress = no_progress) -> None:
        """Append a range of a file; holes stay holes."""
        if self.target is not None:
            self._write_back()
            copy_range(source, offset, nbytes, self.target, self._begin + self.position, progress)
        self.position = self._begun = self.position + nbytes

    def append_content(self, content: Content, files: Sequence[LocalFile], progress: Progress = no_progress) -> None:
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
