"""Files of numpy.savez that were cut: each array whose record is all there."""

from __future__ import annotations

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.numpy.npy import HEAD, PICKLED, Header, header_size, parse_header
from ckpt_cli.formats.salvage.found import Lost, Salvaged, checkpoint_of
from ckpt_cli.formats.salvage.zip import Inflated, Record, Walk, inflated
from ckpt_cli.formats.zip.layout import DEFLATED
from ckpt_cli.model.checkpoint import Entry, PlainBytes, Storage, StorageSource

_SUFFIX = ".npy"


def salvage(file: SourceFile, problem: str, kind: str) -> Salvaged:
    """List the arrays of a cut file, in whose directory there may have been more."""
    kept: list[Entry] = []
    lost: list[Lost] = []
    for record in Walk(file).records():
        name = record.name.removesuffix(_SUFFIX)
        if name == record.name:
            continue
        if not record.is_whole:
            lost.append(Lost(name, f"of its record only {record.stored} bytes are there"))
            continue
        try:
            kept.append(_entry(file, record, name))
        except LimitError:
            raise
        except FormatError as error:
            lost.append(Lost(name, error.problem))
        if len(kept) > limits.NPZ_ARRAYS:
            raise LimitError(f"over {limits.NPZ_ARRAYS} arrays in one file")
    lost.append(Lost("", "the arrays after these, whose names the file does not have any more"))
    return Salvaged(checkpoint_of(file, kind, kept), problem, tuple(lost))


def _entry(file: SourceFile, record: Record, name: str) -> Entry:
    """Return the array of a record; raises FormatError where it is none of plain elements."""
    size = header_size(_beginning(file, record, HEAD))
    header = parse_header(_beginning(file, record, size), name)
    nbytes = header.nbytes_of_elements
    if header.itemsize in (None, PICKLED):
        raise FormatError("it is an array of objects")
    if record.method != DEFLATED and size + nbytes > record.stored:
        raise FormatError(f"it needs {nbytes} bytes, its record has {record.stored - size}")
    return header.entry(name, Storage(record.name, nbytes, "cpu", _source(file, record, header)))


def _source(file: SourceFile, record: Record, header: Header) -> StorageSource:
    if record.method == DEFLATED:
        return Inflated(file, record, header.nbytes)
    return PlainBytes(file, record.begin + header.nbytes)


def _beginning(file: SourceFile, record: Record, nbytes: int) -> bytes:
    """Return the first bytes of a record's content."""
    if record.method == DEFLATED:
        return inflated(file, record, nbytes)
    return file.read(record.begin, min(nbytes, record.stored))
