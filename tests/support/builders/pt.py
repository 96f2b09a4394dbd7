"""Torch's zip files, field by field.

`write` makes what torch.save makes, byte for byte; `Record` and `archive` make anything else that a zip could be.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders.pickles import Ops, pickled

STORED, DEFLATED = 0, 8
ALIGNMENT = 64
FULL = 0xFFFFFFFF
"""What a 32-bit field says when its value is in the zip64 extra."""


@dataclass
class Record:
    """One record. A field that is None is written as it should be; any other value is written as it is."""

    name: str | bytes
    content: bytes = b""
    method: int = STORED
    flags: int | None = None
    crc: int | None = None
    """Of the directory and the descriptor."""
    stored: int | None = None
    """Bytes in the file, as the directory says."""
    nbytes: int | None = None
    """Bytes of content, as the directory says."""
    header: int | None = None
    """Where the local header is, as the directory says."""
    described: bool | None = None
    """Whether a descriptor follows the data; by default unless there are none."""
    local_name: str | bytes | None = None
    local_method: int | None = None
    zip64: bool = False
    """Whether the directory has the sizes and the offset in a zip64 extra, as it must for 4 GiB and more."""
    comment: bytes = b""
    data: bytes | None = None
    """What stands in the file, where that is not the content as the method makes it."""


def archive(
    records: Iterable[Record],
    *,
    count: int | None = None,
    directory_size: int | None = None,
    directory_offset: int | None = None,
    end64: bool = True,
    comment: bytes = b"",
    alignment: int = ALIGNMENT,
) -> bytes:
    """A zip file as miniz writes it for torch; numbers given here are written into its end records as they are."""
    body, directory = bytearray(), bytearray()
    written = 0
    for record in records:
        begin = len(body)
        _append(body, record, alignment)
        directory += _entry(record, begin)
        written += 1
    count = written if count is None else count
    size = len(directory) if directory_size is None else directory_size
    offset = len(body) if directory_offset is None else directory_offset
    at64 = len(body) + len(directory)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, min(size, FULL), min(offset, FULL),
                      len(comment)) + comment  # fmt: skip
    if end64:
        wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, offset)
        end = wide + struct.pack("<4sLQL", b"PK\6\7", 0, at64, 1) + end
    return bytes(body + directory + end)


def torch_records(
    root: Any,
    storages: Mapping[str, bytes] | None = None,
    *,
    prefix: str = "archive",
    byteorder: bytes | None = b"little",
    version: bytes | None = b"3\n",
    serialization_id: bytes | None = b"0" * 40,
    layout: bool = True,
) -> list[Record]:
    """The records that torch.save writes, in its order; those that are None are left out.

    `layout` is whether the two records are there by which torch 2.13 notes how it aligned the storages. `root` is a
    pickle, or what `builders.pickles` makes one of.
    """
    pickle = root if isinstance(root, bytes) and not isinstance(root, Ops) else pickled(root)
    contents: list[tuple[str, bytes | None]] = [
        ("data.pkl", pickle),
        (".format_version", b"1" if layout else None),
        (".storage_alignment", b"64" if layout else None),
        ("byteorder", byteorder),
        *((f"data/{key}", content) for key, content in (storages or {}).items()),
        ("version", version),
        (".data/serialization_id", serialization_id),
    ]
    return [Record(f"{prefix}/{name}", content) for name, content in contents if content is not None]


def write(path: Path, root: Any, storages: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """Write what torch.save would; the options are those of `torch_records`."""
    path.write_bytes(archive(torch_records(root, storages, **options)))
    return path


def deflated(content: bytes) -> bytes:
    """A content as a raw deflate stream."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def _append(body: bytearray, record: Record, alignment: int) -> None:
    """A local header, whose CRC and sizes torch leaves 0, the data and the descriptor."""
    name = _raw(record.name if record.local_name is None else record.local_name)
    method = record.method if record.local_method is None else record.local_method
    pad = -(len(body) + 30 + len(name) + 4) % alignment
    extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
    body += struct.pack("<4s5H3L2H", b"PK\3\4", 0, _flags(record), method, 0, 0, 0, 0, 0, len(name), len(extra))
    body += name + extra
    data = _data(record)
    body += data
    if _described(record):
        crc = zlib.crc32(record.content) if record.crc is None else record.crc
        body += struct.pack("<4s3L", b"PK\7\10", crc, len(data), len(record.content))


def _entry(record: Record, begin: int) -> bytes:
    """The record's entry in the central directory."""
    name = _raw(record.name)
    crc = zlib.crc32(record.content) if record.crc is None else record.crc
    stored = len(_data(record)) if record.stored is None else record.stored
    nbytes = len(record.content) if record.nbytes is None else record.nbytes
    header = begin if record.header is None else record.header
    extra = b""
    if record.zip64:
        extra = struct.pack("<2H3Q", 1, 24, nbytes, stored, header)
        nbytes = stored = header = FULL
    fields = (0, 0, _flags(record), record.method, 0, 0, crc, stored, nbytes, len(name), len(extra))
    fixed = struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, len(record.comment), 0, 0, 0, header)
    return fixed + name + extra + record.comment


def _data(record: Record) -> bytes:
    if record.data is not None:
        return record.data
    return deflated(record.content) if record.method == DEFLATED else record.content


def _described(record: Record) -> bool:
    return bool(record.content) if record.described is None else record.described


def _flags(record: Record) -> int:
    """UTF-8 names, and whether a descriptor follows."""
    return 0x800 | (8 if _described(record) else 0) if record.flags is None else record.flags


def _raw(name: str | bytes) -> bytes:
    return name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
