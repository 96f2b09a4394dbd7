"""Write zip files in torch's own layout (`layout.py`): stored records whose data is aligned.

Apart from the reader, which commands that only list need not import this for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from ckpt_cli.errors import CkptError, UnsupportedError
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.copy import Progress, crc_of_range, no_progress
from ckpt_cli.files.source import LocalFile, SourceFile
from ckpt_cli.formats.writing import Appender
from ckpt_cli.formats.zip.layout import (
    ALIGNMENT,
    FULL,
    SmallRecords,
    central_entry,
    descriptor,
    end_records,
    local_header,
)

_SMALL = 1 << 12
"""Bytes from which on a range is left to the kernel: a shorter one, as headers are, is gathered with its neighbours."""

_ENTRIES = 1 << 9
"""Entries of the directory that are made together."""

_GATHERED = 1 << 18
"""Bytes that are gathered before they are written."""

_BESIDE = 4 << 20
"""Bytes from which on it is worth a thread to compute the checksum of a range while it is copied."""

_PIECE = 64 << 20
"""Bytes that are copied, and summed up by a thread, at a time: that is how long an interrupt may have to wait."""


class _Checksum(Thread):
    """Context manager: computes the CRC-32 of a range of a file while the block runs."""

    def __init__(self, source: SourceFile, offset: int, nbytes: int, crc: int) -> None:
        super().__init__(name="ckpt-checksum", daemon=True)
        self._range = source, offset, nbytes, crc
        self._crc = 0
        self._error: Exception | None = None

    def run(self) -> None:
        """Compute it."""
        try:
            self._crc = crc_of_range(*self._range)
        except Exception as error:
            self._error = error

    def result(self) -> int:
        """Return it after the block; raises what reading the file raised."""
        if self._error is not None:
            raise self._error
        return self._crc

    def __enter__(self) -> _Checksum:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()


class ZipWriter(Appender):
    """Writes records one after another at the end of a file; `close` writes the directory.

    Where the file is not empty, offsets count from where the zip file begins: it is one of several, back to back.
    """

    def __init__(self, target: LocalFile | None, alignment: int = ALIGNMENT, base: int = 0) -> None:
        super().__init__(target, base)
        self._alignment = alignment
        self._crc = 0
        """The CRC-32 of what the record that is being written has so far."""
        self._entries: list[tuple[str, int, int, int]] = []
        """Name, local header, CRC-32 and bytes of each record."""
        self._small = SmallRecords(alignment)
        self._gathered = bytearray()
        """The last bytes before `position`, which are still to be written."""

    def add(self, name: str, content: bytes) -> None:
        """Write a record with this content."""
        self.stream(name, len(content), lambda write: write(content))

    def stream(self, name: str, nbytes: int, produce: Callable[[Callable[[bytes | memoryview], None]], object]) -> None:
        """Write a record of about `nbytes` bytes that `produce` writes with the function that it is given.

        Raises UnsupportedError where `nbytes` was said to be less than 4 GiB and it came to more.
        """
        header = self._start(name, nbytes)
        begin = self.position
        if self.target is None and nbytes > 1:
            self.position += nbytes
        else:
            produce(self.append)
        written = self.position - begin
        if written >= FULL > nbytes:
            raise UnsupportedError(f"record {name!r} grew beyond 4 GiB while it was written")
        self._finish(name, header, self._crc, written)

    def copy(
        self, name: str, source: SourceFile, offset: int, nbytes: int, crc: int, progress: Progress = no_progress
    ) -> None:
        """Write a record with the bytes of a range of a file, whose CRC-32 is known (or 0, as torch may leave it)."""
        header = self._start(name, nbytes)
        self._append_range(source, offset, nbytes, progress)
        self._finish(name, header, crc, nbytes)

    def add_small(self, name: str, content: bytes, crc: int) -> None:
        """Write a record of few bytes whose CRC-32 is known (or 0, as torch may leave it)."""
        header = self.position
        whole = self._small.whole(name.encode("utf-8", "surrogateescape"), content, crc, header)
        if whole is None:
            self._start(name, len(content))
            self._gather(content)
            self._finish(name, header, crc, len(content))
        else:
            self._gather(whole)
            self._entries.append((name, header, crc, len(content)))

    @contextmanager
    def record(self, name: str, nbytes: int) -> Iterator[None]:
        """Context manager: write a record of `nbytes` bytes, which are appended within the block."""
        header = self._start(name, nbytes)
        begin = self.position
        yield
        if self.position - begin != nbytes:
            raise CkptError(f"record {name!r} came to {self.position - begin} bytes rather than {nbytes}")
        self._finish(name, header, self._crc, nbytes)

    def append(self, piece: bytes | bytearray | memoryview) -> None:
        """Append bytes to the record that is being written."""
        self._crc = zlib.crc32(piece, self._crc)
        self._gather(piece)

    def append_range(self, source: SourceFile, offset: int, nbytes: int, progress: Progress = no_progress) -> None:
        """Append a range of a file to it; holes stay holes. The checksum of a long one is computed beside the copy."""
        if self.target is None or nbytes < _BESIDE or is_elsewhere(source):
            self._append_range(source, offset, nbytes, progress)
            if self.target is not None:
                if is_elsewhere(source) and nbytes >= _SMALL:  # what was written is near
                    source, offset = self.target, self._begin + self.position - nbytes
                self._crc = crc_of_range(source, offset, nbytes, self._crc)
            return
        for begin in range(offset, offset + nbytes, _PIECE):
            size = min(_PIECE, offset + nbytes - begin)
            with _Checksum(source, begin, size, self._crc) as checksum:
                self._append_range(source, begin, size, progress)
            self._crc = checksum.result()

    @property
    def checksums(self) -> list[int]:
        """The CRC-32 of every record so far."""
        return [crc for _, _, crc, _ in self._entries]

    def close(self) -> int:
        """Write the central directory and the end records; returns the bytes of the whole zip file."""
        begin = self.position
        for at in range(0, len(self._entries), _ENTRIES):
            self._gather(b"".join(central_entry(*entry) for entry in self._entries[at : at + _ENTRIES]))
        self._gather(end_records(len(self._entries), self.position - begin, begin))
        self._flush()
        return self.position

    def _start(self, name: str, nbytes: int) -> int:
        """Write a local header; returns where it is."""
        header = self.position
        self._gather(local_header(name, nbytes, header, alignment=self._alignment))
        self._crc = 0
        return header

    def _finish(self, name: str, header: int, crc: int, nbytes: int) -> None:
        """Write the descriptor, and note the record for the directory."""
        self._gather(descriptor(nbytes, crc, header))
        self._entries.append((name, header, crc, nbytes))

    def _append_range(self, source: SourceFile, offset: int, nbytes: int, progress: Progress) -> None:
        """Append a range of a file without computing its checksum."""
        if nbytes < _SMALL and self.target is not None:
            self._gather(source.read(offset, nbytes))
            progress(nbytes)
        else:
            self._flush()
            super().append_range(source, offset, nbytes, progress)

    def _gather(self, piece: bytes | bytearray | memoryview) -> None:
        """Append bytes, which are written later if they are few."""
        if self.target is None:
            self.position += len(piece)
        elif len(piece) < _GATHERED:
            self._gathered += piece
            self.position += len(piece)
            if len(self._gathered) >= _GATHERED:
                self._flush()
        else:
            self._flush()
            super().append(piece)

    def _flush(self) -> None:
        """Write what is gathered."""
        if self._gathered:
            gathered, self._gathered = self._gathered, bytearray()
            self.position -= len(gathered)
            super().append(memoryview(gathered))
