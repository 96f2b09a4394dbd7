"""The arrays of a `.npy` file: one, or several that were saved one after another.

Repeated `numpy.save` into one open file writes such a stream, and so does Equinox (equinox/_serialisation.py
`tree_serialise_leaves`), which writes Python's numbers by `numpy.save` too. By its users' convention a line of JSON
with the hyperparameters stands before the first array; here that line is the checkpoint's metadata.

The arrays have no names in the file: a single one is called `array`, several `0`, `1` and so on, as the items of a
pickled list are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.errors import FormatError, LimitError, MalformedError, TruncatedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.numpy.npy import ENTRY, HEAD, NAME, PICKLED, Header, header_size, object_entries, parse_header
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.formats.signatures import NUMPY, preface_size
from ckpt_cli.model.checkpoint import Checkpoint, Entry

if TYPE_CHECKING:
    from ckpt_cli.pickles.graph import Graph
_KEPT = 1000
"""Headers that are kept with what they say: most arrays of a model have one that another has, too."""


@dataclass(frozen=True, slots=True)
class _Array:
    """One array of the stream."""

    header: Header
    begin: int
    """The byte of the file that is the first of its header."""
    end: int | None
    """The byte after its last element; None for elements of which the header does not say how long they are."""
    graph: Graph | None = None
    """The pickle of an array with objects in it, where it can be read."""

    @property
    def first(self) -> int:
        """The first byte of its elements."""
        return self.begin + self.header.nbytes


def read(file: SourceFile) -> Checkpoint:
    """Open a file of arrays: their headers are read, no element is.

    Raises MalformedError or TruncatedError for an array that is not whole, LimitError for far too many of them.
    """
    container = PlainFile(file)
    entries: list[Entry] = []
    with about(file.path):
        preface = preface_size(file)
        arrays = list(_arrays(file, preface))
        names = list(map(str, range(len(arrays)))) if len(arrays) > 1 else [ENTRY]
        for name, array in zip(names, arrays, strict=True):
            entries += _entries(name, array, container)
        metadata = _hyperparameters(file.read(0, preface))
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=entries,
        container=container,
        version=_version(arrays),
        metadata=metadata or {},
        top_level=names,
        notes=[f"{preface} bytes of text before the first array that are not JSON"] if metadata is None else [],
        unread=_unread(file, arrays[-1]),
    )


def _entries(name: str, array: _Array, container: PlainFile) -> list[Entry]:
    """An array, or what is in one of objects."""
    if array.graph is not None:
        from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace

        return object_entries(name, array.header, array.graph, PicklePlace(array.first))
    nbytes = array.end - array.first if array.end is not None else 0
    return [array.header.entry(name, container.storage(name, nbytes, array.first))]


def _arrays(file: SourceFile, begin: int) -> Iterator[_Array]:
    """The arrays in their order, up to what is not an array."""
    text = pickles = number = 0
    parse = lru_cache(_KEPT)(parse_header)
    while begin + len(NUMPY) <= file.size or not number:
        if number and file.read(begin, len(NUMPY)) != NUMPY:
            return
        try:
            header = parse(_header(file, begin), ENTRY)
            text += header.nbytes
            pickles += header.itemsize == PICKLED
            if number >= limits.NPY_ARRAYS or text > limits.NPY_HEADERS or pickles > limits.SAVES:
                raise LimitError(f"over {number} arrays stand one after another in it, far more than can be listed")
            graph = _pickle(file, begin + header.nbytes) if header.itemsize == PICKLED else None
            array = _Array(header, begin, _end(file, header, begin, graph), graph)
        except FormatError as error:
            if number and not isinstance(error, LimitError):
                raise type(error)(f"array {number}, which begins at byte {begin}: {error.problem}") from None
            raise
        yield array
        if array.end is None:
            return
        begin, number = array.end, number + 1


def _header(file: SourceFile, begin: int) -> bytes:
    left = file.size - begin
    size = header_size(file.read(begin, HEAD)) if left >= HEAD else HEAD
    if left < size:
        raise TruncatedError(f"a numpy array's header is cut short: the file has {file.size} bytes")
    return file.read(begin, size)


def _pickle(file: SourceFile, first: int) -> Graph | None:
    """Return the pickle that an array's objects are; None for bytes that are not a pickle, whose end is not known."""
    from ckpt_cli.pickles.legacy_save import pickle_at

    try:
        return pickle_at(file, first)
    except MalformedError:
        return None


def _end(file: SourceFile, header: Header, begin: int, graph: Graph | None) -> int | None:
    """The byte after an array's elements; None where only numpy could say it."""
    first = begin + header.nbytes
    if header.itemsize == PICKLED and graph is not None:
        return first + graph.nbytes
    if header.itemsize in (None, PICKLED):
        return None
    end = first + header.nbytes_of_elements
    if end > file.size:
        raise TruncatedError(f"the array needs bytes {first}–{end}, the file has {file.size}")
    return end


def _version(arrays: list[_Array]) -> str:
    said = " and ".join(f"{version}.0" for version in sorted({array.header.version for array in arrays}))
    return f"{len(arrays)} numpy arrays, version {said}" if len(arrays) > 1 else f"numpy array, version {said}"


def _unread(file: SourceFile, last: _Array) -> list[str]:
    """Describe the bytes of the file after the last array that was read."""
    end = last.first if last.end is None else last.end
    rest = file.size - end
    if not rest:
        return []
    if last.end is None:
        return [f"{rest} bytes from byte {end} on, in which the end of an array's elements was not found"]
    return [f"{rest} bytes after the last array that are not an array (byte {end})"]


def _hyperparameters(text: bytes) -> Mapping[str, str] | None:
    """The JSON before the arrays as strings by their keys; None for what is not a JSON object."""
    if not text:
        return {}
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
    except (ValueError, RecursionError):
        pass
    return None
