"""Rewrite a torch zip file: records in torch's order and layout, storages renumbered as torch numbers them.

With `.format_version` among its records torch computes where storages are (torch/serialization.py,
`_get_offset`) instead of looking: so the layout is exactly torch's, and storages are numbered in the order in which
the pickle reaches them.

Where names alone change, the pickle is replaced in place, so that no storage has to move. torch reads where the first
storage is and computes the others from there, so a longer padding before the first one changes nothing for it. Every
record is found through the directory, so the pickle may as well be the last one. Where it was, a record of zeros is
then, for a zip file has no holes.
"""

from __future__ import annotations

import struct
import zlib

from ckpt_cli import limits
from ckpt_cli.errors import MalformedError, UnsupportedError, quoted
from ckpt_cli.files import crc32
from ckpt_cli.files.copy import PIECE, Progress, no_progress
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.torch_zip.read import NAME
from ckpt_cli.formats.writing import OpenCopy, announced, reading_back
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.layout import (
    ALIGNMENT,
    END,
    STORED,
    SmallRecords,
    central_entry,
    descriptor,
    end_records,
    local_header,
)
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.changes import Changes, Content, Write
from ckpt_cli.model.checkpoint import Checkpoint, Container, Storage, Tensor
from ckpt_cli.pickles.edit.rewrite import EditedPickle
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.references import rekey

_AT_ONCE = 1 << 10
"""Records of few bytes that are copied together."""


class Rewriting:
    """A torch zip file about to be rewritten with some changes; nothing is written before `write`."""

    def __init__(self, checkpoint: Checkpoint, changes: Changes, open_copy: OpenCopy) -> None:
        container, graph = checkpoint.container, checkpoint.document
        if not isinstance(container, ZipStorages) or not isinstance(graph, Graph):
            raise UnsupportedError(f"a checkpoint of format {checkpoint.format} cannot be written as a torch zip file")
        self._records = container.records
        self._prefix = prefix_of(self._records)
        self._source = container.files[0]
        finder = SavedPickle(container, self._records, self._prefix)
        made = (*changes.tensors.values(), *changes.new_tensors.values())
        if finder.big_endian and any(_is_swapped(tensor, changes) for tensor in made):
            raise UnsupportedError(
                "the file is big-endian, and its new values would be little-endian",
                path=checkpoint.path,
                hint=f"ckpt convert {quoted(checkpoint.path)} OUT.pt writes it in the usual order",
            )
        self._edited = EditedPickle(graph, finder, finder.place(), checkpoint.entries, changes)
        self._changes = changes
        self._open_copy = open_copy
        self._contents = changes.contents
        self._renumbered = False
        """True if a storage gets another key than it has."""
        self._storages = self._number()

    def _number(self) -> list[Storage]:
        """Give the storages that the new pickle refers to keys from 0, in the order in which it reaches them."""
        numbers: dict[Storage, str] = {}
        ordered: list[Storage] = []
        for reference, key, storage in self._edited.references():
            if storage not in numbers:
                numbers[storage] = str(len(numbers))
                ordered.append(storage)
            if key != numbers[storage]:
                rekey(reference, numbers[storage])
                self._renumbered = True
        return ordered

    def patch(self, overlay: Overlay) -> bool:
        """Put the edit into the overlay if only the pickle changes, and it may stay or go to the file's end."""
        if not self._changes.only_names_and_metadata or self._renumbered:
            return False
        pickle = self._edited.verified(LONGEST)
        return pickle is not None and replace_pickle(self._records, f"{self._prefix}data.pkl", pickle, overlay)

    @property
    def nbytes(self) -> int:
        """The bytes of a new file."""
        return self._write(ZipWriter(None, self._alignment()), no_progress)

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write all records in torch's order: the pickle, the small ones, the storages, and the rest."""
        self._write(ZipWriter(target, self._alignment()), progress)

    def _write(self, writer: ZipWriter, progress: Progress) -> int:
        prefix = f"{self._prefix}data/"
        pending = True
        names = self._records.by_name
        last_note = f"{self._prefix}byteorder"
        for name, record in names.items():
            if name == f"{self._prefix}data.pkl":
                writer.stream(name, 1, self._edited.write)
                pending_now = pending and last_note not in names
            elif name.startswith(prefix):
                pending_now = pending
            elif name == f"{self._prefix}{ROOM}":  # a whole file needs none
                pending_now = False
            else:
                self._copy(writer, name, record, progress)
                pending_now = pending and name == last_note
            if pending_now:
                self._write_storages(writer, prefix, progress)
                pending = False
        return writer.close()

    def verify(self, path: str) -> None:
        """Read the new file back, and compare its pickle with the one that was meant."""
        with reading_back(path, self._open_copy) as copy:
            if not isinstance(copy.document, Graph) or copy.format != NAME:
                raise MalformedError("it is not a torch zip file")
            self._edited.verify(copy.document, copy.entries)

    def _alignment(self) -> int:
        name = f"{self._prefix}.storage_alignment"
        if name not in self._records.by_name:
            return ALIGNMENT
        text = bytes(self._records.read(name, limits.ZIP_NOTE_RECORD))
        number = int(text) if text.isdigit() and len(text) < 6 else ALIGNMENT
        return number if number and not number & (number - 1) else ALIGNMENT

    def _write_storages(self, writer: ZipWriter, prefix: str, progress: Progress) -> None:
        """The storages that are referred to, then the records that never were, unless the edit is to save room."""
        small: list[tuple[str, Record]] = []
        contents = [self._contents.get(storage, storage) for storage in self._storages]
        for number, found in enumerate(contents if writer.target is None else announced(contents)):
            storage, content = self._storages[number], found if isinstance(found, Content) else None
            name = f"{prefix}{number}"
            record = None
            if content is None or content.origin is not None:
                record = self._record(content.origin if content and content.origin else storage)
                if record.method == STORED and record.limit - record.header <= SmallRecords.MOST:
                    small.append((name, record))
                    if len(small) < _AT_ONCE:
                        continue
                    record = None
            self._copy_small(writer, small, progress)
            if record is not None:
                self._copy(writer, name, record, progress)
            elif content is not None and content.origin is None:
                with writer.record(name, content.nbytes):
                    writer.append_contents((content,), progress)
        self._copy_small(writer, small, progress)
        if self._changes.rewrite:
            return
        number = len(self._storages)
        for name, record in self._records.by_name.items():
            if name.startswith(prefix) and name.removeprefix(prefix) not in self._edited.old_keys:
                self._copy(writer, f"{prefix}{number}", record, progress)
                number += 1

    def _copy_small(self, writer: ZipWriter, small: list[tuple[str, Record]], progress: Progress) -> None:
        """Write old records of few bytes under new names, with the checksums that they have, and clear the list."""
        records = [record for _, record in small]
        contents = self._records.contents(records) if writer.target else (bytes(record.nbytes) for record in records)
        for (name, record), content in zip(small, contents, strict=True):
            writer.add_small(name, content, record.crc)
        progress(sum(record.nbytes for record in records))
        small.clear()

    def _record(self, storage: Storage) -> Record:
        record: Record = self._records.by_name[f"{self._prefix}data/{storage.key}"]
        return record

    def _copy(self, writer: ZipWriter, name: str, record: Record, progress: Progress) -> None:
        """An old record under a name that may be new, with the checksum that it has."""
        if record.method == STORED:
            offset = self._records.data_offset(record, in_turn=True)
            writer.copy(name, self._source, offset, record.nbytes, record.crc, progress)
            return

        def inflate(write: Write) -> None:
            for begin in range(0, record.nbytes, PIECE):
                write(bytes(self._records.inflate(record, begin, min(PIECE, record.nbytes - begin))))

        writer.stream(name, record.nbytes, inflate)


def _is_swapped(tensor: Tensor, changes: Changes) -> bool:
    """True where new bytes are little-endian and torch would swap them, as it does of typed storages."""
    is_new = tensor.storage in changes.contents and not tensor.big_endian
    swaps = tensor.dtype.storage is not None and tensor.dtype.bits > 8
    return (is_new and swaps) or any(_is_swapped(part, changes) for part in tensor.parts)


# --- another pickle in place: before the first storage, or behind all records ----------------------------------------

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
    file = records.file.whole
    raw = memoryview(overlay.read(file, begin, nbytes))  # all new bytes are held at once, so few copies are made
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
    overlay.replace_end(file, header, b"".join((head, pickle, tail, raw[:at], entry, raw[after:], added, closing)))
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
    zeros = struct.pack(f"{len(head)}s{nbytes}x{len(after)}s", head, after)
    overlay.write(records.file.whole, record.header, zeros)
    return central_entry(room, record.header, crc, nbytes)
