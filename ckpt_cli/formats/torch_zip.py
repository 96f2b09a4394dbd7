"""The zip file that torch.save has written since 1.6: a pickle, and a record a storage.

Record names and their order are those of torch/csrc/serialization and torch/serialization.py (`_save`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, MalformedError, UnknownFormatError, UnsupportedError
from ckpt_cli.files.extents import Extent
from ckpt_cli.files.local import LocalFile
from ckpt_cli.formats.zip_records import DEFLATED, ZipRecords
from ckpt_cli.model import Checkpoint, Storage
from ckpt_cli.pickles.entries import entries_of, objects_of, top_level_of
from ckpt_cli.pickles.reader import read_pickle

if TYPE_CHECKING:
    from ckpt_cli.files.overlay import Overlay

NAME = "zip"


class TorchZip:
    """The container: storages are the records `data/KEY` below one common prefix."""

    def __init__(self, file: LocalFile) -> None:
        self.files: Sequence[LocalFile] = (file,)
        self.records = ZipRecords(file)
        self.prefix = _prefix(self.records)
        order = self._note("byteorder", b"little")
        if order not in (b"little", b"big"):
            raise MalformedError(f"its byteorder record says {order[:20]!r}", path=file.path)
        self.big_endian = order == b"big"
        self.version = self._note("version", b"").strip().decode("ascii", "replace")

    def _note(self, name: str, default: bytes) -> bytes:
        """The content of a small record, or `default` where there is none."""
        record = self.records.by_name.get(f"{self.prefix}/{name}")
        if record is None:
            return default
        if record.nbytes > limits.ZIP_NOTE_RECORD:
            raise MalformedError(f"its {name} record has {record.nbytes} bytes", path=self.files[0].path)
        return bytes(self.records.read(record.name, limits.ZIP_NOTE_RECORD))

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage of a record, checked to be there and long enough."""
        name = self._record_name(key)
        record = self.records.by_name.get(name)
        if record is None:
            raise MalformedError(f"storage {key!r} has no record {name!r}", path=self.files[0].path)
        if record.nbytes < nbytes:
            raise MalformedError(
                f"storage {key!r} should have {nbytes} bytes, its record has {record.nbytes}",
                path=self.files[0].path,
            )
        return Storage(key, nbytes, location)

    def _record_name(self, key: str) -> str:
        return f"{self.prefix}/data/{key}"

    def view(self, storage: Storage, offset: int, nbytes: int) -> memoryview:
        """Bytes of a storage; those of a deflated record are inflated up to the range's end."""
        record = self.records.by_name[self._record_name(storage.key)]
        if record.method == DEFLATED:
            return memoryview(self.records.inflate(record, offset, nbytes))
        return self.files[0].view(self.records.data_offset(record) + offset, nbytes)

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """Where a range of a storage stands plainly."""
        record = self.records.by_name[self._record_name(storage.key)]
        if record.method == DEFLATED:
            raise UnsupportedError(
                f"storage {storage.key!r} is compressed, so its bytes cannot be changed in place",
                path=self.files[0].path,
                hint="save it again with torch.save, which does not compress",
            )
        return [Extent(0, self.records.data_offset(record) + offset, nbytes)]

    def seal(self, overlay: Overlay) -> None:
        """Bring the CRCs of changed records along."""
        self.records.seal(overlay)

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


def _prefix(records: ZipRecords) -> str:
    """The folder that every record lies in: that of the first one, as torch takes it."""
    path = records.file.path
    if not records.by_name:
        raise MalformedError("a zip file without records", path=path)
    prefix, slash, _ = next(iter(records.by_name)).partition("/")
    if slash and f"{prefix}/data.pkl" in records.by_name:
        return prefix
    raise UnknownFormatError(
        f"a zip file, but not one of torch.save's: it has no {prefix + '/' if slash else ''}data.pkl", path=path
    )


def _refuse_relatives(container: TorchZip) -> None:
    """Say what the zip files are that torch writes in other ways."""
    names = container.records.by_name
    path = container.files[0].path
    if f"{container.prefix}/constants.pkl" in names:
        raise UnknownFormatError("a TorchScript archive (torch.jit.save), which is not read yet", path=path)


def read(file: LocalFile) -> Checkpoint:
    """Open a torch zip file: its directory and its pickle are read, no storage is."""
    container = TorchZip(file)
    _refuse_relatives(container)
    pickle = container.records.read(f"{container.prefix}/data.pkl", limits.PICKLE_INFLATED)
    try:
        graph = read_pickle(pickle)
        entries = entries_of(graph, container)
    except CkptError as error:
        error.path = error.path or file.path
        raise
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=container,
        version=f"torch.save zip, version {container.version or 'not given'}",
        objects=objects_of(graph),
        top_level=top_level_of(graph),
        document=graph,
    )
