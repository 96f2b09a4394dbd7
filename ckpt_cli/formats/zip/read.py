"""The records of a zip file: where each one's bytes are, without reading any of them.

Only the end record and the central directory are read to list a file. The structures are in `layout.py`.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from threading import get_ident
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError, UnsupportedError
from ckpt_cli.files.at_once import Ahead, is_elsewhere
from ckpt_cli.files.source import ByteSource, SourceFile
from ckpt_cli.formats.zip.layout import (
    CENTRAL,
    CENTRAL_MAGIC,
    DEFLATED,
    DESCRIBED,
    ENCRYPTED,
    END,
    END64,
    FULL,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR,
    STORED,
    end64_at,
    find_end,
    find_locator,
    local_header_in,
    name_in,
    widened,
)

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

_PIECE = 1 << 20

_WINDOW = 1 << 16
"""Bytes that are read together where records follow each other."""

_BEHIND = 256
"""Bytes behind the least local header in which its padding ends, and a header of numpy begins."""

_HEADER = attrgetter("header")

_STREAMS = 16
"""Threads that each read a compressed record of one file on from where they were."""


class Record:
    """One member: its name, and where its bytes and its two checksums are."""

    __slots__ = ("central", "crc", "flags", "header", "limit", "method", "name", "name_nbytes", "nbytes", "stored")

    def __init__(
        self,
        name: str,
        header: int,
        method: int,
        flags: int,
        crc: int,
        stored: int,
        nbytes: int,
        central: int,
        name_nbytes: int,
    ) -> None:
        self.name = name
        self.header = header
        """The first byte of its local header."""
        self.method = method
        self.flags = flags
        self.crc = crc
        """CRC-32 of the content as the central directory has it; torch may leave it 0."""
        self.stored = stored
        """Bytes it takes in the file."""
        self.nbytes = nbytes
        """Bytes of its content."""
        self.central = central
        """The first byte of its entry in the central directory."""
        self.name_nbytes = name_nbytes
        """Bytes of its name."""
        self.limit = 0
        """The first byte of what follows it in the file: the next record, or the directory."""

    @property
    def least_end(self) -> int:
        """The earliest byte that it can end at: its local header's extra field is not known before that is read."""
        return self.header + LOCAL.size + self.name_nbytes + self.stored


class _Stream:
    """A deflated record, inflated piece by piece."""

    def __init__(self, file: ByteSource, name: str, position: int, end: int) -> None:
        self.name = name
        self.reached = 0
        """Bytes of the content inflated so far."""
        self._file = file
        self._position = position
        self._end = end
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._pending = b""

    def next(self, most: int) -> bytes:
        """Up to `most` bytes of the content, at least one."""
        while True:
            if not self._pending:
                self._pending = self._file.read(self._position, min(_PIECE, self._end - self._position))
                self._position += len(self._pending)
            try:
                piece = self._inflater.decompress(self._pending, most)
            except zlib.error as error:
                raise MalformedError(f"record {self.name!r} does not inflate: {error}", path=self._file.path) from None
            self._pending = self._inflater.unconsumed_tail
            self.reached += len(piece)
            if piece:
                return piece
            if self._inflater.eof or (not self._pending and self._position >= self._end):
                raise TruncatedError(
                    f"record {self.name!r} inflates to {self.reached} bytes only", path=self._file.path
                )


class ZipRecords:
    """The records of one open zip file, or of one that is a part of a file, by name; offsets count from its begin.

    Raises MalformedError, TruncatedError or LimitError for a file that is not a sound zip.
    """

    def __init__(self, file: ByteSource) -> None:
        self.file = file
        self.by_name: dict[str, Record] = {}
        self._in_order: list[Record] = []
        self.directory = (0, 0)
        """The first byte of the central directory, and its size in bytes."""
        self._data: dict[str, int] = {}
        """The first byte of each record's data, for the records whose local headers were read."""
        self._streams: dict[int, _Stream] = {}
        """By thread, the compressed record that it read last, as far as it was read."""
        self._read_directory()
        elsewhere = is_elsewhere(file.whole)
        self._ahead = Ahead(len(self._in_order), self._header_of) if elsewhere else None
        """Fetches local headers of a file elsewhere, where each would cost a request."""

    def _header_of(self, number: int) -> list[tuple[SourceFile, int, int]]:
        """Return the place of the local header of a record, and of the little that may follow it."""
        record = self._in_order[number]
        nbytes = min(record.least_end - record.stored + _BEHIND, record.limit) - record.header
        return [(self.file.whole, self.file.begin + record.header, nbytes)]

    def read(self, name: str, most: int) -> bytes | memoryview:
        """A record's content: mapped where it is plain and over `most` bytes, refused if it would inflate to more."""
        record = self.by_name[name]
        if record.method == STORED:
            get = self.file.read if record.nbytes <= most else self.file.view
            return get(self.data_offset(record), record.nbytes)
        if record.nbytes > most:
            raise LimitError(f"record {name!r} would inflate to {record.nbytes} bytes", path=self.file.path)
        return bytes(self.inflate(record, 0, record.nbytes))

    def data_offset(self, record: Record, *, in_turn: bool = False) -> int:
        """The first byte of a record's data, from its local header; `in_turn` where other records may be next."""
        offset = self._data.get(record.name)
        if offset is None:
            if in_turn and self._ahead is not None:
                self._ahead.ask(bisect_left(self._in_order, record.header, key=_HEADER))
            offset = self._data[record.name] = self._read_local(record)
        return offset

    def contents(self, records: Iterable[Record]) -> Iterator[bytes]:
        """The content of each of some stored records of few bytes; those that follow each other are read together."""
        begin, window = 0, b""
        for record in records:
            at = record.header - begin
            if at < 0 or record.limit - begin > len(window):
                begin, at = record.header, 0
                window = self.file.read(begin, min(max(_WINDOW, record.limit - begin), self.file.size - begin))
            head = LOCAL.unpack_from(window, at)
            name = at + LOCAL.size
            first = name + head[9] + head[10]
            sound = (
                head[0] == LOCAL_MAGIC and head[3] == record.method and begin + first + record.stored <= record.limit
            )
            if not sound or window[name : name + head[9]] != record.name.encode("utf-8", "surrogateescape"):
                self._read_local(record)  # which says what is wrong
            yield window[first : first + record.stored]

    def inflate(self, record: Record, offset: int, nbytes: int) -> bytearray:
        """A range of a compressed record's content; what lies before it is inflated and dropped.

        Ranges that follow each other cost no more than one that spans them.
        """
        if nbytes > limits.INFLATED_AT_ONCE:
            raise LimitError(f"{nbytes} bytes of record {record.name!r} would have to be inflated", path=self.file.path)
        stream = self._streams.get(thread := get_ident())
        if stream is None or stream.name != record.name or stream.reached > offset:
            begin = self.data_offset(record)
            if len(self._streams) >= _STREAMS:
                self._streams.clear()  # of threads that ended, or that begin again
            stream = self._streams[thread] = _Stream(self.file, record.name, begin, begin + record.stored)
        kept = bytearray()
        budget = current()
        while stream.reached < offset + nbytes:
            behind = stream.reached
            piece = stream.next(min(_PIECE, offset + nbytes - behind))
            budget.inflate(len(piece), self.file.path)
            kept += piece[max(offset - behind, 0) :]
        return kept

    def head(self, record: Record, nbytes: int) -> bytes:
        """The first bytes of a compressed record's content, from no more of the file than they can take."""
        stored = self.file.read(self.data_offset(record), min(record.stored, nbytes + _PIECE // 1024))
        try:
            found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, nbytes)
        except zlib.error as error:
            raise MalformedError(f"record {record.name!r} does not inflate: {error}", path=self.file.path) from None
        if len(found) < nbytes:
            raise TruncatedError(f"record {record.name!r} inflates to fewer than {nbytes} bytes", path=self.file.path)
        return found

    def seal(self, overlay: Overlay) -> None:
        """Patch the checksums of every record that the overlay changes, in both places; a 0 stays 0 (not computed)."""
        from ckpt_cli.files import crc32

        terms: dict[str, int] = {}
        file, begin = self.file.whole, self.file.begin
        patches = overlay.patches(file)
        first, last = (
            bisect_left(patches, offset, key=lambda patch: patch.offset) for offset in (begin, begin + self.file.size)
        )
        for patch in patches[first:last]:
            record = self._record_at(patch.offset - begin)
            end = begin + self.data_offset(record) + record.stored
            old, new = overlay.old_bytes(file, patch), overlay.new_bytes(patch)
            terms[record.name] = terms.get(record.name, 0) ^ crc32.change(old, new, end - patch.end)
        for name, term in terms.items():
            record = self.by_name[name]
            if term and record.crc:
                self.patch_crc(overlay, record, record.crc ^ term)

    def patch_crc(self, overlay: Overlay, record: Record, crc: int) -> None:
        """Patch a record's checksum in every place that has it."""
        end = self.data_offset(record) + record.stored
        new = struct.pack("<L", crc)
        old = struct.pack("<L", record.crc)
        file, begin = self.file.whole, self.file.begin
        overlay.write(file, begin + record.central + 16, new)
        if record.flags & DESCRIBED:
            for place in (end + 4, end):  # the descriptor's signature is optional
                if place + 4 <= self.file.size and self.file.read(place, 4) == old:
                    overlay.write(file, begin + place, new)
                    break
        if self.file.read(record.header + 14, 4) == old:
            overlay.write(file, begin + record.header + 14, new)

    @property
    def in_order(self) -> Sequence[Record]:
        """The records in the order in which they stand in the file."""
        return self._in_order

    # --- reading the directory ---------------------------------------------------------------------------------------

    def _read_directory(self) -> None:
        count, size, offset, end = self._find_directory()
        if count > limits.ZIP_RECORDS or size > limits.ZIP_DIRECTORY:
            raise LimitError(f"a zip of {count} records with a directory of {size} bytes", path=self.file.path)
        if offset + size > end:
            raise self._malformed(
                f"its directory is said to be bytes {offset}–{offset + size}, but it must end by {end}"
            )
        directory = self.file.read(offset, size)
        records = list(self._parse(directory, count, offset))
        self.by_name = {record.name: record for record in records}
        if len(self.by_name) < count:
            twice = next(record.name for record in records if self.by_name[record.name] is not record)
            raise self._malformed(f"it has two records called {twice!r}; readers differ in which one they take")
        self.directory = (offset, size)
        self._check_ranges(records, offset)

    def _find_directory(self) -> tuple[int, int, int, int]:
        """Number of records, size and offset of the directory, and where it must have ended."""
        found = find_end(self.file, self.file.size, (END.size + LOCATOR.size + END64.size, END.size + 0xFFFF))
        if found is None:
            raise TruncatedError(
                "it begins as a zip file but has no end record: the write or the download was cut short",
                path=self.file.path,
            )
        if found.disk not in (0, 0xFFFF) or found.start_disk not in (0, 0xFFFF):
            raise self._malformed("it is a part of a zip that spans several disks")
        located = find_locator(self.file, found.position)
        if located is not None:
            locator, at64 = located
            if at64 + END64.size > locator:
                raise self._malformed("its zip64 end record lies beyond its own locator")
            wide = end64_at(self.file, at64)
            if wide is None:
                raise self._malformed("its zip64 end record is not where its locator says")
            return *wide, at64
        if found.offset == FULL or found.size == FULL or found.records == 0xFFFF:
            raise self._malformed("its end record points to a zip64 end record that is not there")
        return found.records, found.size, found.offset, found.position

    def _parse(self, directory: bytes, count: int, base: int) -> Iterator[Record]:
        position = wide = 0
        unpack, fixed = CENTRAL.unpack_from, CENTRAL.size
        for _ in range(count):
            if position + fixed > len(directory):
                raise self._malformed(f"its directory of {count} records ends within one")
            (signature, _, _, flags, method, _, _, crc, stored, nbytes, name_length, extra_length, comment_length,
             disk, _, _, header) = unpack(directory, position)  # fmt: skip
            if signature != CENTRAL_MAGIC:
                raise self._malformed(f"its directory has no record at byte {base + position}")
            after_name = position + fixed + name_length
            name = directory[position + fixed : after_name].decode("utf-8", "surrogateescape")
            if not name.isascii():
                wide += 4 * len(name)
                if wide > limits.ZIP_DIRECTORY:
                    raise LimitError("its records have names of far too many characters", path=self.file.path)
            if nbytes == FULL or stored == FULL or header == FULL:
                extra = directory[after_name : after_name + extra_length]
                nbytes, stored, header, is_complete = widened(extra, nbytes, stored, header)
                if not is_complete:
                    raise self._malformed(f"record {name!r} lacks the zip64 sizes that it points to")
            if method or disk or flags & ENCRYPTED or stored != nbytes:
                self._check_unusual(name, method, disk, flags, stored, nbytes)
            yield Record(name, header, method, flags, crc, stored, nbytes, base + position, name_length)
            position = after_name + extra_length + comment_length
        if position != len(directory):
            fault = "ends within one" if position > len(directory) else "goes on after the last"
            raise self._malformed(f"its directory of {count} records {fault}")

    def _check_unusual(self, name: str, method: int, disk: int, flags: int, stored: int, nbytes: int) -> None:
        """Refuse what torch never writes and its reader does not take."""
        if flags & ENCRYPTED:
            raise UnsupportedError(f"record {name!r} is encrypted", path=self.file.path)
        if method not in (STORED, DEFLATED) or disk not in (0, 0xFFFF):
            raise self._malformed(f"record {name!r} is compressed in a way (method {method}) that torch never writes")
        if method == STORED and stored != nbytes:
            raise self._malformed(f"record {name!r} is stored as {stored} bytes but said to hold {nbytes}")

    def _check_ranges(self, records: list[Record], directory: int) -> None:
        """Every record must end before the next one begins, and the last before the directory."""
        self._in_order = sorted(records, key=_HEADER)
        limit = directory
        for record in reversed(self._in_order):
            if record.header + LOCAL.size + record.name_nbytes + record.stored > limit:
                raise self._malformed(
                    f"record {record.name!r} reaches to byte {record.least_end}, beyond {limit} where the next thing "
                    "begins"
                )
            record.limit = limit
            limit = record.header

    def _read_local(self, record: Record) -> int:
        """Check a record's local header against the directory; its extra length may differ from the central one."""
        head = self.file.read(record.header, record.least_end - record.stored - record.header)
        local = local_header_in(head)
        if local is None or local.method != record.method:
            raise self._malformed(f"record {record.name!r} has another local header than its directory says")
        name = name_in(head[LOCAL.size :])
        if name != record.name or local.name_length != len(head) - LOCAL.size:
            name = name_in(self.file.read(record.header + LOCAL.size, local.name_length))
            raise self._malformed(f"record {record.name!r} is called {name!r} in its local header")
        begin = record.header + local.size
        if begin + record.stored > record.limit:
            raise self._malformed(f"record {record.name!r} reaches into the next one")
        return begin

    def _record_at(self, offset: int) -> Record:
        """The record that the byte lies in, or else the last one before it."""
        return self._in_order[bisect_right(self._in_order, offset, key=lambda record: record.header) - 1]

    def _malformed(self, problem: str) -> MalformedError:
        return MalformedError(f"not a sound zip file: {problem}", path=self.file.path)
