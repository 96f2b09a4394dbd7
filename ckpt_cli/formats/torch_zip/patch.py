"""A torch zip file with another pickle, so that no storage has to move: before the first of them, or behind all.

torch reads where the first storage is and computes the others from there (torch/serialization.py, `_get_offset`), so a
longer padding before the first one changes nothing for it. Every record is found through the directory, so the pickle
may as well be the last one. Where it was, a record of zeros is then, for a zip file has no holes.
"""

from __future__ import annotations

import struct
import zlib

from ckpt_cli.files import crc32
from ckpt_cli.files.patches import Overlay
from ckpt_cli.formats.zip.container import ZipStorages
from ckpt_cli.formats.zip.layout import END, STORED, central_entry, descriptor, end_records, local_header
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.model.checkpoint import Container

ROOM = ".ckpt_room"
"""The name, after the archive's own, of the record that takes the place of a pickle that moved."""

LONGEST = 64 << 20
"""Bytes of a beginning that is patched through a journal; a longer one is written with the whole file."""


def has_room(container: Container) -> bool:
    """True if an edit in place left a record of zeros behind."""
    return isinstance(container, ZipStorages) and any(name.endswith(f"/{ROOM}") for name in container.records.by_name)


def replace_pickle(records: ZipRecords, name: str, pickle: bytes, overlay: Overlay) -> bool:
    """Put another pickle, in the record `name`, into the overlay; checksums and directory included.

    False where the file is laid out in another way than torch's.
    """
    if records.file.begin or records.by_name[name].method != STORED:
        return False
    return _put_before_storages(records, name, pickle, overlay) or _put_last(records, name, pickle, overlay)


def _put_before_storages(records: ZipRecords, name: str, pickle: bytes, overlay: Overlay) -> bool:
    """Put the pickle where it is if it fits before the first storage.

    The records before that one move, and its padding takes up the difference.
    """
    in_order = list(records.in_order)
    folder = name.removesuffix(".pkl") + "/"
    first = next((place for place, record in enumerate(in_order) if record.name.startswith(folder)), 0)
    head, storage = in_order[:first], in_order[first]
    if not head or any(record.method != STORED for record in in_order[: first + 1]):
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


def _put_last(records: ZipRecords, name: str, pickle: bytes, overlay: Overlay) -> bool:
    """Put the pickle behind all other records, where it may be already, and a new directory behind it."""
    record, room = records.by_name[name], name.removesuffix("data.pkl") + ROOM
    begin, nbytes = records.directory
    end = records.file.size - begin - nbytes
    if end not in (len(end_records(0, 0, 0)), END.size):
        return False  # there is a comment, or something else
    raw = memoryview(overlay.read(0, begin, nbytes))  # all new bytes are held at once, so few copies of them are made
    at = record.central - begin
    after = min((other.central - begin for other in records.in_order if other.central > record.central), default=nbytes)
    header, added = begin, b""
    if records.in_order[-1] is record:
        header = record.header
    elif room in records.by_name or not (added := _leave_room(records, record, room, overlay)):
        return False
    crc = _crc(record, name, pickle)
    head, tail = local_header(name, len(pickle), header), descriptor(len(pickle), crc, header)
    entry = central_entry(name, header, crc, len(pickle))
    size = at + len(entry) + nbytes - after + len(added)
    begin = header + len(head) + len(pickle) + len(tail)
    closing = end_records(len(records.by_name) + bool(added), size, begin)
    overlay.replace_end(0, header, b"".join((head, pickle, tail, raw[:at], entry, raw[after:], added, closing)))
    return True


def _leave_room(records: ZipRecords, record: Record, room: str, overlay: Overlay) -> bytes:
    """Put a record of zeros in the place of one that goes elsewhere; return its entry in the directory.

    Nothing where the place is too small for a record.
    """
    end = min(other.header for other in records.in_order if other.header > record.header)
    head = local_header(room, 1, record.header, alignment=1)
    tail = len(descriptor(1, 0, record.header))
    nbytes = end - record.header - len(head) - tail
    if nbytes < 1 or end > LONGEST:
        return b""
    crc = crc32.of_zeros(nbytes)
    head = local_header(room, nbytes, record.header, alignment=1)
    after = descriptor(nbytes, crc, record.header)
    overlay.write(0, record.header, struct.pack(f"{len(head)}s{nbytes}x{len(after)}s", head, after))
    return central_entry(room, record.header, crc, nbytes)
