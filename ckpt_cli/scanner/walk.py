"""Every pickle that any file could hold, found without trusting the file: the walk behind `ckpt scan`.

It depends on no strict reader accepting the file, because what loads a hostile file may be less strict. Containers
within containers are opened a few levels deep and within limits; what is not opened is reported.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, cast

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats import signatures
from ckpt_cli.formats.numpy.npy import HEAD as NPY_HEAD
from ckpt_cli.formats.numpy.npy import PICKLED, Header, header_size, parse_header, text_in
from ckpt_cli.formats.signatures import HEAD, preface_size
from ckpt_cli.scanner.streams import (
    PICKLE_NAMES,
    Found,
    Inner,
    Oddity,
    Walk,
    is_pickle,
    storages_of_tar,
    streams,
    tensors_of_tar,
    trailing,
)
from ckpt_cli.scanner.tolerant_zip import zips_within
from ckpt_cli.scanner.torch_zip import lambda_layers, walk_zip, walk_zips
from ckpt_cli.scanner.trace import trace_pickle

if TYPE_CHECKING:
    from ckpt_cli.formats.torch_legacy.tar import Member

Walker = Callable[[ByteSource, str, int, ScanBudget], Walk]

_LOOK = 4096
"""Bytes of a source of no known kind that are traced to see if it may be a pickle."""

_NPY_HEADER = 1 << 20
"""Bytes of an array's header that are looked at."""


def walker_of(source: ByteSource, where: str) -> Walker | None:
    """Return the walker for the pickles of a source, by its content or, for those without a PROTO opcode, its name."""
    head = source.read(0, min(HEAD, source.size))
    walker = next((walker for matches, walker in (*_SURE, *_KINDS) if matches(head)), None)
    if walker is not None:
        return walker
    if head.lstrip()[:1] == b"{" and preface_size(source):
        return _npy
    return _pickles if head and where.lower().endswith(PICKLE_NAMES) else None


def walk(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Every pickle within a source; nothing where it holds none."""
    walker = walker_of(source, where)
    if walker is None:
        yield from guess(source, where, depth, budget)
        return
    yield from enter(walker, source, where, depth, budget)


def enter(walker: Walker, source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """Let a walker find the pickles of a source, within the limits."""
    budget.files += 1
    if budget.files > limits.SCAN_FILES or depth > limits.SCAN_NESTING:
        yield Oddity("warning", "not-searched", where, "files within files beyond the limits: this one was not opened")
        return
    yield from walker(source, where, depth, budget)


def guess(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The pickles of a source of no known kind, if one begins at its first byte."""
    head = memoryview(source.read(0, min(_LOOK, source.size)))  # most sources are numbers, and end here
    trace = trace_pickle(head, 0, budget)
    if source.size <= _LOOK or trace.cut or is_pickle(trace, head):
        data = source.view(0, source.size)
        if source.size > _LOOK:
            trace = trace_pickle(data, 0, budget)
        if is_pickle(trace, data):
            yield from streams(source, where, budget, sure=False)
            yield from _zip_at_the_end(source, where, depth, budget)


def _zip(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from _opened(walk_zips(source, where, depth, budget), budget)


def _opened(found: Iterator[Found | Oddity | Inner], budget: ScanBudget) -> Walk:
    """Yield the findings of a zip file, those of each record in its place."""
    for item in found:
        if not isinstance(item, Inner):
            yield item
            continue
        walker = None
        if item.numbers:  # in which the few bytes that identify most kinds can occur by chance
            head = item.source.read(0, min(HEAD, item.source.size))
            walker = next((walker for matches, walker in _SURE if matches(head)), None)
        else:
            walker = walker_of(item.source, item.where)
        if walker is None:
            yield from guess(item.source, item.where, item.depth, budget)
        else:
            yield from enter(walker, item.source, item.where, item.depth, budget)


def _pickles(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from streams(source, where, budget, sure=True)
    yield from _zip_at_the_end(source, where, depth, budget)


def _zip_at_the_end(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The zip that a pickle ends in: torch looks at the beginning of a file, others at its end."""
    found = next(zips_within(source), None)
    if found is None or not found.members or found.end < source.size:
        return
    if depth > limits.SCAN_NESTING:
        yield Oddity("warning", "not-searched", where, "a zip file within files within files was not opened")
    else:
        yield Oddity("warning", "two-formats", where, "a pickle that is a zip file too, for readers of its end")
        yield from _opened(walk_zip(source, found, where, depth, budget), budget)


def _tar(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The members of a tar file."""
    position = 0
    for member in _members_of_tar(source):
        if member is None:
            yield Oddity("warning", "broken-tar", where, f"a member's header at byte {position} makes no sense")
            break
        position = member.end
        if member.kind not in (b"0", b"\0", b"7") or not member.size:
            continue
        budget.files += 1
        if budget.files > limits.SCAN_FILES:
            yield Oddity("warning", "not-searched", where, "members beyond the limit were not opened")
            return
        part = Window(source, member.begin, member.size)
        yield from _tar_member(part, f"{where}/{member.name}", depth, budget)
    rest = source.view(min(position, source.size), max(source.size - position, 0))
    if any(rest[: 1 << 20]):
        yield from trailing(rest, 0, where, budget)


def _members_of_tar(source: ByteSource) -> Iterator[Member | None]:
    """The members, then None where the file breaks off."""
    from ckpt_cli.formats.torch_legacy.tar import members

    try:
        yield from members(source, tolerant=True)
    except FormatError:
        yield None


def _tar_member(member: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    base = where.rpartition("/")[2]
    special = {"storages": storages_of_tar, "tensors": tensors_of_tar}.get(base)
    if special is not None:
        yield from special(member, where, budget)
    elif base == "pickle":
        yield from streams(member, where, budget, sure=True)
    else:
        yield from walk(member, where, depth + 1, budget)


def _npy(source: ByteSource, where: str, _: int, budget: ScanBudget) -> Walk:
    """Arrays one after another; one of objects is a pickle after a header (numpy/lib/format.py `read_array`)."""
    position = preface_size(source)
    header = _array_header(source, position)
    for _number in range(limits.NPY_ARRAYS):
        if header is None or header.itemsize is None or header.itemsize == PICKLED:
            break
        position += header.nbytes + header.nbytes_of_elements
        header = _array_header(source, position)
    if position and header is None and position < source.size:
        yield from trailing(source.view(position, source.size - position), 0, where, budget)
    elif position < source.size:
        yield from _objects(Window(source, position, source.size - position), where, budget)


def _array_header(source: ByteSource, position: int) -> Header | None:
    """The header of the array that begins at a byte; None where none does."""
    try:
        size = header_size(source.read(position, min(NPY_HEAD, max(source.size - position, 0))))
        return parse_header(source.read(position, size), "array") if position + size <= source.size else None
    except FormatError:
        return None


def _objects(source: ByteSource, where: str, budget: ScanBudget) -> Walk:
    """The pickle of an array of objects, or of one whose header is not what numpy writes."""
    first, length = text_in(source.read(0, min(NPY_HEAD, source.size)))
    begin = first + length
    text = source.read(10, min(length + 2, _NPY_HEADER, source.size - 10)) if source.size > 10 else b""
    if begin < source.size and (b"O" in text or b"object" in text or b"\\" in text or length > _NPY_HEADER):
        yield from streams(Window(source, begin, source.size - begin), where, budget, sure=False)


def _compressed(opener: Callable[[IO[bytes]], IO[bytes]]) -> Walker:
    """A walker for a file that is compressed as a whole."""

    def walker(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
        import io

        room = limits.SCAN_INFLATED - budget.inflated
        try:
            with opener(io.BytesIO(source.view(0, min(source.size, max(room, 0))))) as stream:
                data = stream.read(max(room, 0) + 1)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
            yield Oddity("warning", "not-searched", where, "it is compressed, and does not inflate")
            return
        budget.inflated += len(data)
        if len(data) > room:
            yield Oddity("warning", "not-searched", where, f"it inflates to more than {limits.SCAN_INFLATED} bytes")
        yield from walk(MemorySource(data[: max(room, 0)]), where, depth + 1, budget)

    return walker


def _zlib(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The pickles of what joblib writes with compress=True."""

    def opened(stream: IO[bytes]) -> IO[bytes]:
        import io

        inflater = zlib.decompressobj()
        return io.BytesIO(inflater.decompress(stream.read(), limits.SCAN_INFLATED + 1))

    yield from _compressed(opened)(source, where, depth, budget)


def _closed(kind: str) -> Walker:
    """A walker for what is not opened."""

    def walker(_: ByteSource, where: str, __: int, ___: ScanBudget) -> Walk:
        yield Oddity("warning", "not-searched", where, f"{kind}: unpack it and scan what is in it")

    return walker


def _keras(source: ByteSource, where: str, _: int, budget: ScanBudget) -> Walk:
    """An HDF5 file holds no pickle, but Keras puts the code of Lambda layers into its configuration."""
    room = min(source.size, limits.SCAN_BYTES)
    budget.searched += room
    yield from lambda_layers(source.view(0, room), where)


def _gunzip(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream))


_Kinds = tuple[tuple[Callable[[bytes], bool], Walker], ...]

_SURE: _Kinds = (
    (signatures.is_zip, _zip),
    (signatures.is_tar, _tar),
    (signatures.is_npy, _npy),
)
"""Kinds that enough bytes identify for chance to be excluded."""

_KINDS: _Kinds = (
    (lambda head: head.startswith(signatures.GZIP + b"\x08"), _compressed(_gunzip)),
    (lambda head: head.startswith(signatures.BZIP2), _compressed(bz2.BZ2File)),
    (lambda head: head.startswith((signatures.XZ, b"\x5d\0\0")), _compressed(lzma.LZMAFile)),
    (lambda head: head.startswith((b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")), _zlib),
    (lambda head: head.startswith(signatures.ZSTANDARD), _closed("a zstandard file")),
    (lambda head: head.startswith(signatures.LZ4), _closed("an LZ4 file")),
    (lambda head: head.startswith(signatures.SEVEN_ZIP), _closed("a 7z archive")),
    (lambda head: head.startswith(signatures.RAR), _closed("a RAR archive")),
    (lambda head: head.startswith(signatures.HDF5), _keras),
    (lambda head: signatures.has_proto(head, bytes(range(6))), _pickles),
)
"""Other kinds that can hold pickles, by their first bytes."""
