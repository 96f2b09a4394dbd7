"""The storages behind zip files: records, and the records of zip files that are records themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.errors import MalformedError, ShortStorageError, UnsupportedError
from ckpt_cli.files.source import Extent, SourceFile, Window
from ckpt_cli.formats.zip.layout import DEFLATED
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class RecordBytes:
    """The bytes of a storage that is the content of a record, or what follows a header there."""

    __slots__ = ("begin", "key", "record", "records")
    composed = False

    def __init__(self, key: str, records: ZipRecords, record: Record, begin: int = 0) -> None:
        self.key = key
        """The storage's key."""
        self.records = records
        self.record = record
        self.begin = begin
        """The first byte within the record's content."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage; those of a deflated record are inflated up to the range's end."""
        records, first = self.records, self.begin + begin
        if self.record.method == DEFLATED:
            return memoryview(records.inflate(self.record, first, nbytes))
        return records.file.view(records.data_offset(self.record, in_turn=True) + first, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the ranges of the file; raises UnsupportedError where the record is compressed."""
        records, record = self.records, self.record
        if record.method == DEFLATED:
            raise self._refusal()
        at = records.file.begin + records.data_offset(record, in_turn=True) + self.begin + begin
        return [Extent(records.file.whole, at, nbytes)]

    def _refusal(self) -> UnsupportedError:
        """The error for a range of a compressed record, whose bytes stand nowhere plainly."""
        return UnsupportedError(
            f"storage {self.key!r} is compressed, so its bytes cannot be changed in place",
            path=self.records.file.path,
            hint="ckpt convert FILE OUT.pt writes a copy that is not compressed",
        )


class ZipStorages:
    """The container: each storage is one record, of the file's zip or of one within it."""

    def __init__(self, records: ZipRecords) -> None:
        file = records.file
        self.files: Sequence[SourceFile] = (file.whole,)
        self.records = records
        self._inner: list[ZipRecords] = []
        """The zip files that are records."""
        self._named: dict[str, Record] = {}
        """The record that each key means."""

    @property
    def path(self) -> str:
        """The file's path."""
        return self.files[0].path

    def inner(self, name: str) -> ZipRecords:
        """The records of the zip file that is the record `name`; raises UnsupportedError where it is compressed."""
        record = self.records.by_name[name]
        if record.method == DEFLATED:
            raise UnsupportedError(
                f"record {describe(name)} is a compressed zip file within a zip file", path=self.path
            )
        found = ZipRecords(Window(self.records.file, self.records.data_offset(record), record.nbytes))
        self._inner.append(found)
        return found

    def storage(self, key: str, records: ZipRecords, record: Record, nbytes: int, location: str) -> Storage:
        """The storage that is called `key` from now on; raises MalformedError for a key that means another record."""
        if self._named.setdefault(key, record) is not record:
            raise MalformedError(f"two storages would be called {describe(key)}", path=self.path)
        return Storage(key, nbytes, location, RecordBytes(key, records, record))

    def seal(self, overlay: Overlay) -> None:
        """Patch the CRCs of changed records: first those within records, which change these too."""
        for records in self._inner:
            records.seal(overlay)
        self.records.seal(overlay)

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


class SavedPickle:
    """One pickle among records, and the folder beside it whose records are its storages."""

    def __init__(
        self, storages: ZipStorages, records: ZipRecords, prefix: str, *, pickle: str = "data", label: str = ""
    ) -> None:
        self._storages = storages
        self.records = records
        self.prefix = prefix
        """The beginning of every record's name, slash included."""
        self._pickle = pickle
        """The name of the pickle without suffix, and of the folder."""
        self._folder = f"{prefix}{pickle}/"
        self._label = label
        """The beginning of the keys of its storages, where there are several pickles."""
        order = self.note("byteorder", b"little")
        if order not in (b"little", b"big"):
            raise MalformedError(f"its byteorder record says {order[:20]!r}", path=storages.path)
        self.big_endian = order == b"big"

    def note(self, name: str, default: bytes) -> bytes:
        """The content of a small record, or `default` where there is none."""
        record = self.records.by_name.get(self.prefix + name)
        if record is None:
            return default
        if record.nbytes > limits.ZIP_NOTE_RECORD:
            raise MalformedError(f"its {name} record has {record.nbytes} bytes", path=self._storages.path)
        return bytes(self.records.read(record.name, limits.ZIP_NOTE_RECORD))

    @property
    def version(self) -> str:
        """The content of the version record; empty where there is no such record."""
        return self.note("version", b"").strip().decode("ascii", "replace")

    def graph(self) -> Graph:
        """The pickle, read; raises FormatError where it is missing or bad."""
        name = f"{self.prefix}{self._pickle}.pkl"
        if name not in self.records.by_name:
            raise MalformedError(f"there is no record {describe(name)}", path=self._storages.path)
        return read_pickle(self.records.read(name, limits.PICKLE_INFLATED))

    def place(self) -> PicklePlace:
        """Return the place of the pickle, for storages within it."""
        record = self.records.by_name[f"{self.prefix}{self._pickle}.pkl"]
        plain = record.method != DEFLATED
        begin = self.records.file.begin + self.records.data_offset(record) if plain else None
        return PicklePlace(begin, self.records.file.whole)

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of a record, checked to be there and long enough."""
        name = self._folder + key
        record = self.records.by_name.get(name)
        if record is None:
            raise ShortStorageError(f"storage {key!r} has no record {name!r}", path=self._storages.path)
        if record.nbytes < nbytes:
            raise ShortStorageError(
                f"storage {key!r} should have {nbytes} bytes, its record has {record.nbytes}", path=self._storages.path
            )
        return self._storages.storage(self._label + key, self.records, record, nbytes, location)


def unreferenced_records(container: object, graph: object) -> dict[str, int]:
    """The storages of a torch zip file that its pickle does not refer to, by their keys, with their bytes."""
    if not isinstance(container, ZipStorages) or not isinstance(graph, Graph):
        return {}
    folder = f"{prefix_of(container.records)}data/"
    names = container.records.by_name
    found = {name[len(folder) :]: record.nbytes for name, record in names.items() if name.startswith(folder)}
    for node in graph.persistent:
        if found and isinstance(node.pid, tuple) and len(node.pid) >= 5:
            found.pop(text_of(node.pid[2]) or "", None)
    return found


def prefix_of(records: ZipRecords) -> str:
    """The folder that every record lies in, slash included: that of the first one, as torch takes it."""
    folder, slash, _ = next(iter(records.by_name), "").partition("/")
    return folder + slash if slash else ""
