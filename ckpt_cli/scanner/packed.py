"""Data that is compressed, or encoded as text, decoded within the limits of a scan.

A stream that breaks yields what stands before the break, as the readers of these formats hand that out too.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import signatures
from ckpt_cli.scanner.alphabets import runs, whole
from ckpt_cli.scanner.transforms import OPENERS, backwards, narrowed

_FEED = 1 << 16
"""Compressed bytes that are handed to a decoder at once."""

_PIECE, _LARGE = 1 << 12, 1 << 18
"""Bytes that a decoder is asked for at once, in the first MiB and beyond: what stands before a break is not lost."""

_XZ_MEMORY = 128 << 20
"""Bytes of memory that a decoder of xz may take: what its strongest preset takes."""

_ZFILE = 21
"""Bytes of the header of a file of joblib before 0.9.3: `ZF` and the size as text."""

Decode = Callable[[memoryview], Iterator[bytes]]
"""Yields the decoded pieces of some data; raises one of `_BROKEN` where it breaks."""

_BROKEN = (OSError, EOFError, ValueError, RuntimeError, MemoryError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Packing:
    """A way in which a file, a record or a string may be compressed."""

    name: str
    matches: Callable[[bytes], bool]
    """True for data that begin so."""
    decode: Decode | None
    """None where it cannot be decoded here."""
    sure: bool = True
    """True if enough bytes identify it for chance to be excluded."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What became of compressed data."""

    data: memoryview
    """The decoded bytes, as far as the limits go or up to a break."""
    broken: bool
    """True if they break off."""
    cut: bool
    """True if there are more than the limits allow."""


# --- compressions -----------------------------------------------------------------------------------------------------


def _decoder(new: Callable[[], Any]) -> Decode:
    """Return a function that decodes one stream after another by objects as those of `zlib`, `bz2` and `lzma`."""

    def decode(data: memoryview) -> Iterator[bytes]:
        position = produced = 0
        while position < len(data):
            engine = new()
            while not engine.eof and position < len(data):
                pending: Any = data[position : position + _FEED]
                position += len(pending)
                more = True
                while more and not engine.eof:
                    most = _PIECE if produced < 1 << 20 else _LARGE
                    piece = engine.decompress(pending, most)
                    produced += len(piece)
                    yield piece
                    pending = getattr(engine, "unconsumed_tail", b"")
                    more = bool(pending) or len(piece) == most
            position -= len(engine.unused_data)
            if not any(data[position : position + _FEED]):
                return  # the zeros that pad a tape

    return decode


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)


def _zfile(data: memoryview) -> Iterator[bytes]:
    """What joblib wrote before 0.9.3 (joblib/numpy_pickle_compat.py `read_zfile`)."""
    begin = _ZFILE + (data[_ZFILE : _ZFILE + 1].tobytes() == b" ")
    yield from _decoder(zlib.decompressobj)(data[begin:])


def _zstandard() -> Decode | None:
    """Return the decoder of zstandard: of Python 3.14, or of the package `zstandard`; None where there is neither."""
    try:
        return _decoder(import_module("compression.zstd").ZstdDecompressor)
    except ImportError:
        pass
    try:
        module: Any = import_module("zstandard")
    except ImportError:
        return None

    def decode(data: memoryview) -> Iterator[bytes]:
        decompressor = module.ZstdDecompressor(max_window_size=_XZ_MEMORY)
        try:
            with decompressor.stream_reader(bytes(data), read_across_frames=True) as stream:
                while piece := stream.read(_PIECE):
                    yield piece
        except module.ZstdError as error:
            raise ValueError(str(error)) from None

    return decode


def _is_zlib(head: bytes) -> bool:
    """True for the two bytes of a zlib header without a dictionary (RFC 1950)."""
    return (
        len(head) > 2
        and head[0] & 0x0F == 8
        and head[0] >> 4 <= 7
        and not head[1] & 0x20
        and not (head[0] << 8 | head[1]) % 31
    )


def _is_zstandard(head: bytes) -> bool:
    """True for a frame of zstandard, also one that is skipped (RFC 8878)."""
    return head.startswith(signatures.ZSTANDARD) or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)


def _bzip2(head: bytes) -> bool:
    return head[:3] == signatures.BZIP2 and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")


GZIP = Packing(
    "gzip",
    lambda head: head.startswith(signatures.GZIP + b"\x08") and head[3:4] < b"\x20",
    _decoder(lambda: zlib.decompressobj(16 + zlib.MAX_WBITS)),
)
_ZSTANDARD_NAME = "zstandard"

PACKINGS: tuple[Packing, ...] = (
    GZIP,
    Packing("bzip2", _bzip2, _decoder(bz2.BZ2Decompressor)),
    Packing("xz", lambda head: head.startswith(signatures.XZ), _decoder(_xz)),
    Packing(_ZSTANDARD_NAME, _is_zstandard, None),
    Packing("LZ4", lambda head: head.startswith(signatures.LZ4), None),
    Packing("joblib's old zlib", lambda head: head.startswith(b"ZF0x"), _zfile),
    Packing(
        "lzma",
        lambda head: head.startswith(b"\x5d\0") and len(head) > 13,
        _decoder(lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_XZ_MEMORY)),
        sure=False,
    ),
    Packing("zlib", _is_zlib, _decoder(zlib.decompressobj), sure=False),
)  # fmt: skip
"""The compressions that Python's own modules, joblib and zstandard read."""


def packing_of(head: bytes) -> Packing | None:
    """Return the compression of data that begin with some bytes."""
    return next((packing for packing in PACKINGS if packing.matches(head)), None)


def unpack(packing: Packing, data: memoryview, budget: ScanBudget) -> Unpacked | None:
    """Decode what is compressed, within the limits; None where this compression cannot be decoded here."""
    decode = _zstandard() if packing.name == _ZSTANDARD_NAME else packing.decode
    return None if decode is None else take(decode, data, budget)


def take(decode: Decode, data: memoryview, budget: ScanBudget, most: int | None = None) -> Unpacked:
    """Decode data as far as the limits go, or `most` bytes of it."""
    room = budget.room() if most is None else min(most, budget.room())
    found = bytearray()
    broken = cut = False
    try:
        for piece in decode(data):
            found += piece
            if len(found) > room:
                cut = True
                break
    except _BROKEN:
        broken = True
    budget.inflated += len(found)
    return Unpacked(memoryview(found)[:room], broken, cut)


@contextmanager
def held(budget: ScanBudget, nbytes: int) -> Iterator[None]:
    """Count bytes that stay in memory while what is in them is searched."""
    budget.held += nbytes
    try:
        yield
    finally:
        budget.held -= nbytes


# --- methods of zip files ---------------------------------------------------------------------------------------------


def zip_decoder(method: int, nbytes: int) -> Decode | None:
    """Return the decoder of a method of zip files, for a record of `nbytes` bytes; None for one that is not decoded."""
    if method == 8:
        return _decoder(lambda: zlib.decompressobj(-zlib.MAX_WBITS))
    if method == 12:
        return _decoder(bz2.BZ2Decompressor)
    if method == 14:
        return _zip_lzma(nbytes)
    return _zstandard() if method == 93 else None


def _zip_lzma(nbytes: int) -> Decode:
    """LZMA as zip files have it: version, length and properties before a raw stream (APPNOTE 5.8)."""

    def decode(data: memoryview) -> Iterator[bytes]:
        size = int.from_bytes(data[2:4], "little")
        if size != 5 or len(data) < 9 or data[4] >= 225:
            raise ValueError("not the properties of LZMA")
        most = min(max(nbytes, 1 << 12), limits.SCAN_HELD)  # no record needs a dictionary that is larger than itself
        filters = [
            {
                "id": lzma.FILTER_LZMA1,
                "lc": data[4] % 9,
                "lp": data[4] // 9 % 5,
                "pb": data[4] // 45,
                "dict_size": min(max(int.from_bytes(data[5:9], "little"), 1 << 12), most),
            }
        ]
        yield from _decoder(lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters))(data[9:])

    return decode


# --- encodings as text ------------------------------------------------------------------------------------------------

SHORTEST = 24
"""Characters of base64 in which a pickle that calls something has room."""

DECODING_COSTS = 48
"""Opcodes in whose time a text is decoded to see whether it may hide a pickle."""

_ENCODED_AGAIN = re.compile(rb"[A-Za-z0-9+/_=\s-]{24,}")


def decodings(text: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each encoding with the bytes that a text would decode to, if these may hide a pickle."""
    if len(text) < SHORTEST:
        return
    for how, content in whole(text, may_be_packed):
        if may_be_packed(content):
            yield how, content
        elif (turned := backwards(content)) is not None:
            yield f"{how}, reversed", turned
    for how, content in transformed(text):
        if may_be_packed(content):
            yield how, content
    if len(text) >= 40:
        for how, content in runs(text, may_be_packed):
            if may_be_packed(content):
                yield how, content


def transformed(data: bytes | memoryview) -> Iterator[tuple[str, bytes]]:
    """Yield what data are backwards, or as text or numbers of one byte each, if that may hide a pickle."""
    if (turned := backwards(data)) is not None:
        yield "reversed", turned
    yield from narrowed(data, may_be_packed)


def may_be_packed(data: bytes) -> bool:
    """True if decoded bytes may be a pickle that imports something, compressed data, a zip file, or encoded again."""
    head = data[:16]
    if signatures.has_proto(head, bytes(range(6))) or is_container(data[: signatures.HEAD]) or packing_of(head):
        return True
    if head[:1] and head[0] in OPENERS and (data.count(b"\n") > 1 or b"\x93" in data):
        return True
    return len(data) >= SHORTEST and _ENCODED_AGAIN.fullmatch(data[:48]) is not None


def is_container(data: bytes) -> bool:
    """True for a string that is a file of several parts, each of which may be a pickle: a zip, a tar, an array."""
    return data.startswith(signatures.ZIP_RECORD) or signatures.is_tar(data) or signatures.is_npy(data)


INSIDE = re.compile(rb"\x80[\x02-\x05][%b]" % re.escape(bytes(sorted(OPENERS))))
_INSIDE_TEXT = re.compile(INSIDE.pattern.decode("latin-1"))
"""A protocol and an opcode that may follow it."""


def may_hide_inside(text: str | bytes) -> bool:
    """True if a pickle of a protocol from 2 on may begin anywhere in a str or bytes."""
    return (_INSIDE_TEXT.search(text) if isinstance(text, str) else INSIDE.search(text)) is not None


_BEGINNINGS = (signatures.PROTO, signatures.ZIP_RECORD, signatures.GZIP)
_TEXT_BEGINNINGS = tuple(beginning.decode("latin-1") for beginning in _BEGINNINGS)
"""The first bytes of a pickle with a PROTO opcode, a zip and a gzip file."""


def decoding_costs(text: object) -> int:
    """Return the opcodes in whose time `may_hide` looks at a str or bytes."""
    return DECODING_COSTS if isinstance(text, str | bytes) and len(text) >= SHORTEST else 0


def may_hide(text: object) -> bool:
    """True if a str or bytes may be a pickle that imports something: it begins as one, has its lines, or is packed."""
    if isinstance(text, str):
        if text.startswith(_TEXT_BEGINNINGS) or text.count("\n") > 1 or "\x93" in text or may_hide_inside(text):
            return True
        if len(text) < SHORTEST:
            return len(text) > 2 and packing_of(text[:16].encode("latin-1", "replace")) is not None
        data = text.encode("latin-1", "replace")
    elif isinstance(text, bytes):
        if text.startswith(_BEGINNINGS) or text.count(b"\n") > 1 or b"\x93" in text or may_hide_inside(text):
            return True
        data = text
    else:
        return False
    return signatures.is_tar(data) or packing_of(data[:16]) is not None or next(decodings(data), None) is not None
