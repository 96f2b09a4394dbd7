"""Write zip files in torch's own layout (`layout.py`): stored records whose data is aligned.

Apart from the reader, which commands that only list need not import this for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ckpt_cli.errors import CkptError, UnsupportedError
from ckpt_cli.files.copy import Progress, copy_range, crc_of_range, no_progress
from ckpt_cli.files.fsync import write_all
from ckpt_cli.files.source import Extent, LocalFile
from ckpt_cli.formats.zip.layout import ALIGNMENT, FULL, central_entry, descriptor, end_records, local_header


class ZipWriter:
    """Writes records one after another at the end of a file; `close` writes the directory.

    Where the file is not empty, offsets count from where the zip file begins: it is one of several, back to back.
    """

    def __init__(self, target: LocalFile | None, alignment: int = ALIGNMENT, base: int = 0) -> None:
        self._target = target
        """None to measure only."""
        self._alignment = alignment
        self._base = base
        """The first byte of the zip file within the file."""
        self._position = 0
        """The byte that is written next, counted from the base."""
        self._crc = 0
        """The CRC-32 of what the record that is being written has so far."""
        self._entries: list[tuple[str, int, int, int]] = []
        """Name, local header, CRC-32 and bytes of each record."""

    def add(self, name: str, content: bytes) -> None:
        """A record with this content."""
        self.stream(name, len(content), lambda write: write(content))

    def stream(self, name: str, nbytes: int, produce: Callable[[Callable[[bytes | memoryview], None]], object]) -> None:
        """A record of so many bytes that `produce` writes with the function that it is given.

        Raises UnsupportedError where `nbytes` was said to be less than 4 GiB and it came to more.
        """
        header = self._begin(name, nbytes)
        begin = self._position
        crc = 0

        def write(piece: bytes | memoryview) -> None:
            nonlocal crc
            crc = zlib.crc32(piece, crc)
            self._write(piece)

        if self._target is None and nbytes > 1:
            self._position += nbytes
        else:
            produce(write)
        written = self._position - begin
        if written >= FULL > nbytes:
            raise UnsupportedError(f"record {name!r} grew beyond 4 GiB while it was written")
        self._end(name, header, crc, written)

    def copy(
        self, name: str, source: LocalFile, offset: int, nbytes: int, crc: int, progress: Progress = no_progress
    ) -> None:
        """A record with the bytes of a range of a file, whose CRC-32 is known (or 0, as torch may leave it)."""
        header = self._begin(name, nbytes)
        if self._target is not None:
            copy_range(source, offset, nbytes, self._target, self._base + self._position, progress)
        self._position += nbytes
        self._end(name, header, crc, nbytes)

    @contextmanager
    def record(self, name: str, nbytes: int) -> Iterator[None]:
        """A record of so many bytes, which are put into it within the block."""
        header = self._begin(name, nbytes)
        begin = self._position
        self._crc = 0
        yield
        if self._position - begin != nbytes:
            raise CkptError(f"record {name!r} came to {self._position - begin} bytes rather than {nbytes}")
        self._end(name, header, self._crc, nbytes)

    def put(self, piece: bytes | memoryview) -> None:
        """More bytes of the record that is being written."""
        self._crc = zlib.crc32(piece, self._crc)
        self._write(piece)

    def gather(self, files: Sequence[LocalFile], extents: Sequence[Extent], progress: Progress = no_progress) -> None:
        """More bytes of it, from ranges of files; holes stay holes."""
        for extent in extents:
            source = files[extent.file]
            at = self._base + self._position
            if self._target is not None:
                copy_range(source, extent.offset, extent.nbytes, self._target, at, progress)
                self._crc = crc_of_range(source, extent.offset, extent.nbytes, self._crc)
            self._position += extent.nbytes

    @property
    def only_measures(self) -> bool:
        """Whether nothing is written, so that contents need not be made."""
        return self._target is None

    def skip(self, nbytes: int) -> None:
        """Count bytes of the record that is being measured."""
        self._position += nbytes

    @property
    def checksums(self) -> list[int]:
        """The CRC-32 of every record so far."""
        return [crc for _, _, crc, _ in self._entries]

    def close(self) -> int:
        """Write the central directory and the end records; returns the bytes of the whole zip file."""
        begin = self._position
        for entry in self._entries:
            self._write(central_entry(*entry))
        self._write(end_records(len(self._entries), self._position - begin, begin))
        if self._target is not None:
            self._target.size = self._base + self._position
        return self._position

    def _begin(self, name: str, nbytes: int) -> int:
        """Write a local header; returns where it is."""
        header = self._position
        self._write(local_header(name, nbytes, header, alignment=self._alignment))
        return header

    def _end(self, name: str, header: int, crc: int, nbytes: int) -> None:
        """Write the descriptor, and note the record for the directory."""
        self._write(descriptor(nbytes, crc, header))
        self._entries.append((name, header, crc, nbytes))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self._target is None:
            self._position += len(view)
            return
        write_all(self._target.fd, view, self._base + self._position)
        self._position += len(view)
