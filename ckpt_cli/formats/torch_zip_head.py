"""A torch zip file with another pickle in the room before its first storage, so that no storage has to move.

torch reads where the first storage is and computes the others from there (torch/serialization.py, `_get_offset`), so a
longer padding before the first one changes nothing for it.
"""

from __future__ import annotations

import struct
import zlib

from ckpt_cli.files.overlay import Overlay
from ckpt_cli.formats.zip_records import STORED, Record, ZipRecords
from ckpt_cli.formats.zip_writer import descriptor, local_header

LONGEST = 64 << 20
"""Bytes of a beginning that is patched through a journal; a longer one is written with the whole file."""


def replace_pickle(records: ZipRecords, name: str, pickle: bytes, overlay: Overlay) -> bool:
    """Put another pickle into the overlay if it fits before the first storage; checksums and directory included.

    The records before that one move, and its padding takes up the difference. False where it does not fit, or where the
    file is laid out in another way than torch's.
    """
    in_order = list(records.in_order)
    folder = name.removesuffix(".pkl") + "/"
    first = next((place for place, record in enumerate(in_order) if record.name.startswith(folder)), 0)
    head, storage = in_order[:first], in_order[first]
    if not head or records.file.begin or any(record.method != STORED for record in in_order[: first + 1]):
        return False
    begin = records.data_offset(storage)
    if begin > LONGEST or name not in {record.name for record in head}:
        return False
    written = bytearray()
    moved: list[tuple[Record, int, bytes]] = []
    for record in head:
        content = pickle if record.name == name else bytes(records.read(record.name, record.nbytes))
        moved.append((record, len(written), content))
        written += local_header(record.name, len(content), len(written))
        written += content + descriptor(len(content), _crc(record, name, content), moved[-1][1])
    try:
        last = local_header(storage.name, storage.nbytes, len(written), begin=begin)
    except ValueError:
        return False
    overlay.write(0, 0, bytes(written + last))
    for record, header, content in moved:
        overlay.write(
            0, record.central + 16, struct.pack("<3L", _crc(record, name, content), len(content), len(content))
        )
        overlay.write(0, record.central + 42, struct.pack("<L", header))
    overlay.write(0, storage.central + 42, struct.pack("<L", len(written)))
    return True


def _crc(record: Record, name: str, content: bytes) -> int:
    """A record's checksum; one that was not computed stays so."""
    return zlib.crc32(content) if record.name == name and (record.crc or not record.nbytes) else record.crc
