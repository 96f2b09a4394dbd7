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
from typing import IO, cast

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.errors import FormatError
from ckpt_cli.files.memory import MemorySource
from ckpt_cli.files.source import ByteSource, Window
from ckpt_cli.formats.numpy.npy import HEAD, PICKLED, Header, header_size, parse_header
from ckpt_cli.formats.numpy.preface import preface_size
from ckpt_cli.scanner.streams import Found, Oddity, is_pickle, storages_of_tar, streams, tensors_of_tar
from ckpt_cli.scanner.trace import trace_pickle

Walk = Iterator[Found | Oddity]
Walker = Callable[[ByteSource, str, int, ScanBudget], Walk]

_HEAD = 600
"""Bytes that identify a kind of file; tar has its magic at byte 257."""

_LOOK = 4096
"""Bytes of a source of no known kind that are traced to see if it may be a pickle."""

_BLOCK = 512
"""Bytes of tar's unit."""

_NPY_HEADER = 1 << 20
"""Bytes of an array's header that are looked at."""

PICKLE_NAMES = (".pkl", ".pickle", ".p", ".pk", ".joblib", ".dill", ".debug_pkl")
"""Suffixes of pickles; `.bin`, `.pt`, `.ckpt`, `.dat` and `.data` can be anything."""


def walker_of(source: ByteSource, where: str) -> Walker | None:
    """Return the walker for the pickles of a source, by its content or, for those without a PROTO opcode, its name."""
    head = source.read(0, min(_HEAD, source.size))
    walker = next((walker for matches, walker in (*_SURE, *_KINDS) if matches(head)), None)
    if walker is not None:
        return walker
    if head.lstrip()[:1] == b"{" and preface_size(source):
        return _npy
    return _pickles if head and where.lower().endswith(PICKLE_NAMES) else None


def inner_walker_of(source: ByteSource) -> Walker | None:
    """The same for a record of numbers, in which the few bytes that identify other kinds can occur by chance."""
    head = source.read(0, min(_HEAD, source.size))
    return next((walker for matches, walker in _SURE if matches(head)), None)


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
    from ckpt_cli.scanner.torch_zip import walk_zips  # which needs this module

    yield from walk_zips(source, where, depth, budget)


def _pickles(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    yield from streams(source, where, budget, sure=True)
    yield from _zip_at_the_end(source, where, depth, budget)


def _zip_at_the_end(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The zip that a pickle ends in: torch looks at the beginning of a file, others at its end."""
    from ckpt_cli.scanner.tolerant_zip import zips_within
    from ckpt_cli.scanner.torch_zip import walk_zip

    found = next(zips_within(source), None)
    if found is None or not found.members or found.end < source.size:
        return
    if depth > limits.SCAN_NESTING:
        yield Oddity("warning", "not-searched", where, "a zip file within files within files was not opened")
    else:
        yield Oddity("warning", "two-formats", where, "a pickle that is a zip file too, for readers of its end")
        yield from walk_zip(source, found, where, depth, budget)


def _tar(source: ByteSource, where: str, depth: int, budget: ScanBudget) -> Walk:
    """The members of a tar file (POSIX ustar, and GNU's long names)."""
    position, long_name = 0, None
    while position + _BLOCK <= source.size:
        header = source.read(position, _BLOCK)
        if not any(header):
            break
        size = _tar_number(header[124:136])
        if size is None or position + _BLOCK + size > source.size:
            yield Oddity("warning", "broken-tar", where, f"a member's header at byte {position} makes no sense")
            break
        name = long_name or header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        member = Window(source, position + _BLOCK, max(size, 0))
        long_name = None
        if header[156:157] == b"L":
            long_name = member.read(0, min(member.size, 4096)).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header[156:157] in (b"0", b"\0", b"7") and size:
            budget.files += 1
            if budget.files > limits.SCAN_FILES:
                yield Oddity("warning", "not-searched", where, "members beyond the limit were not opened")
                return
            yield from _tar_member(member, f"{where}/{name}", depth, budget)
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    rest = source.view(min(position, source.size), max(source.size - position, 0))
    if any(rest[: 1 << 20]):
        from ckpt_cli.scanner.streams import trailing

        yield from trailing(rest, 0, where, budget)


def _tar_number(field: bytes) -> int | None:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


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
        from ckpt_cli.scanner.streams import trailing

        yield from trailing(source.view(position, source.size - position), 0, where, budget)
    elif position < source.size:
        yield from _objects(Window(source, position, source.size - position), where, budget)


def _array_header(source: ByteSource, position: int) -> Header | None:
    """The header of the array that begins at a byte; None where none does."""
    try:
        size = header_size(source.read(position, min(HEAD, max(source.size - position, 0))))
        return parse_header(source.read(position, size), "array") if position + size <= source.size else None
    except FormatError:
        return None


def _objects(source: ByteSource, where: str, budget: ScanBudget) -> Walk:
    """The pickle of an array of objects, or of one whose header is not what numpy writes."""
    head = source.read(0, min(12, source.size))
    wide = head[6:7] >= b"\2"
    length = int.from_bytes(head[8:12] if wide else head[8:10], "little")
    begin = (12 if wide else 10) + length
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


def lambda_layers(config: memoryview, where: str) -> Walk:
    """Keras's Lambda layers in a model's configuration: they hold marshalled code that runs when it is loaded."""
    import re

    if re.search(rb'"class_name"\s*:\s*"Lambda"', config):
        yield Oddity("error", "keras-lambda", where, "a Lambda layer, whose code Keras runs when it loads the model")


def _gunzip(stream: IO[bytes]) -> IO[bytes]:
    return cast(IO[bytes], gzip.GzipFile(fileobj=stream))


_Kinds = tuple[tuple[Callable[[bytes], bool], Walker], ...]

_SURE: _Kinds = (
    (lambda head: head[:4] in (b"PK\3\4", b"PK\5\6"), _zip),
    (lambda head: head[257:262] == b"ustar", _tar),
    (lambda head: head[:6] == b"\x93NUMPY", _npy),
)
"""Kinds that enough bytes identify for chance to be excluded."""

_KINDS: _Kinds = (
    (lambda head: head[:3] == b"\x1f\x8b\x08", _compressed(_gunzip)),
    (lambda head: head[:3] == b"BZh", _compressed(bz2.BZ2File)),
    (lambda head: head[:6] == b"\xfd7zXZ\0" or head[:3] == b"\x5d\0\0", _compressed(lzma.LZMAFile)),
    (lambda head: head[:2] in (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda"), _zlib),
    (lambda head: head[:4] == b"\x28\xb5\x2f\xfd", _closed("a zstandard file")),
    (lambda head: head[:4] == b"\x04\x22\x4d\x18", _closed("an LZ4 file")),
    (lambda head: head[:6] == b"7z\xbc\xaf\x27\x1c", _closed("a 7z archive")),
    (lambda head: head[:4] == b"Rar!", _closed("a RAR archive")),
    (lambda head: head[:8] == b"\x89HDF\r\n\x1a\n", _keras),
    (lambda head: head[:1] == b"\x80" and head[1:2] <= b"\5" and len(head) > 1, _pickles),
)
"""Other kinds that can hold pickles, by their first bytes."""
