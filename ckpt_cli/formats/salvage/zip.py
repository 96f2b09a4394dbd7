"""Zip files of torch that were cut: their records by the local headers, as the directory is at the end of a file.

torch's writer leaves sizes out of a local header and puts them into a descriptor after the data. So a record's end is
where the pickle says that its storage ends, if a descriptor stands there, and else the first descriptor whose size is
the distance from the record's first byte.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.formats.salvage.found import CutStorages, Document, Lost, Salvaged, checkpoint_of, told_apart
from ckpt_cli.formats.zip.layout import (
    DEFLATED,
    DESCRIBED,
    ENCRYPTED,
    LOCAL,
    LONGEST_DESCRIPTOR,
    STORED,
    local_header_in,
    name_in,
    widened,
)
from ckpt_cli.pickles.cut import read_cut_pickle
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Call, Graph
from ckpt_cli.pickles.references import reference_of
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

_PIECE = 1 << 20
_MAGIC = b"PK\7\10"
_SIZES = (struct.Struct("<4xLLL"), struct.Struct("<4xLQQ"))
"""What follows a descriptor's signature: CRC, stored bytes, bytes; the second of files beyond 4 GiB."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as far as it is there."""

    name: str
    method: int
    begin: int
    """The first byte of its data."""
    stored: int
    """The bytes of its data that are there."""
    is_whole: bool


class Inflated:
    """The bytes of a deflated record, from one on."""

    composed = False

    def __init__(self, file: SourceFile, record: Record, first: int = 0) -> None:
        self._file = file
        self._record = record
        self._first = first

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage, inflated from the record's first one on."""
        if nbytes > limits.INFLATED_AT_ONCE:
            raise LimitError(f"{nbytes} bytes of record {self._record.name!r} would have to be inflated")
        begin += self._first
        found = memoryview(inflated(self._file, self._record, begin + nbytes))[begin:]
        if len(found) < nbytes:
            raise TruncatedError(f"record {self._record.name!r} inflates to fewer bytes than its header says")
        return found

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:  # noqa: ARG002 - as the protocol has it
        """Raise UnsupportedError: the bytes stand nowhere as they are."""
        raise UnsupportedError(f"record {self._record.name!r} is compressed")


def inflated(file: SourceFile, record: Record, most: int) -> bytes:
    """Return up to `most` bytes of a deflated record, as far as they are there."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    found = bytearray()
    budget = current()
    position, end, pending = record.begin, record.begin + record.stored, b""
    while len(found) < most and not inflater.eof and (pending or position < end):
        if not pending:
            pending = file.read(position, min(_PIECE, end - position))
            position += len(pending)
        try:
            piece = inflater.decompress(pending, most - len(found))
        except zlib.error as error:
            raise MalformedError(f"record {record.name!r} does not inflate: {error}", path=file.path) from None
        pending = inflater.unconsumed_tail
        budget.inflate(len(piece), file.path)
        found += piece
    return bytes(found[:most])


@dataclass(slots=True)
class Walk:
    """The walk over the records of a file, from its first byte on."""

    file: SourceFile
    sizes: Mapping[str, int] = field(default_factory=dict)
    """The bytes that records should have, by name, as far as they are known."""
    tries: int = 0

    def records(self) -> Iterator[Record]:
        """Yield the records up to the first that is not all there, or to the directory."""
        position = 0
        for _ in range(limits.ZIP_RECORDS):
            record, position = self._record(position)
            if record is None:
                return
            yield record
            if not record.is_whole:
                return
        raise LimitError(f"it has over {limits.ZIP_RECORDS} records")

    def _record(self, position: int) -> tuple[Record | None, int]:
        """The record whose local header begins at a byte, and the byte after it."""
        if position + LOCAL.size > self.file.size:
            return None, position
        local = local_header_in(self.file.read(position, LOCAL.size))
        if local is None or local.flags & ENCRYPTED or local.method not in (STORED, DEFLATED):
            return None, position
        begin = position + local.size
        if begin > self.file.size:
            return None, position
        rest = self.file.read(position + LOCAL.size, local.size - LOCAL.size)
        name = name_in(rest[: local.name_length])
        _, stored, _, _ = widened(rest[local.name_length :], local.nbytes, local.stored, 0)
        if local.flags & DESCRIBED and not stored:
            found = self._end(name, begin, local.method)
            if found is None:
                return Record(name, local.method, begin, self.file.size - begin, is_whole=False), self.file.size
            stored, position = found
        else:
            position = begin + stored
            if local.flags & DESCRIBED and position < self.file.size:
                behind = self.file.read(position, min(LONGEST_DESCRIPTOR, self.file.size - position))
                position += _descriptor_in(behind, stored, local.method) or 0
        has = min(stored, self.file.size - begin)
        return Record(name, local.method, begin, has, is_whole=has == stored), position

    def _end(self, name: str, begin: int, method: int) -> tuple[int, int] | None:
        """Return the bytes of a record whose header does not say them, and the byte after its descriptor."""
        expected = self.sizes.get(name)
        if expected is not None and method == STORED:
            end = begin + expected
            if end <= self.file.size:
                behind = self.file.read(end, min(LONGEST_DESCRIPTOR, self.file.size - end))
                if len(behind) < LONGEST_DESCRIPTOR and behind[:4] == _MAGIC[: len(behind)]:
                    size = _descriptor_in(behind, expected, method)
                    return expected, end + (size or len(behind))
                size = _descriptor_in(behind, expected, method)
                if size is not None:
                    return expected, end + size
        return self._searched(begin, method)

    def _searched(self, begin: int, method: int) -> tuple[int, int] | None:
        """Find the first descriptor that has the number of bytes before it."""
        at = begin
        while at < self.file.size:
            piece = self.file.read(at, min(_PIECE + LONGEST_DESCRIPTOR, self.file.size - at))
            found = piece.find(_MAGIC)
            while 0 <= found < _PIECE:
                self.tries += 1
                if self.tries > limits.SALVAGE_TRIES:
                    raise LimitError("it has far too many places that look like the end of a record")
                nbytes = at + found - begin
                size = _descriptor_in(piece[found : found + LONGEST_DESCRIPTOR], nbytes, method)
                if size is not None:
                    return nbytes, at + found + size
                found = piece.find(_MAGIC, found + 1)
            at += _PIECE
        return None


def _descriptor_in(data: bytes, nbytes: int, method: int) -> int | None:
    """Return the size of the descriptor that some data begin with, of a record of so many stored bytes; or None."""
    if data[:4] != _MAGIC:
        return None
    for form in _SIZES:
        if len(data) >= form.size:
            _, stored, whole = form.unpack_from(data)
            if stored == nbytes and (method != STORED or whole == nbytes):
                return form.size
    return None


class _Scripted:
    """The conventions of TorchScript: typed lists and dicts are wrapped."""

    def unwrap(self, node: Call) -> object:
        """The list or dict that a call only says the type of."""
        from ckpt_cli.formats.torch_zip.torchscript import unwrapped

        return unwrapped(node)

    def kinds(self, node: Call) -> Mapping[str, str]:  # noqa: ARG002 - as the protocol has it
        """Return no kinds: what declares them may be cut off."""
        return {}


def salvage(file: SourceFile, problem: str, kind: str) -> Salvaged:
    """List the tensors of a cut file of torch.save or torch.jit.save; raises FormatError for other zip files."""
    walk = Walk(file)
    records: dict[str, Record] = {}
    prefix = graph = None
    is_whole, place = False, None
    for record in walk.records():
        if prefix is None:
            prefix = record.name.partition("/")[0] + "/"
        records.setdefault(record.name, record)  # of two with one name, torch takes the first
        if record.name == f"{prefix}data.pkl" and graph is None:
            graph, is_whole, place = _pickle(file, record)
            walk.sizes = _sizes(graph, f"{prefix}data/")
    if prefix is None or not _is_torch(records, prefix):
        raise TruncatedError(f"{problem}; nothing of it can be salvaged")
    lost: list[Lost] = []
    if graph is None:
        nameless = sum(name.startswith(f"{prefix}data/") for name in records)
        lost.append(Lost("", f"the pickle with all names; {nameless} storages without names are there"))
        return Salvaged(checkpoint_of(file, kind, []), problem, tuple(lost))
    storages = _storages(file, records, prefix, graph)
    scripted = _Scripted() if any(node.module.startswith("__torch__") for node in graph.globals) else None
    entries = entries_of(graph, storages, scripted, place=PicklePlace(place))
    kept, lost = told_apart(entries, storages)
    if not is_whole:
        lost.append(Lost("", "the entries after these, whose names the file does not have any more"))
    document = Document(graph, entries, storages, place) if is_whole and scripted is None else None
    return Salvaged(checkpoint_of(file, kind, kept), problem, tuple(lost), document)


def _is_torch(records: Mapping[str, Record], prefix: str) -> bool:
    """True if the records are those of torch.save or torch.jit.save, which may have been cut before the pickle."""
    return f"{prefix}data.pkl" in records or any(name.startswith(f"{prefix}data/") for name in records)


def _pickle(file: SourceFile, record: Record) -> tuple[Graph, bool, int | None]:
    """Return the graph of the main pickle, True if it is whole, and the byte at which it stands, None if compressed."""
    if record.method == DEFLATED:
        graph, is_whole = read_cut_pickle(inflated(file, record, limits.PICKLE_INFLATED))
        return graph, is_whole, None
    graph, is_whole = read_cut_pickle(file.view(record.begin, record.stored))
    return graph, is_whole, file.begin + record.begin


def _sizes(graph: Graph, folder: str) -> dict[str, int]:
    """Return the bytes of the record of each storage that a pickle refers to."""
    found: dict[str, int] = {}
    for node in graph.persistent:
        reference = reference_of(node)
        if reference is not None and reference.dtype is not None:
            name = f"{folder}{reference.key}"
            found[name] = max(found.get(name, 0), reference.numel * reference.itemsize)
    return found


def _storages(file: SourceFile, records: Mapping[str, Record], prefix: str, graph: Graph) -> CutStorages:
    """Return the storages of the records."""
    order = records.get(f"{prefix}byteorder")
    is_big = order is not None and order.is_whole and file.read(order.begin, min(order.stored, 8)) == b"big"
    storages = CutStorages(file, big_endian=is_big)
    sizes = _sizes(graph, "")
    folder = f"{prefix}data/"
    for name, record in records.items():
        key = name.removeprefix(folder)
        if key == name:
            continue
        if record.method == DEFLATED:
            if record.is_whole:
                storages.places[key] = record.begin, sizes.get(key, 0)
                storages.sources[key] = Inflated(file, record)
        else:
            storages.places[key] = record.begin, record.stored
    return storages
