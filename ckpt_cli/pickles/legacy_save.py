"""The stream that torch.save wrote before 1.6: pickles one after another, then each storage's bytes.

Source: torch/serialization.py (`_legacy_save`, `_legacy_load`). The bytes are little-endian whatever the machine that
wrote them, as torch/csrc/serialization.cpp writes them, so what `sys_info` says of its byte order changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ckpt_cli.errors import MalformedError, TruncatedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import Ranges, is_elsewhere
from ckpt_cli.files.copy import long_view
from ckpt_cli.files.source import ByteSource
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.pickles.references import Reference, reference_of
from ckpt_cli.pickles.tensors.arguments import text_of

MAGIC = 0x1950A86A20F9469CFC6C
"""The integer in the first pickle of a save (torch/serialization.py `MAGIC_NUMBER`)."""

MAGIC_BINARY, MAGIC_TEXT = b"\x8a\n" + MAGIC.to_bytes(10, "little") + b".", b"L%dL\n." % MAGIC
"""Its opcodes after the protocol, and those of protocols 0 and 1."""

VERSION = 1001
"""The integer in the second pickle."""

HEAD = 64 << 10
"""Bytes in which all the pickles are of a save that holds one storage and nothing else."""

_WINDOWS = (4 << 10, 32 << 10, 256 << 10, 2 << 20, 16 << 20)
"""Bytes that are read at a time to find the end of a pickle: its length stands nowhere."""

NUMEL = struct.Struct("<q")
"""The header of each storage's bytes: the number of its elements."""


@dataclass(frozen=True, slots=True)
class Save:
    """One save of a stream."""

    graph: Graph
    begin: int
    """The first byte of its main pickle."""
    places: Mapping[str, tuple[int, int]]
    """The first byte of each storage, and how many it has."""
    end: int
    """The byte after its last."""


def is_save(head: bytes) -> bool:
    """True if a save begins so: with the magic number after the protocol (from 4 on, and a frame), or as text."""
    return head[2:15] == MAGIC_BINARY or head[11:24] == MAGIC_BINARY or head.startswith(MAGIC_TEXT)


def pickle_at(source: ByteSource, begin: int) -> Graph:
    """Read the pickle that begins at a byte; offsets in it count from there.

    More and more is read until it ends: first into memory, the rest of a large file mapped.
    """
    left = source.size - begin
    if source.in_memory:
        return read_pickle(long_view(source, begin, left))
    for window in _WINDOWS:
        if window >= left:
            return read_pickle(source.read(begin, left))
        with suppress(TruncatedError):
            return read_pickle(source.read(begin, window))
    return read_pickle(long_view(source, begin, left))


def read_save(source: ByteSource, begin: int, preface: bytes = b"") -> Save:
    """Read the save that begins at a byte: its pickles, and how many elements each storage has.

    `preface` is what another save had before its main pickle, which need not be read again where it is the same.
    Raises MalformedError for what torch does not write, TruncatedError where bytes of a storage are missing.
    """
    known = preface and len(preface) <= source.size - begin and source.read(begin, len(preface)) == preface
    position = begin + len(preface) if known else after_preface(source, begin)
    graph = pickle_at(source, position)
    keys = pickle_at(source, position + graph.nbytes)
    places, end = _places(source, position + graph.nbytes + keys.nbytes, keys.root, graph)
    return Save(graph, position, places, end)


def after_preface(source: ByteSource, position: int) -> int:
    """Return the first byte of the main pickle, after the magic number, the version and the facts of the machine."""
    for expected, what in ((MAGIC, "magic number"), (VERSION, "protocol version"), (None, "")):
        graph = pickle_at(source, position)
        position += graph.nbytes
        if expected is not None and (type(graph.root) is not int or graph.root != expected):
            raise MalformedError(f"the save has another {what} than {expected}")
    return position


def references_by_key(graph: Graph) -> dict[str, Reference]:
    """Return what a stream's pickle says of each storage; as in torch, the first one says how wide an element is."""
    known: dict[str, Reference] = {}
    for node in graph.persistent:
        reference = reference_of(node)
        if reference is not None and reference.dtype is not None:
            known.setdefault(reference.key, reference)
    return known


def _headers(position: int, keys: Sequence[object], known: Mapping[str, Reference]) -> Ranges:
    """Return where the headers of storages stand if these are as long as the pickle says."""
    found: list[tuple[int, int]] = []
    for key in map(text_of, keys):
        if key is None or key not in known:
            break
        found.append((position, NUMEL.size))
        position += NUMEL.size + known[key].numel * known[key].itemsize
    return found


_HEADERS = 2_000
"""Headers of storages that are fetched together."""


def _places(source: ByteSource, position: int, keys: object, graph: Graph) -> tuple[dict[str, tuple[int, int]], int]:
    """Return the first byte and the size of each storage, in the order of their keys, and the byte after the last."""
    if type(keys) is not list:
        raise MalformedError("the save lists its storages in something that is not a list")
    known = references_by_key(graph)
    places: dict[str, tuple[int, int]] = {}
    for number, key in enumerate(map(text_of, keys)):
        if not number % _HEADERS and is_elsewhere(source.whole):
            source.expect_all(_headers(position, keys[number : number + _HEADERS], known))
        if key is None or key not in known or key in places:
            raise MalformedError(f"the save lists a storage {key!r} that nothing refers to, or twice")
        reference = known[key]
        if position + NUMEL.size > source.size:
            raise TruncatedError(f"the file ends before storage {key!r}, {source.size} bytes long")
        (numel,) = NUMEL.unpack(source.read(position, NUMEL.size))
        if numel != reference.numel:
            raise MalformedError(f"storage {key!r} has {numel} elements, the pickle says {reference.numel}")
        position += NUMEL.size
        nbytes = numel * reference.itemsize
        if position + nbytes > source.size:
            raise TruncatedError(
                f"storage {key!r} needs bytes {position}–{position + nbytes}, the file has {source.size}"
            )
        places[key] = position, nbytes
        position += nbytes
    return places, position
