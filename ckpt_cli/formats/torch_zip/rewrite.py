"""Rewrite a torch zip file: records in torch's order and layout, storages renumbered as torch numbers them.

With `.format_version` among its records torch computes where storages are (torch/serialization.py,
`_get_offset`) instead of looking: so the layout is exactly torch's, and storages are numbered in the order in which
the pickle reaches them.
"""

from __future__ import annotations

from ckpt_cli import limits
from ckpt_cli.errors import MalformedError, UnsupportedError, quoted
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.torch_zip.patch import LONGEST, ROOM, replace_pickle
from ckpt_cli.formats.torch_zip.read import NAME
from ckpt_cli.formats.writing import OpenCopy, reading_back
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.layout import ALIGNMENT, STORED, SmallRecords
from ckpt_cli.formats.zip.read import Record
from ckpt_cli.formats.zip.write import ZipWriter
from ckpt_cli.model.changes import Changes, Write
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.pickles.edit.rewrite import EditedPickle
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.references import rekey

_AT_ONCE = 1 << 10
"""Records of few bytes that are copied together."""

_PIECE = 8 << 20
"""Bytes of a compressed storage that are inflated at a time."""


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
        for number, storage in enumerate(self._storages):
            content = self._contents.get(storage)
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
                    writer.append_contents((content,), (self._source,), progress)
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
            offset = self._records.data_offset(record)
            writer.copy(name, self._source, offset, record.nbytes, record.crc, progress)
            return

        def inflate(write: Write) -> None:
            for begin in range(0, record.nbytes, _PIECE):
                write(bytes(self._records.inflate(record, begin, min(_PIECE, record.nbytes - begin))))

        writer.stream(name, record.nbytes, inflate)


def _is_swapped(tensor: Tensor, changes: Changes) -> bool:
    """True where new bytes are little-endian and torch would swap them, as it does of typed storages."""
    is_new = tensor.storage in changes.contents and not tensor.big_endian
    swaps = tensor.dtype.storage is not None and tensor.dtype.bits > 8
    return (is_new and swaps) or any(_is_swapped(part, changes) for part in tensor.parts)
