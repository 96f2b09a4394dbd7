"""Tensors whose elements lie in several files: flat vectors that ranks were given parts of, joined as they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import MalformedError, UnsupportedError, about
from ckpt_cli.files.source import Extent
from ckpt_cli.model.checkpoint import Storage, Tensor, contiguous_stride

_READ = 8 << 20
"""Bytes up to which a range of one file is read rather than mapped."""

Piece = tuple[Storage, int, int]
"""Bytes that stand together: the storage that has them, the first one in it, and how many."""


class Stream:
    """Elements of one dtype that stand one behind another in some vectors, each of which may lie in another file."""

    __slots__ = ("_ends", "_vectors", "dtype", "numel")

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        """Raise MalformedError or UnsupportedError for tensors that are no plain vectors of one dtype."""
        for vector in vectors:
            _require_plain(vector, vectors[0])
        self.dtype: DType = vectors[0].dtype
        self._vectors = vectors
        self._ends = list(accumulate(vector.numel for vector in vectors))
        self.numel = self._ends[-1]
        """Elements in all."""

    def fits(self, other: Stream) -> bool:
        """True if its vectors begin where those of another stream do, but for what comes after that one's end."""
        if len(self._ends) != len(other._ends) or self.numel < other.numel:
            return False
        return all(
            mine == theirs or mine > theirs == other.numel for mine, theirs in zip(self._ends, other._ends, strict=True)
        )

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Yield the pieces of the elements `begin` to `end`, in their order."""
        size = self.dtype.itemsize
        number = bisect_right(self._ends, begin)
        while begin < end:
            vector = self._vectors[number]
            first = self._ends[number] - vector.numel
            stop = min(end, self._ends[number])
            if vector.storage is not None and stop > begin:
                yield vector.storage, (vector.storage_offset + begin - first) * size, (stop - begin) * size
            begin, number = stop, number + 1


def _require_plain(vector: Tensor, other: Tensor) -> None:
    """Raise for a tensor that is not a row of elements in its storage."""
    name = vector.name
    if vector.storage is None or vector.layout != "strided" or vector.conj or vector.neg or vector.big_endian:
        raise UnsupportedError(f"{name!r} is not a plain tensor, but {vector.layout} or stored in another way")
    if vector.dtype.bits % 8 or not vector.is_contiguous:
        raise UnsupportedError(f"{name!r} is {vector.dtype} of stride {list(vector.stride)}, which is not cut by ranks")
    if vector.dtype is not other.dtype:
        raise MalformedError(f"{name!r} is {vector.dtype} and {other.name!r} is {other.dtype}")


class JoinedBytes:
    """The bytes of a tensor of which each of some streams has a part, all parts of one length but the last ones."""

    __slots__ = ("_each", "_first", "_numel", "_path", "_streams")

    def __init__(self, path: str, streams: Sequence[Stream], first: int, each: int, numel: int) -> None:
        """A tensor of `numel` elements; each stream has at most `each` of them, from its element `first` on.

        `path` is that of the checkpoint, for errors.
        """
        self._path = path
        self._streams = streams
        self._first = first
        self._each = max(each, 1)
        self._numel = numel

    @property
    def composed(self) -> bool:
        """True if they lie in more than one place."""
        return len(list(self._pieces(0, self._numel * self._streams[0].dtype.itemsize, 2))) > 1

    def _pieces(self, begin: int, nbytes: int, most: int | None = None) -> Iterator[Piece]:
        """Yield the pieces of a range of bytes, or the first `most` of them."""
        size = self._streams[0].dtype.itemsize
        element, end = begin // size, -(-(begin + nbytes) // size)
        skip, left = begin - element * size, nbytes
        while element < end and most != 0:
            rank = element // self._each
            stop = min(end, (rank + 1) * self._each)
            base = self._first - rank * self._each
            for storage, offset, length in self._streams[rank].pieces(base + element, base + stop):
                taken = min(length - skip, left)
                yield storage, offset + skip, taken
                skip, left = 0, left - taken
                most = None if most is None else most - 1
            element = stop

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the tensor: those of one place as they stand there, else gathered."""
        with about(self._path):
            pieces = list(self._pieces(begin, nbytes))
            if len(pieces) == 1 and nbytes > _READ:
                storage, offset, length = pieces[0]
                return storage.view(offset, length)
            gathered = bytearray(nbytes)
            target, at = memoryview(gathered), 0
            for storage, offset, length in pieces:
                _copy(storage, offset, target[at : at + length])
                at += length
            return memoryview(gathered)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return where a range of its bytes stands, piece by piece; raises UnsupportedError where it is compressed."""
        with about(self._path):
            pieces = self._pieces(begin, nbytes)
            return [found for storage, offset, length in pieces for found in storage.extents(offset, length)]


def joined_tensor(
    path: str, name: str, shape: tuple[int, ...], streams: Sequence[Stream], first: int, each: int
) -> Tensor:
    """A tensor of which each stream has at most `each` elements, from its element `first` on."""
    dtype, numel = streams[0].dtype, prod(shape)
    storage = Storage(name, dtype.nbytes(numel), "cpu", JoinedBytes(path, streams, first, each, numel))
    return Tensor(name, dtype, shape, contiguous_stride(shape), storage)


def _copy(storage: Storage, offset: int, target: memoryview) -> None:
    """Read bytes of a storage into a buffer; they are not mapped, as a mapped file must not become shorter."""
    try:
        extents = storage.extents(offset, len(target))
    except UnsupportedError:  # compressed
        target[:] = storage.view(offset, len(target))
        return
    at = 0
    for extent in extents:
        extent.file.read_into(target[at : at + extent.nbytes], extent.offset)
        at += extent.nbytes
