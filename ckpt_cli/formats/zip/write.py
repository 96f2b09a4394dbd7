"""Zip files in torch's own layout: stored records whose data is aligned, sizes and checksums behind them.

The layout is that of caffe2/serialize/inline_container.cc (PyTorchStreamWriter) over its miniz: local headers have no
sizes and no CRC, an extra field `FB` pads them so that data begins at a multiple of the alignment, a descriptor follows
the data of every record that is not empty, and the zip64 end record is always there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ckpt_cli.errors import CkptError, UnsupportedError
from ckpt_cli.files.copy import Progress, copy_range, crc_of_range, no_progress
from ckpt_cli.files.source import Extent, LocalFile, SourceFile
from ckpt_cli.files.system import write_all

ALIGNMENT = 64
"""Bytes that the data of a record is aligned to, as torch does by default."""

_FULL = 0xFFFFFFFF
"""What a 32-bit field says when its value is in the zip64 extra; from there on one is needed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the central directory says of a record."""

    name: str
    header: int
    crc: int
    nbytes: int


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
        self._entries: list[Entry] = []

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
        if written >= _FULL > nbytes:
            raise UnsupportedError(f"record {name!r} grew beyond 4 GiB while it was written")
        self._end(name, header, crc, written)

    def copy(
        self, name: str, source: SourceFile, offset: int, nbytes: int, crc: int, progress: Progress = no_progress
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

    def gather(self, files: Sequence[SourceFile], extents: Sequence[Extent], progress: Progress = no_progress) -> None:
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
        return [entry.crc for entry in self._entries]

    def close(self) -> int:
        """Write the central directory and the end records; returns the bytes of the whole zip file."""
        begin = self._position
        for entry in self._entries:
            self._write(central_entry(entry))
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
        self._entries.append(Entry(name, header, crc, nbytes))

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self._target is None:
            self._position += len(view)
            return
        write_all(self._target.fd, view, self._base + self._position)
        self._position += len(view)


def local_header(name: str, nbytes: int, header: int, *, alignment: int = ALIGNMENT, begin: int | None = None) -> bytes:
    """The local header at byte `header` of a record of so many bytes, padded so that its data is aligned.

    With `begin`, it is padded so that the data begins there; raises ValueError where it cannot.
    """
    raw = name.encode("utf-8", "surrogateescape")
    wide = _zip64(nbytes, header, stored=0)  # miniz does not know yet what it will have stored
    start = header + 30 + len(raw) + len(wide) + 4
    pad = -start % alignment if begin is None else begin - start
    if not 0 <= pad <= 0xFFFF - len(wide) - 4:
        raise ValueError(f"a local header cannot be padded with {pad} bytes")
    extra = wide + b"FB" + struct.pack("<H", pad) + b"Z" * pad
    flags = 0x808 if nbytes else 0x800
    return struct.pack("<4s5H3L2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(extra)) + raw + extra


def descriptor(nbytes: int, crc: int, header: int) -> bytes:
    """What follows the data of a record that is not empty: its checksum and sizes."""
    if not nbytes:
        return b""
    form = "<4sLQQ" if _zip64(nbytes, header, stored=nbytes) else "<4s3L"
    return struct.pack(form, b"PK\7\10", crc, nbytes, nbytes)


def end_records(count: int, size: int, begin: int) -> bytes:
    """What follows a directory of `count` entries and `size` bytes that begins at byte `begin`: zip64 always."""
    short = min(count, 0xFFFF)
    return b"".join((
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, begin),
        struct.pack("<4sLQL", b"PK\6\7", 0, begin + size, 1),
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, min(size, _FULL), min(begin, _FULL), 0),
    ))  # fmt: skip


def _zip64(nbytes: int, header: int, *, stored: int) -> bytes:
    """The zip64 extra with those of the sizes and the offset that 32 bits do not hold; empty where they hold all."""
    wide = b""
    if nbytes >= _FULL:
        wide += struct.pack("<QQ", nbytes, stored)
    if header >= _FULL:
        wide += struct.pack("<Q", header)
    return struct.pack("<HH", 1, len(wide)) + wide if wide else b""


def central_entry(entry: Entry) -> bytes:
    """A record's entry in the central directory."""
    name = entry.name.encode("utf-8", "surrogateescape")
    extra = _zip64(entry.nbytes, entry.header, stored=entry.nbytes)
    size = min(entry.nbytes, _FULL)
    flags = 0x808 if entry.nbytes else 0x800
    fixed = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 0, 0, flags, 0, 0, 0, entry.crc, size, size, len(name), len(extra),
        0, 0, 0, 0, min(entry.header, _FULL),
    )  # fmt: skip
    return fixed + name + extra
