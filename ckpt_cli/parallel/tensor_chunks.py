"""Values cut into chunks, of which jobs are made (`parallel/map.py`).

A `Source` reads the elements of one view in row-major order, any range of its chunks, which are cut alike whatever the
executor is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.errors import CkptError, UnsupportedError
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, contiguous_stride
from ckpt_cli.parallel.map import JOB, buffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckpt_cli.arrays import codec as codecs

CHUNK = 2 << 20
"""Bytes of a chunk: they stay in the last of the processor's caches while all is asked of them.

Where they were a quarter of it, two threads took as long as one: numpy's calls became so short that the threads spent
their time on waiting for the interpreter's lock.
"""

_GROUP = 16 << 20
"""Bytes that are gathered at once of a view that does not stand row by row."""

_TOUCHED = 32 << 20
"""Bytes of a mapped file that are touched at most before they are given back."""

_EXTENTS = 1_000
"""Places of one storage that are read one by one; what is in more of them is gathered."""

_RUNS = 64
"""Places of a job's bytes that are asked to be read ahead one by one."""


_NOTHING = (0, memoryview(b""))
"""The bytes of a view of which nothing was gathered."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a view's elements in row-major order."""

    begin: int
    end: int
    data: bytes | None = None
    """Its bytes, where they had to be gathered before the job began."""


class Source:
    """Reads the elements of one view, row after row.

    What stands plainly in a file is read by the jobs. What is strided, compressed or stored in pieces is gathered when
    its turn comes, in order, by whoever hands out the jobs. With `any_order` a transposed view is read as it stands.
    With a codec whose elements do not all mean the same, each chunk is a basic index of the region.

    Raises UnsupportedError for a tensor without bytes of its own, and for a view of packed elements that is not plain.
    """

    __slots__ = (
        "_bits", "_by_rows", "_expected", "_extents", "_files", "_group",
        "checkpoint", "codec", "dtype", "path", "plain", "region", "tensor",
    )  # fmt: skip

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensor: Tensor,
        region: Region,
        codec: codecs.Codec | None = None,
        *,
        any_order: bool = False,
    ) -> None:
        if tensor.storage is None:
            raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.codec = codec
        self._bits = tensor.dtype.bits
        self._by_rows = codec is not None and not codec.uniform
        self.region = _in_file_order(region) if any_order and not self._by_rows else region
        self._extents: list[Extent] = []
        self._files: Sequence[SourceFile] = ()
        """The files of the container, which they are in."""
        self._group = _NOTHING
        """The first element of what was last gathered, and its bytes."""
        self._expected = 0
        """Bytes that the system was asked to read ahead."""
        self.plain = self._find_extents()
        """True if the jobs themselves read it."""
        if not self.plain:
            self.gather()

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """Return the state for another process, which reads plain bytes itself; gathered ones come with a chunk."""
        return None, {name: getattr(self, name) for name in _OF_WORKERS}

    def gather(self) -> None:
        """Have it gathered although it stands plainly: its bytes are not what is asked for."""
        from ckpt_cli.arrays.codec import Codec

        self.plain = False
        self.codec = self.codec or Codec(self.tensor)

    @property
    def place(self) -> tuple[int, int]:
        """The file and the byte where it begins; what must be gathered comes last."""
        first = self._extents[0] if self._extents else None
        return (first.file, first.offset) if first is not None else (len(self.checkpoint.container.files), 0)

    @property
    def numel(self) -> int:
        """Elements."""
        return self.region.numel

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take."""
        return self.dtype.nbytes(self.numel)

    def _find_extents(self) -> bool:
        """Find where the bytes stand; False where they cannot simply be read."""
        region, bits = self.region, self._bits
        storage = self.tensor.storage
        if storage is None or not _is_row_major(region) or region.offset * bits % 8:
            return False
        if storage.composed or (bits < 8 and self.codec is not None):
            return False
        with suppress(CkptError):  # compressed
            nbytes = self.nbytes
            self._extents = list(self.checkpoint.container.extents(storage, region.offset * bits // 8, nbytes))
            self._files = self.checkpoint.container.files
            return len(self._extents) <= _EXTENTS and sum(extent.nbytes for extent in self._extents) == nbytes
        return False

    def cuts(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the ranges of its chunks: at most `most` elements each, or those that `CHUNK` bytes hold."""
        nbytes = CHUNK // 2 if self._bits == 16 else CHUNK  # what becomes float32 should stay in the cache too
        most = most or max(8 * nbytes // self._bits, 1)
        numel = self.numel
        if self.plain and not self._by_rows:
            yield from ((at, min(at + most, numel)) for at in range(0, numel, most))
        else:
            yield from row_cuts(self.region.shape, most)

    def chunk(self, begin: int, end: int) -> Chunk:
        """One chunk, ready for a job that may run elsewhere; what must be gathered is gathered now."""
        if not self.plain:
            return Chunk(begin, end, self._gather(begin, end))
        self.expect(end * self._bits // 8)
        return Chunk(begin, end)

    def expect(self, end: int) -> None:
        """Have the bytes before `end`, and somewhat more, read from the disk in order while earlier jobs compute."""
        while self._expected < min(end, self.nbytes):
            begin, self._expected = self._expected, self._expected + JOB
            for file, offset, nbytes in self._runs(begin, min(self._expected, self.nbytes)):
                file.expect(offset, nbytes)

    def _runs(self, begin: int, end: int) -> list[tuple[SourceFile, int, int]]:
        """Return the places of a range of its bytes: file, offset, bytes; none where it is scattered or not known."""
        if self.plain:
            return [(file, offset, nbytes) for file, offset, nbytes, _ in self._places(begin, end)]
        storage = self.tensor.storage
        if storage is not None and _is_row_major(self.region):
            first = self.region.offset * self._bits // 8
            with suppress(CkptError):
                extents = self.checkpoint.container.extents(storage, first + begin, end - begin)
                if len(extents) <= _RUNS:
                    files = self.checkpoint.container.files
                    return [(files[extent.file], extent.offset, extent.nbytes) for extent in extents]
        self._expected = self.nbytes  # it will be no better further on
        return []

    def _places(self, begin: int, end: int) -> Iterator[tuple[SourceFile, int, int, int]]:
        """Yield the places of a range of its bytes: file, offset, bytes, and the offset within the range."""
        at = 0
        for extent in self._extents:
            low, high = max(begin, at), min(end, at + extent.nbytes)
            if low < high:
                yield self._files[extent.file], extent.offset + low - at, high - low, low - begin
            at += extent.nbytes

    def read(self, chunk: Chunk, which: int = 0) -> memoryview:
        """The bytes of a chunk, valid until this thread reads the next one into the same buffer `which`."""
        if chunk.data is not None:
            return memoryview(chunk.data)
        return self.read_bytes(chunk.begin * self._bits // 8, (chunk.end * self._bits + 7) // 8, which)

    def read_bytes(self, begin: int, end: int, which: int = 0) -> memoryview:
        """The same of a range of its bytes, where it is plain."""
        found = buffer(end - begin, which)
        for file, offset, nbytes, at in self._places(begin, end):
            file.read_into(found[at : at + nbytes], offset)
        return found

    def part(self, begin: int, end: int) -> tuple[slice, ...]:
        """The index of a range of elements that `row_cuts` made."""
        return part_at(self.region.shape, begin, end)

    def _gather(self, begin: int, end: int) -> bytes:
        """The bytes of a chunk; a group is gathered at once, because one row of a transposed view touches all pages."""
        first, group = self._group
        size = self._stored_size()
        if not first <= begin <= end <= first + len(group) // size:
            most = JOB if _is_row_major(self.region) else _GROUP
            first, last = row_cut(self.region.shape, begin, max(most // size, 1))
            if end > last:
                first, last = begin, end
            self.expect(last * size + 4 * JOB)
            self.release()  # before the next one is made
            group = self._gathered(self.region.at(self.part(first, last)))
            self._group = first, group
        return bytes(group[(begin - first) * size : (end - first) * size])

    def release(self) -> None:
        """Give back what is held of it, when its last chunk has been asked for."""
        self._group = _NOTHING

    def _stored_size(self) -> int:
        assert self.codec is not None
        return int(self.codec.stored.itemsize)

    def _gathered(self, region: Region) -> memoryview:
        """The stored elements of a region; pages that are touched meanwhile are given back within bounds."""
        import numpy as np

        assert self.codec is not None
        found = np.empty(region.shape, self.codec.stored)
        size = max(self._bits // 8, 1)
        for part in region.pieces(size, _TOUCHED, across_gaps=True):
            found[part] = self._stored(region.at(part), size)
            for file in self.checkpoint.container.files:
                file.forget()
        return found.reshape(-1).view(np.uint8).data

    def _stored(self, region: Region, size: int) -> NDArray[Any]:
        """The stored elements of a part, valid until the next one is asked for.

        What stands in one place is read: where a mapped file becomes shorter, the system ends the process.
        """
        from ckpt_cli.arrays.codec import stored_of

        assert self.codec is not None
        extents: Sequence[Extent] = ()
        low, high = region.span()
        if self.tensor.storage is not None and not self.tensor.storage.composed and self._bits >= 8:
            with suppress(CkptError):  # compressed
                extents = self.checkpoint.container.extents(self.tensor.storage, low * size, (high - low) * size)
        if len(extents) != 1:
            return stored_of(self.tensor, self.codec, region)
        rows = region.rows(size)
        file, nbytes = self.checkpoint.container.files[extents[0].file], rows.length * size
        data = buffer(len(rows.begins) * nbytes, _ROWS)
        for number, begin in enumerate(rows.begins):
            file.read_into(data[number * nbytes : (number + 1) * nbytes], extents[0].offset + (begin - low) * size)
        return self.codec.array(data, rows.region, 0)


_ROWS = 2
"""The number of the buffer for rows that are gathered; 0 and 1 are for chunks."""

_OF_WORKERS = frozenset(["path", "dtype", "region", "plain", "_bits", "_extents", "_files"])
"""The state of a source for a worker that shares no memory."""


def _is_row_major(region: Region) -> bool:
    """True if the elements stand one after the other, whatever the strides of dimensions of one element say."""
    strides = zip(region.shape, region.stride, contiguous_stride(region.shape), strict=True)
    return all(size == 1 or step == expected for size, step, expected in strides)


def _in_file_order(region: Region) -> Region:
    """The same elements, in the order in which they stand; as one row where there are neither gaps nor repetition."""
    dims = [(step, size) for size, step in zip(region.shape, region.stride, strict=True) if size != 1]
    dims.sort(reverse=True)
    shape = tuple(size for _, size in dims)
    stride = tuple(step for step, _ in dims)
    if region.numel and stride == contiguous_stride(shape):
        return Region((region.numel,), (1,), region.offset)
    return Region(shape, stride, region.offset)


def row_cuts(shape: tuple[int, ...], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `most` elements in row-major order, each of which is a basic index of the shape."""
    begin, numel = 0, prod(shape)
    while begin < numel:
        _, end = row_cut(shape, begin, most)
        yield begin, end
        begin = end


def row_cut(shape: tuple[int, ...], at: int, most: int) -> tuple[int, int]:
    """The one of these ranges that has the element `at`."""
    inner = prod(shape)
    for size in shape:
        inner //= size
        if inner <= most:
            break
    else:
        size, inner = 1, 1
    step = max(most // inner, 1) * inner
    row = at // (size * inner) * (size * inner)
    begin = row + (at - row) // step * step
    return begin, min(begin + step, row + size * inner)


def part_at(shape: tuple[int, ...], begin: int, end: int) -> tuple[slice, ...]:
    """The basic index that selects a range which `row_cuts` made."""
    part: list[slice] = []
    inner = prod(shape)
    whole = False
    for size in shape:
        inner //= max(size, 1)
        if whole:
            part.append(slice(0, size))
            continue
        first, last = begin // inner, (end - 1) // inner
        part.append(slice(first, last + 1))
        whole = first != last
        begin, end = begin - first * inner, end - first * inner
    return tuple(part)
