"""Several numpy arrays in a zip file, read and written: each record `NAME.npy` is one (numpy.savez).

Sources: numpy/lib/_npyio_impl.py, numpy/lib/format.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError, about, listed
from ckpt_cli.files.copy import no_progress
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.numpy.npy import HEAD, PICKLED, Header, header_bytes, header_size, object_entries, parse_header
from ckpt_cli.formats.zip.container import RecordBytes
from ckpt_cli.formats.zip.layout import DEFLATED
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Storage, Tensor, Value

if TYPE_CHECKING:
    from ckpt_cli.dtypes import DType
    from ckpt_cli.files.copy import Progress
    from ckpt_cli.files.patches import Overlay
    from ckpt_cli.files.source import LocalFile
    from ckpt_cli.formats.writing import OpenCopy
    from ckpt_cli.model.new_checkpoint import NewCheckpoint

NAME = "npz"

_SUFFIX = ".npy"


class _ArrayBytes(RecordBytes):
    """The elements of an array: what its record has after the header."""

    __slots__ = ()

    def _refusal(self) -> UnsupportedError:
        return UnsupportedError(
            f"array {self.key.removesuffix(_SUFFIX)!r} is compressed, so its bytes cannot be changed in place",
            path=self.records.file.path,
            hint="ckpt convert FILE OUT.npz writes a copy that is not compressed",
        )


class Npz:
    """The container: storages are the records' contents after their headers."""

    def __init__(self, file: SourceFile) -> None:
        self.files: Sequence[SourceFile] = (file,)
        self.records = ZipRecords(file)
        self._longer: dict[str, int] = {}
        """Bytes that records have after their arrays."""
        self._closed: list[str] = []
        """Arrays of objects whose pickles cannot be read."""

    def entries(self, record: Record) -> list[Entry]:
        """The array in a record, what is in one of objects, or what stands there in the place of one."""
        name = record.name.removesuffix(_SUFFIX)
        if name == record.name:
            return [Value(name, Opaque(f"<record of {record.nbytes} bytes>"))]
        if record.nbytes < HEAD:
            raise MalformedError(f"record {record.name!r} has {record.nbytes} bytes, too few for an array")
        size = header_size(self._head(record, HEAD))
        if size > record.nbytes:
            raise MalformedError(f"record {record.name!r} has {record.nbytes} bytes, its array's header {size}")
        header = parse_header(self._head(record, size), name)
        entry = header.entry(name, self._storage(record, size))
        needed, rest = header.nbytes_of_elements, record.nbytes - size
        if header.itemsize not in (None, PICKLED) and needed != rest:
            if needed > rest:
                raise MalformedError(f"array {name!r} needs {needed} bytes, its record has {rest} after the header")
            self._longer[record.name] = rest - needed
        return [entry] if header.itemsize != PICKLED else self._objects(record, name, header)

    def _objects(self, record: Record, name: str, header: Header) -> list[Entry]:
        """Return the entries in an array of objects; the array itself where its pickle cannot be read."""
        from ckpt_cli.pickles.read import read_pickle
        from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

        size = record.nbytes - header.nbytes
        if record.method == DEFLATED:
            if not current().affords((self, "objects"), record.nbytes, limits.PICKLE_INFLATED):
                raise LimitError(f"its arrays of objects would inflate to over {limits.PICKLE_INFLATED} bytes")
            begin, content = None, memoryview(self.records.inflate(record, header.nbytes, size))
        else:
            begin = self.records.data_offset(record) + header.nbytes
            content = self.files[0].view(begin, size)
        try:
            graph = read_pickle(content)
        except MalformedError:
            self._closed.append(name)
            return [header.entry(name, self._storage(record, header.nbytes))]
        if graph.nbytes < size:
            self._longer[record.name] = size - graph.nbytes
        return object_entries(name, header, graph, PicklePlace(begin, self.files[0]))

    def _storage(self, record: Record, begin: int) -> Storage:
        """Return the storage of a record's content from a byte on."""
        source = _ArrayBytes(record.name, self.records, record, begin)
        return Storage(record.name, record.nbytes - begin, "cpu", source)

    def unread(self) -> list[str]:
        """Describe the bytes of records after their arrays."""
        found = []
        if self._longer:
            nbytes, first = sum(self._longer.values()), next(iter(self._longer))
            some = f"record {first!r}" if len(self._longer) == 1 else f"{len(self._longer)} records such as {first!r}"
            found.append(f"{nbytes} bytes after the array in {some}, where numpy reads one array")
        if self._closed:
            found.append(f"the objects of array {listed(self._closed, 1, repr)}, whose pickle cannot be read")
        return found

    def _head(self, record: Record, nbytes: int) -> bytes:
        if record.method == DEFLATED:
            return self.records.head(record, nbytes)
        return self.files[0].read(self.records.data_offset(record, in_turn=True), nbytes)

    def seal(self, overlay: Overlay) -> None:
        """Patch the CRCs of changed records."""
        self.records.seal(overlay)

    def close(self) -> None:
        """Close the file."""
        self.files[0].close()


def read(file: SourceFile) -> Checkpoint:
    """Open an npz file: its directory and the header of each array are read, no element is."""
    with about(file.path):
        container = Npz(file)
        if len(container.records.by_name) > limits.NPZ_ARRAYS:
            raise LimitError(f"{len(container.records.by_name)} arrays in one file")
        names = [record.name.removesuffix(_SUFFIX) for record in container.records.by_name.values()]
        entries = [entry for record in container.records.by_name.values() for entry in container.entries(record)]
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=container,
        version="numpy arrays in a zip file",
        top_level=names,
        unread=container.unread(),
    )


# --- new files -------------------------------------------------------------------------------------------------------

_CODES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2",
          "int8": "|i1", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1",
          "complex128": "<c16", "complex64": "<c8"}  # fmt: skip


def spelled(dtype: DType) -> str | None:
    """Return numpy's spelling of a dtype in a file; None for one that it does not have by itself."""
    return _CODES.get(dtype.name)


def _header(tensor: Tensor) -> bytes:
    return header_bytes(tensor.name, _CODES[tensor.dtype.name], tuple(tensor.shape or ()))


def write(new: NewCheckpoint, target: LocalFile | None, progress: Progress = no_progress) -> int:
    """Write one array a tensor; returns the bytes of the file. Without a target it only measures."""
    from ckpt_cli.formats.writing import announced
    from ckpt_cli.formats.zip.write import ZipWriter

    writer = ZipWriter(target)
    contents = [new.content(tensor) for tensor in new.tensors]
    for tensor, content in zip(new.tensors, contents if target is None else announced(contents), strict=True):
        head = _header(tensor)
        with writer.record(f"{tensor.name}.npy", len(head) + tensor.nbytes):
            writer.append(head)
            writer.append_contents((content,), progress)
    return writer.close()


def verify(new: NewCheckpoint, path: str, open_copy: OpenCopy) -> None:  # noqa: ARG001 - as all writers have it
    """Read the new file's directory and headers back with the library, and compare them with what was meant."""
    import zipfile

    from ckpt_cli.formats.writing import not_read_back

    wanted = {f"{tensor.name}.npy": _header(tensor) for tensor in new.tensors}
    with zipfile.ZipFile(path) as archive:
        if archive.namelist() != list(wanted):
            raise not_read_back("other names")
        for tensor, (name, head) in zip(new.tensors, wanted.items(), strict=True):
            with archive.open(name) as record:
                if record.read(len(head)) != head or archive.getinfo(name).file_size != len(head) + tensor.nbytes:
                    raise not_read_back(repr(name))
