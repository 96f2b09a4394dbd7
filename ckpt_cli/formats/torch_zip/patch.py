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
    file = records.file.whole
    overlay.write(file, 0, bytes(written + last))
    for record, header, content in moved:
        overlay.write(
            file, record.central + 16, struct.pack("<3L", _crc(record, name, content), len(content), len(content))
        )
        overlay.write(file, record.central + 42, struct.pack("<L", header))
    overlay.write(file, storage.central + 42, struct.pack("<L", len(written)))
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
    entries = _directory(records, overlay)
    header = begin
    if records.in_order[-1] is record:
        header = record.header
    elif room in entries or not _leave_room(records, record, room, entries, overlay):
        return False
    crc = _crc(record, name, pickle)
    written = local_header(name, len(pickle), header) + pickle + descriptor(len(pickle), crc, header)
    entries[name] = central_entry(name, header, crc, len(pickle))
    directory = b"".join(entries.values())
    begin = header + len(written)
    written += directory + end_records(len(entries), len(directory), begin)
    overlay.replace_end(records.file.whole, header, written)
    return True


def _directory(records: ZipRecords, overlay: Overlay) -> dict[str, bytes]:
    """Return the entry of each record in the central directory, with the checksums that change."""
    begin, nbytes = records.directory
    raw = overlay.read(records.file.whole, begin, nbytes)
    ends = [record.central - begin for record in records.by_name.values()][1:]
    return {
        record.name: raw[record.central - begin : end]
        for record, end in zip(records.by_name.values(), (*ends, nbytes), strict=True)
    }


def _leave_room(records: ZipRecords, record: Record, room: str, entries: dict[str, bytes], overlay: Overlay) -> bool:
    """Put a record of zeros in the place of one that goes elsewhere; False where that is too little for one."""
    end = min(other.header for other in records.in_order if other.header > record.header)
    taken = len(local_header(room, 1, record.header, alignment=1)) + len(descriptor(1, 0, record.header))
    nbytes = end - record.header - taken
    if nbytes < 1 or end > LONGEST:
        return False
    crc = crc32.of_zeros(nbytes)
    head = local_header(room, nbytes, record.header, alignment=1)
    zeros = head + bytes(nbytes) + descriptor(nbytes, crc, record.header)
    overlay.write(records.file.whole, record.header, zeros)
    entries[room] = central_entry(room, record.header, crc, nbytes)
    return True
