"""HDF5 files, as Keras writes them, listed through the package h5py (the extra `h5`).

A dataset that stands in one piece is a range of the file; another one, in chunks or compressed, is read through h5py,
some rows at a time. Nothing is read from other files: links and datasets that lead there are only named.
Sources: https://docs.h5py.org and, for the names, keras/src/saving/saving_lib.py (`layers/NAME/vars/0`)
and `.keras` archives.
"""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.dtypes import BY_NUMPY
from ckpt_cli.errors import LimitError, MalformedError, UnknownFormatError, UnsupportedError, about, quoted
from ckpt_cli.files.source import ByteSource, Extent, SourceFile, Window
from ckpt_cli.formats.zip.layout import DEFLATED
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import (
    Checkpoint,
    Entry,
    Opaque,
    PlainBytes,
    Storage,
    StorageSource,
    Tensor,
    Value,
    contiguous_stride,
)
from ckpt_cli.pickles.describe import describe

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "h5"

_WEIGHTS = "model.weights.h5"
"""The record of a `.keras` archive."""

_METADATA = ("keras_version", "backend")
"""Attributes of the file that are metadata."""

_TEXT = 64 << 10
"""Characters of an attribute that is metadata."""

_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_FILTERS = {_DEFLATE, _SHUFFLE, _FLETCHER32}
"""The filters of HDF5 whose output has a bound that can be verified first."""

_HARD = 0
"""The kind of links that lead to something in the file itself (h5py.h5l.TYPE_HARD)."""


class _Stream(io.RawIOBase):
    """A source as h5py reads it."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + {0: 0, 1: self._at, 2: self._source.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        nbytes = max(min(len(view), self._source.size - self._at), 0)
        self._source.read_into(view[:nbytes], self._at)
        self._at += nbytes
        return nbytes


class _Container:
    """The open file, the zip archive that it may be a record of, and what h5py has open of it."""

    def __init__(self, file: SourceFile, opened: Any, records: ZipRecords | None) -> None:
        self.files: Sequence[SourceFile] = (file,)
        self._opened = opened
        self._records = records

    def seal(self, overlay: Overlay) -> None:
        """Add the patches of an archive's checksums; the elements of datasets in one piece have none of their own."""
        if self._records is not None:
            self._records.seal(overlay)

    def close(self) -> None:
        """Close the file."""
        self._opened.close()
        self.files[0].close()


class _Rows:
    """The bytes of a dataset that stands nowhere in one piece: rows are read as they are asked for."""

    composed = False

    def __init__(self, name: str, dataset: Any, path: str) -> None:
        self._name = name
        self._dataset = dataset
        self._path = path
        self._checked: set[tuple[int, ...]] = set()
        """The chunks that are known to inflate to no more than their size."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage, from the rows that they are in; raises LimitError where one row is too much."""
        dataset = self._dataset
        row = dataset.dtype.itemsize * prod(dataset.shape[1:])
        if not nbytes:
            return memoryview(b"")
        first, end = begin // row, -(-(begin + nbytes) // row)
        if (end - first) * row > limits.INFLATED_AT_ONCE:
            raise LimitError(f"{(end - first) * row} bytes of dataset {describe(self._name)} would have to be unpacked")
        current().inflate((end - first) * row, self._path)
        try:
            self._check_chunks(first, end)
            found = dataset[first:end] if dataset.shape else dataset[()]
        except (OSError, RuntimeError, ValueError, KeyError, zlib.error) as error:  # what is not sound or not known
            raise MalformedError(f"dataset {describe(self._name)}: {error}", path=self._path) from None
        data = found.tobytes()
        return memoryview(data)[begin - first * row : begin - first * row + nbytes]

    def _check_chunks(self, first: int, end: int) -> None:
        """Inflate the chunks of some rows no further than they may: HDF5 itself knows no bound."""
        dataset = self._dataset
        if dataset.chunks is None:
            return
        chunk = prod(dataset.chunks) * dataset.dtype.itemsize
        if chunk > limits.INFLATED_AT_ONCE:
            raise LimitError(f"a chunk of dataset {describe(self._name)} has {chunk} bytes")
        plist = dataset.id.get_create_plist()
        filters = {plist.get_filter(number)[0] for number in range(plist.get_nfilters())}
        if not filters <= _FILTERS:
            raise UnsupportedError(f"dataset {describe(self._name)} is compressed otherwise than by gzip")
        if _DEFLATE not in filters:
            return
        starts = [range(first - first % dataset.chunks[0], end, dataset.chunks[0])]
        starts += [range(0, size, step) for size, step in zip(dataset.shape[1:], dataset.chunks[1:], strict=True)]
        for at in product(*starts):
            if at not in self._checked and dataset.id.get_chunk_info_by_coord(at).byte_offset is not None:
                _, raw = dataset.id.read_direct_chunk(at)
                inflater = zlib.decompressobj()
                if len(inflater.decompress(raw, chunk + 1)) > chunk:
                    raise MalformedError(f"a chunk of dataset {describe(self._name)} inflates to more than its size")
                current().inflate(chunk, self._path)
            self._checked.add(at)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:  # noqa: ARG002 - as the protocol has it
        """Raise UnsupportedError: the bytes stand nowhere plainly."""
        raise UnsupportedError(
            f"dataset {describe(self._name)} is stored in chunks, so its bytes cannot be changed in place",
            path=self._path,
            hint="ckpt convert FILE OUT.pt writes a copy that can be changed freely",
        )


def read(file: SourceFile) -> Checkpoint:
    """Open an HDF5 file: its groups and the headers of its datasets are read.

    Raises UnknownFormatError where h5py is not installed, MalformedError for what it cannot open, LimitError.
    """
    return _read(file, "HDF5", None)


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open the weights in a `.keras` archive, a zip file with `model.weights.h5`."""
    record = records.by_name[f"{prefix}{_WEIGHTS}"]
    if record.method == DEFLATED:
        path = quoted(records.file.path)
        raise UnsupportedError(f"{_WEIGHTS} in it is compressed", hint=f"unzip {path} {_WEIGHTS} unpacks it")
    window = Window(records.file, records.data_offset(record), record.nbytes)
    return _read(window, "Keras archive, HDF5", records)


def _read(file: ByteSource, version: str, records: ZipRecords | None) -> Checkpoint:
    with about(file.path):
        opened = _open(file)
        try:
            entries = list(_Walk(file, opened).entries(opened, "", 0))
            metadata = dict(_attributes(opened))
        except (OSError, RuntimeError, ValueError, KeyError) as error:  # of h5py
            opened.close()
            raise MalformedError(f"not a sound HDF5 file: {error}") from None
        except BaseException:
            opened.close()
            raise
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=_Container(file.whole, opened, records),
        version=version,
        metadata=metadata,
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )


def _open(file: ByteSource) -> Any:
    """Return the file as h5py opens it."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise UnknownFormatError(
            "an HDF5 file (Keras, PyTables), which is read by the package h5py", hint="pip install 'ckpt-edit[h5]'"
        ) from None
    try:
        return h5py.File(_Stream(file), "r")
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise MalformedError(f"not a sound HDF5 file: {error}") from None


class _Walk:
    """The datasets of a file, each under the first name that leads to it and as an alias under others."""

    def __init__(self, file: ByteSource, opened: Any) -> None:
        self._file = file
        self._plain = not opened.userblock_size
        self._storages: dict[int, Storage] = {}
        self._groups: set[int] = set()
        self._count = 0

    def entries(self, group: Any, name: str, depth: int) -> Iterator[Entry]:
        """Yield what is in a group; what is there already by another name is not walked again."""
        address = _address(group)
        if depth > limits.GROUP_NESTING:
            raise LimitError(f"{describe(name[:200])} nests more than {limits.GROUP_NESTING} deep", fixed=True)
        if address in self._groups:
            return
        self._groups.add(address)
        for key in group:
            self._count += 1
            below = f"{name}.{key}" if name else key
            if self._count > limits.H5_ITEMS or len(below) > limits.NAME_LENGTH:
                raise LimitError(f"it has more than {limits.H5_ITEMS:,} items, or names that are far too long")
            raw = key.encode("utf-8", "surrogateescape")
            if group.id.links.get_info(raw).type != _HARD:
                yield Value(below, Opaque("<a link to something elsewhere>"))
                continue
            found = group[key]
            if hasattr(found, "keys"):
                yield from self.entries(found, below, depth + 1)
            else:
                yield self._dataset(found, below)

    def _dataset(self, found: Any, name: str) -> Entry:
        shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
        code = getattr(dtype, "str", "")
        known = BY_NUMPY.get(code[1:])
        if shape is None or known is None or len(shape) > limits.DIMENSIONS:
            return Value(name, Opaque(f"<dataset of {dtype} {shape}>"))
        if found.is_virtual or found.external:
            return Value(name, Opaque(f"<{known} {list(shape)}, whose elements are in other files>"))
        nbytes = known.nbytes_of(tuple(shape))
        storage = self._storages.get(_address(found))
        if storage is None:
            storage = Storage(name, nbytes, "cpu", self._source(found, name, nbytes))
            self._storages[_address(found)] = storage
        big_endian = code[0] == ">" and known.bits > 8
        return Tensor(name, known, tuple(shape), contiguous_stride(tuple(shape)), storage, big_endian=big_endian)

    def _source(self, found: Any, name: str, nbytes: int) -> StorageSource:
        """Return the place of the bytes: a range if they stand in one piece and there is no other place for them."""
        offset = found.id.get_offset() if self._plain and found.chunks is None else None
        if offset is None or not nbytes:
            return _Rows(name, found, self._file.path)
        self._file.check(offset, nbytes)
        return PlainBytes(self._file, offset)


def _address(found: Any) -> int:
    """Return where an object of the file is."""
    h5py = importlib.import_module("h5py")
    address: int = h5py.h5o.get_info(found.id).addr
    return address


def _attributes(opened: Any) -> Iterator[tuple[str, str]]:
    """Yield those attributes of the file that Keras writes and that are short."""
    for key in _METADATA:
        if key not in opened.attrs or opened.attrs.get_id(key).get_storage_size() > _TEXT:
            continue
        value = opened.attrs[key]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str) and len(value) <= _TEXT:
            yield key, value
