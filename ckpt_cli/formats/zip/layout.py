"""The structures of a zip file and torch's arithmetic over them, once for all who read, write or distrust zip files.

The layout is that of PKWARE's APPNOTE.TXT 6.3.10; what torch writes of it, that of caffe2/serialize/inline_container.cc
(PyTorchStreamWriter) over its miniz: local headers have no sizes and no CRC, an extra field `FB` pads them so that data
begins at a multiple of the alignment, a descriptor follows the data of every record that is not empty, and the zip64
end record is always there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import ByteSource
from ckpt_cli.formats.signatures import ZIP_END, ZIP_RECORD

STORED, DEFLATED = 0, 8
"""Methods: as it is, and deflated."""

ENCRYPTED, DESCRIBED = 0x1, 0x8
"""Flags of a record: its bytes are encrypted; a descriptor follows them."""

FULL = 0xFFFFFFFF
"""The value of a 32-bit field whose value is in the zip64 extra; from there on one is needed."""

ALIGNMENT = 64
"""Bytes that the data of a record is aligned to, as torch does by default."""

LOCAL_MAGIC, END_MAGIC, CENTRAL_MAGIC = ZIP_RECORD, ZIP_END, b"PK\1\2"
_LOCATOR_MAGIC, _END64_MAGIC, _DESCRIPTOR_MAGIC = b"PK\6\7", b"PK\6\6", b"PK\7\10"

END = struct.Struct("<4s4H2LH")  # signature, disks ×2, entries ×2, size, offset, comment length
LOCATOR = struct.Struct("<4sLQL")  # signature, disk, offset of the zip64 end, disks
END64 = struct.Struct("<4sQ2H2L4Q")  # signature, size, versions ×2, disks ×2, entries ×2, size, offset
CENTRAL = struct.Struct("<4s6H3L5H2L")  # …, CRC, stored, nbytes, lengths ×3, disk, attributes ×2, local header
LOCAL = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, CRC, stored, nbytes, lengths ×2
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sLQQ")

LONGEST_DESCRIPTOR = _DESCRIPTOR64.size
"""Bytes of the longest descriptor that may stand between a record's data and the next header."""


class EndRecord(NamedTuple):
    """The end record of a zip file."""

    position: int
    """The byte that it begins at."""
    disk: int
    start_disk: int
    on_disk: int
    records: int
    """The number of records in the directory."""
    size: int
    """Bytes of the directory."""
    offset: int
    """The first byte of the directory, counted from the zip file's begin."""
    comment: int
    """Bytes of the comment that follows."""


class LocalHeader(NamedTuple):
    """The header in front of a record's data."""

    flags: int
    method: int
    crc: int
    stored: int
    nbytes: int
    name_length: int
    extra_length: int

    @property
    def size(self) -> int:
        """Bytes from the header's first to the data's first."""
        return LOCAL.size + self.name_length + self.extra_length


def find_end(source: ByteSource, end: int, reaches: Iterable[int]) -> EndRecord | None:
    """Find the last end record before byte `end`: within the last `reaches[0]` bytes, else the last `reaches[1]`…"""
    for most in reaches:
        reach = min(most, end)
        tail = source.read(end - reach, reach)
        at = tail.rfind(END_MAGIC, 0, max(len(tail) - END.size + 4, 0))
        if at >= 0:
            return EndRecord(end - reach + at, *END.unpack_from(tail, at)[1:])
    return None


def find_locator(source: ByteSource, end: int) -> tuple[int, int] | None:
    """Return the byte of the zip64 locator before an end record, and that of the zip64 end record as it says."""
    at = end - LOCATOR.size
    if at < 0:
        return None
    signature, _, at64, _ = LOCATOR.unpack(source.read(at, LOCATOR.size))
    return (at, at64) if signature == _LOCATOR_MAGIC else None


def end64_at(source: ByteSource, at: int) -> tuple[int, int, int] | None:
    """Count, size and offset of the directory by the zip64 end record at byte `at`; None where none begins there."""
    if not 0 <= at <= source.size - END64.size:
        return None
    fields = END64.unpack(source.read(at, END64.size))
    return fields[7:10] if fields[0] == _END64_MAGIC else None


def widened(extra: bytes, nbytes: int, stored: int, header: int) -> tuple[int, int, int, bool]:
    """The three fields, each that is full taken from the zip64 extra (id 1), and True if none of these is missing."""
    fields, missing = [nbytes, stored, header], [nbytes, stored, header].count(FULL)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - position - 4) // 8}Q", extra, position + 4))
            missing -= min(len(wide), missing)
            fields = [wide.pop(0) if field == FULL and wide else field for field in fields]
            break
        position += 4 + length
    return fields[0], fields[1], fields[2], not missing


def local_header_in(data: bytes, at: int = 0) -> LocalHeader | None:
    """The local header that begins at a byte of some data; None where none does."""
    signature, _, flags, method, _, _, *rest = LOCAL.unpack_from(data, at)
    return LocalHeader(flags, method, *rest) if signature == LOCAL_MAGIC else None


def name_in(raw: bytes) -> str:
    """A record's name, whatever its bytes are."""
    return raw.decode("utf-8", "surrogateescape")


# --- what torch writes ------------------------------------------------------------------------------------------------


def local_header(name: str, nbytes: int, header: int, *, alignment: int = ALIGNMENT, begin: int | None = None) -> bytes:
    """The local header at byte `header` of a record of `nbytes` bytes, padded so that its data is aligned.

    With `begin`, it is padded so that the data begins there; raises ValueError where it cannot.
    """
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > 0xFFFF:
        raise UnsupportedError(f"a zip file has no room for a name of {len(raw)} bytes: {0xFFFF} is the most")
    wide = _zip64(nbytes, header, stored=0)  # miniz does not know yet what it will have stored
    start = header + LOCAL.size + len(raw) + len(wide) + 4
    pad = -start % alignment if begin is None else begin - start
    if not 0 <= pad <= 0xFFFF - len(wide) - 4:
        raise ValueError(f"a local header cannot be padded with {pad} bytes")
    extra = wide + b"FB" + struct.pack("<H", pad) + b"Z" * pad
    return LOCAL.pack(LOCAL_MAGIC, 0, _flags(nbytes), 0, 0, 0, 0, 0, 0, len(raw), len(extra)) + raw + extra


class SmallRecords:
    """Makes records of few bytes as `local_header` and `descriptor` do, the parts that many have in common once."""

    MOST = 1 << 12
    """Bytes of the longest one."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._heads: dict[tuple[int, int, bool], tuple[bytes, bytes]] = {}
        """What stands before the name and after it, by the name's length, the padding and whether there is data."""

    def whole(self, raw: bytes, content: bytes, crc: int, header: int) -> bytes | None:
        """Return a record with the encoded name `raw`; None for one that needs wider fields."""
        nbytes = len(content)
        if nbytes > self.MOST or header >= FULL - nbytes:
            return None
        pad = -(header + LOCAL.size + len(raw) + 4) % self._alignment
        key = len(raw), pad, nbytes > 0
        parts = self._heads.get(key)
        if parts is None:
            full = local_header("_" * len(raw), nbytes, header, alignment=self._alignment)
            parts = self._heads[key] = full[: LOCAL.size], full[LOCAL.size + len(raw) :]
        end = _DESCRIPTOR.pack(_DESCRIPTOR_MAGIC, crc, nbytes, nbytes) if nbytes else b""
        return parts[0] + raw + parts[1] + content + end


def descriptor(nbytes: int, crc: int, header: int) -> bytes:
    """Return the descriptor after the data of a record that is not empty: its checksum and sizes."""
    if not nbytes:
        return b""
    form = _DESCRIPTOR64 if _zip64(nbytes, header, stored=nbytes) else _DESCRIPTOR
    return form.pack(_DESCRIPTOR_MAGIC, crc, nbytes, nbytes)


def central_entry(name: str, header: int, crc: int, nbytes: int) -> bytes:
    """The entry in the central directory of a record whose local header is at byte `header`."""
    raw = name.encode("utf-8", "surrogateescape")
    extra, size = b"", nbytes
    if nbytes >= FULL or header >= FULL:
        extra, size, header = _zip64(nbytes, header, stored=nbytes), min(nbytes, FULL), min(header, FULL)
    fixed = CENTRAL.pack(
        CENTRAL_MAGIC, 0, 0, _flags(nbytes), 0, 0, 0, crc, size, size, len(raw), len(extra), 0, 0, 0, 0, header
    )
    return fixed + raw + extra


def end_records(count: int, size: int, begin: int) -> bytes:
    """Return the end records after a directory of `count` entries and `size` bytes at byte `begin`: zip64 always."""
    short = min(count, 0xFFFF)
    return b"".join((
        END64.pack(_END64_MAGIC, 44, 0x031E, 45, 0, 0, count, count, size, begin),
        LOCATOR.pack(_LOCATOR_MAGIC, 0, begin + size, 1),
        END.pack(END_MAGIC, 0, 0, short, short, min(size, FULL), min(begin, FULL), 0),
    ))  # fmt: skip


def _flags(nbytes: int) -> int:
    """Names are UTF-8; a descriptor follows the data where there is some."""
    return 0x800 | (DESCRIBED if nbytes else 0)


def _zip64(nbytes: int, header: int, *, stored: int) -> bytes:
    """The zip64 extra with those of the sizes and the offset that 32 bits do not hold; empty where they hold all."""
    wide = b""
    if nbytes >= FULL:
        wide += struct.pack("<QQ", nbytes, stored)
    if header >= FULL:
        wide += struct.pack("<Q", header)
    return struct.pack("<HH", 1, len(wide)) + wide if wide else b""


def computed_offsets(
    first: int, header: int, storages: Iterable[tuple[str, int]], alignment: int
) -> Iterator[tuple[str, int]]:
    """Each record's name with the first byte of its data as torch computes it, without looking at local headers.

    With a `.format_version` record, torch computes offsets for `map_location="meta"`, for fake tensors and under
    `torch.utils.serialization.config.load.calculate_storage_offsets` (torch/serialization.py `_get_offset`); the
    arithmetic is that of inline_container.cc `getPadding` and `getRecordOffsetNoRead`.

    `storages` are names of records and their bytes in the order of the pickle; the data of the first is at byte
    `first`, its local header at byte `header`.
    """
    cursor = first
    for number, (name, nbytes) in enumerate(storages):
        begin = header if number == 0 else cursor
        data = first if number == 0 else _data_after(cursor, len(name.encode()), nbytes, alignment)
        yield name, data
        cursor = data + nbytes
        if nbytes:
            cursor += (_DESCRIPTOR64 if begin >= FULL or nbytes >= FULL else _DESCRIPTOR).size


def _data_after(cursor: int, name: int, nbytes: int, alignment: int) -> int:
    """The first byte of the data of a record whose local header begins at `cursor`."""
    start = cursor + LOCAL.size + name + 4
    if nbytes >= FULL or cursor >= FULL:
        start += 4 + 16 * (nbytes >= FULL) + 8 * (cursor >= FULL)
    return -(-start // alignment) * alignment
