"""Values cut into chunks, of which jobs are made (`parallel/map.py`).

A `TensorReader` reads one view in row-major order, any range of its chunks, which are cut alike by all executors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region, grouped_ranges, part_at, range_cuts, row_cuts
from ckpt_cli.errors import CkptError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import Place, in_place, is_elsewhere, is_left_to_workers
from ckpt_cli.files.copy import near_copy
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.parallel.map import JOB, buffer, kept

if TYPE_CHECKING:
    import numpy as np

    from ckpt_cli.arrays import codec as codecs

CHUNK = 2 << 20
"""Bytes of a chunk: they stay in the last of the processor's caches while all is asked of them.

Where they were a quarter of it, two threads took as long as one: numpy's calls became so short that the threads spent
their time on waiting for the interpreter's lock.
"""

_GROUP = 16 << 20
"""Bytes that are gathered at once of a view that does not stand row by row: one row touches every page of it."""

_TOUCHED = 8 << 20
"""Bytes between the first and the last of the file that are read at once to gather some of them."""

_EXTENTS = 1_000
"""Places of one storage that are read one by one; what is in more of them is gathered."""

_RUNS = 64
"""Places of a chunk, or of a job that is read ahead, that are noted one by one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of a view's elements in row-major order, and what is needed to read it elsewhere."""

    begin: int
    end: int
    places: tuple[Place, ...] = ()
    """The ranges of its bytes, one after another."""
    group: tuple[int, int] | None = None
    """The elements that are gathered together with it, by the worker that reads it."""
    data: bytes | None = None
    """The bytes themselves, where they are compressed or in too many places to read them elsewhere."""

    @property
    def closes(self) -> bool:
        """True if a job may end after it: the chunks of a group belong to one job."""
        return self.group is None or self.end == self.group[1]


class TensorReader:
    """Reads the elements of one view, row after row.

    Each job reads its chunks itself, whether these stand plainly in a file or with gaps, as those of a transposed view
    do. Only what is compressed, packed or in very many places is gathered when its turn comes, in order, by whoever
    hands out the jobs. With `any_order` a transposed view is read as it stands. With a codec whose elements do not all
    mean the same, each chunk is a basic index of the region.

    Raises UnsupportedError for a tensor without bytes of its own, or whose elements cannot be read one by one: this is
    the one place where bytes are taken for values.
    """

    __slots__ = (
        "_by_rows", "_expected", "_flags", "_is_scattered", "_near", "_origin", "_places", "_size",
        "checkpoint", "codec", "dtype", "path", "place", "plain", "region", "tensor",
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
        from ckpt_cli.arrays.codec import Codec, require_plain

        if tensor.storage is None:
            raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
        if codec is None:
            require_plain(tensor)
        self.checkpoint = checkpoint
        self.path = checkpoint.path
        self.tensor = tensor
        self.dtype = tensor.dtype
        self.codec = codec
        self._by_rows = codec is not None and not codec.uniform
        self.region = region.in_file_order() if any_order and not self._by_rows else region
        self._flags = _flags_of(tensor)
        """The tensor without its bytes, where its elements are not stored little-endian and as they are."""
        self._size = 1 if tensor.dtype.elements > 1 else tensor.dtype.itemsize
        """Bytes of an element once it is read; packed ones are unpacked."""
        self._expected = 0
        """Bytes that the system was asked to read ahead."""
        self._is_scattered = False
        """True if a range of it was in so many places that it has to be gathered."""
        self.place: tuple[SourceFile, int] | None = None
        """The file and the byte where it begins; None for what must be gathered in order."""
        self._places: Sequence[Place] = ()
        """The ranges of all of it."""
        self._near: tuple[SourceFile, int] | None = None
        """The same in a copy of the bytes of a file elsewhere, which are gone through again and again."""
        self._origin: tuple[SourceFile, int] | None = None
        """The file and the byte where the storage's first element stands, where each job gathers by itself."""
        self.plain = self._find_places()
        """True if the elements stand one after another, so that no job has to gather them."""
        if not self.plain and not self._find_origin():
            self.codec = codec or Codec(tensor)

    def __getstate__(self) -> tuple[None, dict[str, object]]:
        """Return the state for another process: chunks say where their bytes are."""
        return None, {"_near": None, **{name: getattr(self, name) for name in _OF_WORKERS}}

    @property
    def numel(self) -> int:
        """Elements."""
        return self.region.numel

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take."""
        return self.dtype.nbytes(self.numel)

    @property
    def sends_bytes(self) -> bool:
        """True if chunks may carry their bytes, because no worker can read them for itself."""
        return not self.plain and self._origin is None

    def _find_places(self) -> bool:
        """Find where the bytes stand; False where they cannot simply be read."""
        storage = self.tensor.storage
        if storage is None or storage.composed or self.dtype.elements > 1 or not self.region.is_row_major:
            return False
        with suppress(CkptError):  # compressed
            extents = storage.extents(self.region.offset * self._size, self.nbytes)
            if len(extents) > _EXTENTS or sum(extent.nbytes for extent in extents) != self.nbytes:
                return False
            self._places = [(extent.file, extent.offset, extent.nbytes) for extent in extents]
            if extents:
                self.place = (extents[0].file, extents[0].offset)
            return True
        return False

    def _find_origin(self) -> bool:
        """Find where the storage stands in one piece, as far as the view reaches; False where it does not."""
        storage, size = self.tensor.storage, self._size
        if storage is None or storage.composed or self.dtype.elements > 1 or self.region.is_row_major:
            return False
        low, high = self.region.span()
        with suppress(CkptError):  # compressed
            extents = storage.extents(low * size, (high - low) * size)
            if len(extents) == 1:
                file, offset = self.place = extents[0].file, extents[0].offset
                self._origin = file, offset - low * size
                return True
        return False

    def cuts(self, most: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the ranges of its chunks: at most `most` elements each, or those that `CHUNK` bytes hold."""
        nbytes = CHUNK // 2 if self._size == 2 else CHUNK  # what becomes float32 should stay in the cache too
        most = most or max(nbytes * self.dtype.elements // self.dtype.block_nbytes, 1)
        numel = self.numel
        if self.plain and not self._by_rows:
            yield from ((at, min(at + most, numel)) for at in range(0, numel, most))
        else:
            yield from row_cuts(self.region.shape, most)

    def chunks(self, cuts: Iterable[tuple[int, int]]) -> Iterator[Chunk]:
        """Yield the chunks of some ranges that follow each other, ready for jobs that may run elsewhere."""
        if self.plain:
            for begin, end in cuts:
                self.expect(end * self._size)
                yield self.chunk(begin, end)
            return
        self._fetch_to_gather()
        in_order = self._origin is None and self.region.is_row_major
        for group in grouped_ranges(cuts, max((JOB if in_order else _GROUP) // self._size, 1)):
            first, last = group[0][0], group[-1][1]
            if self._origin is not None:
                yield from (Chunk(begin, end, group=(first, last)) for begin, end in group)
                continue
            self.expect(last * self._size + 4 * JOB)
            places = [self._few_places(*cut) for cut in group] if in_order else []
            if places and all(places):
                yield from (Chunk(*cut, places=where) for cut, where in zip(group, places, strict=True))
                continue
            data = self._gathered(first, last)
            size = self._size
            for begin, end in group:
                yield Chunk(begin, end, data=bytes(data[(begin - first) * size : (end - first) * size]))

    def _fetch_to_gather(self) -> None:
        """Copy what lies elsewhere to this machine where more than one group is gathered of it."""
        if self._origin is not None and self._near is None and self.nbytes > _GROUP:
            file, offset = self._origin
            if is_elsewhere(file):
                low, high = (place * self._size for place in self.region.span())
                self._near = near_copy(file, offset + low, high - low), -low

    def _few_places(self, begin: int, end: int) -> tuple[Place, ...]:
        """Return the places of a range of elements that is stored in several chunks; none if they are too many."""
        storage, first, size = self.tensor.storage, self.region.offset, self._size
        if storage is None or not storage.composed or self._is_scattered or self.dtype.elements > 1:
            return ()
        with suppress(CkptError):  # compressed
            extents = storage.extents((first + begin) * size, (end - begin) * size)
            if len(extents) <= _RUNS:
                return tuple((extent.file, extent.offset, extent.nbytes) for extent in extents)
        self._is_scattered = True
        return ()

    def chunk(self, begin: int, end: int) -> Chunk:
        """One chunk by itself."""
        if not self.plain:
            return next(self.chunks([(begin, end)]))
        return Chunk(begin, end, tuple(self._places_of(begin * self._size, end * self._size)))

    def cost(self, chunk: Chunk) -> int:
        """Bytes that a chunk adds to a job; the last chunk of a group adds those of the group."""
        begin, end = chunk.group or (chunk.begin, chunk.end)
        return self.dtype.nbytes(end - begin) if chunk.closes else 0

    def expect(self, end: int) -> None:
        """Have the bytes before `end`, and somewhat more, read in order while earlier jobs compute here."""
        while self._expected < min(end, self.nbytes) and not is_left_to_workers():
            begin, self._expected = self._expected, self._expected + JOB
            runs = self._runs(begin, min(self._expected, self.nbytes))
            for file, offset, nbytes in runs:
                file.expect(offset, nbytes)
            if not runs:
                self._expected = self.nbytes  # it will be no better further on

    def all_places(self) -> list[Place]:
        """Return the places of all of its bytes, as far as it is known that all of these are read."""
        return list(self._places) if self.plain else self._runs(0, self.nbytes)

    def _runs(self, begin: int, end: int) -> list[Place]:
        """Return the places of a range of its bytes; none where it is scattered or not known."""
        if self.plain:
            return list(self._places_of(begin, end))
        storage = self.tensor.storage
        if storage is not None and self.region.is_row_major:
            first = self.dtype.byte_range(0, self.region.offset)[1]
            with suppress(CkptError):
                extents = storage.extents(first + begin, end - begin)
                if len(extents) <= _RUNS:
                    return [(extent.file, extent.offset, extent.nbytes) for extent in extents]
        return []

    def _places_of(self, begin: int, end: int) -> Iterator[Place]:
        """Yield the places of a range of its bytes."""
        at = 0
        for file, offset, nbytes in self._places:
            low, high = max(begin, at), min(end, at + nbytes)
            if low < high:
                yield file, offset + low - at, high - low
            at += nbytes

    def read(self, chunk: Chunk, which: int = 0) -> memoryview:
        """Return the bytes of a chunk as stored, valid until this thread reads the next one with the same `which`."""
        if chunk.data is not None:
            return memoryview(chunk.data)
        if chunk.group is not None:
            return self._in_group(chunk, chunk.group, which)
        if len(chunk.places) == 1 and (fetched := in_place(*chunk.places[0])) is not None:
            return fetched
        found = rest = buffer((chunk.end - chunk.begin) * self._size, which)
        for file, offset, nbytes in chunk.places:
            file.read_into(rest[:nbytes], offset)
            rest = rest[nbytes:]
        return found

    def read_plainly(self, chunk: Chunk) -> memoryview:
        """Return the same, little-endian and without lazy negation or conjugation."""
        if self._flags is None:
            return self.read(chunk)
        from ckpt_cli.arrays.codec import little_endian

        return memoryview(little_endian(self._flags, bytes(self.read(chunk))))

    def pieces(self, chunk: Chunk) -> Iterator[memoryview]:
        """Yield the bytes of a long chunk as `read_plainly` has them, each piece valid until the next one."""
        if self._flags is not None or not chunk.places:
            yield self.read_plainly(chunk)
            return
        for file, offset, nbytes in chunk.places:
            for at in range(offset, offset + nbytes, CHUNK):
                count = min(CHUNK, offset + nbytes - at)
                if (data := in_place(file, at, count)) is None:
                    file.read_into(data := buffer(count), at)
                yield data

    def read_all(self, most: int, *, plainly: bool = False) -> Iterator[memoryview]:
        """Yield the bytes of all elements, about `most` bytes at a time, each piece valid until the next one.

        They are as stored, or `plainly` little-endian and without flags.
        """
        for chunk in self.chunks(self.cuts(max(most // self._size, 1))):
            yield self.read_plainly(chunk) if plainly else self.read(chunk)
        kept().clear()

    def part(self, begin: int, end: int) -> tuple[slice, ...]:
        """Return the index of a range of elements that `row_cuts` made."""
        return part_at(self.region.shape, begin, end)

    def _in_group(self, chunk: Chunk, group: tuple[int, int], which: int) -> memoryview:
        """Return the bytes of a chunk of a group, which this thread gathers once."""
        groups = kept()
        data: memoryview
        source, known, data = groups.get(which, (None, None, memoryview(b"")))
        if source is not self or known != group:
            groups.pop(which, None)
            data = memoryview(b"")  # before the next one is made
            data = self._gathered(*group)
            groups[which] = (self, group, data)
        first, size = group[0], self._size
        return data[(chunk.begin - first) * size : (chunk.end - first) * size]

    def _gathered(self, begin: int, end: int) -> memoryview:
        """Return the stored elements of a range, which a piece of the file after the other has."""
        import numpy as np

        raw = np.dtype(_RAW[self._size])
        found = np.empty(end - begin, raw)
        for first, last in range_cuts(self.region.shape, begin, end):
            region = self.region.at(self.part(first, last))
            rows = found[first - begin : last - begin].reshape(region.shape)
            for part in region.pieces(self._size, _TOUCHED, across_gaps=True):
                rows[part] = self._stored(region.at(part), raw)
        return found.view(np.uint8).data

    def _stored(self, region: Region, raw: np.dtype[Any]) -> Any:
        """Return the stored elements of a part as an array, valid until the next one is asked for.

        What stands in one place is read: where a mapped file becomes shorter, the system ends the process.
        """
        import numpy as np

        if self._origin is None:
            from ckpt_cli.arrays.codec import stored_of

            assert self.codec is not None
            found = stored_of(self.tensor, self.codec, region)
            for file in self.checkpoint.container.files:
                file.forget()
            return found.view(raw)
        file, offset = self._near or self._origin
        size = self._size
        rows = region.rows(size)
        nbytes = rows.length * size
        data = buffer(len(rows.begins) * nbytes, _ROWS)
        for number, begin in enumerate(rows.begins):
            file.read_into(data[number * nbytes : (number + 1) * nbytes], offset + begin * size)
        strides = [size * step for step in rows.region.stride]
        return np.ndarray(rows.region.shape, raw, data, rows.region.offset * size, strides)


_RAW = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""By their bytes, elements that are moved as they are."""

_ROWS = 2
"""The number of the buffer for rows that are gathered; 0 and 1 are for chunks."""

_OF_WORKERS = frozenset(["path", "dtype", "region", "_flags", "_origin", "_size"])
"""The state of a source for a worker that shares no memory."""


def _flags_of(tensor: Tensor) -> Tensor | None:
    """Return a tensor without what it is made of, if its bytes must be changed to be plain and little-endian."""
    if not (tensor.conj or tensor.neg or (tensor.big_endian and tensor.dtype.bits > 8)):
        return None
    return replace(tensor, shape=(0,), stride=(1,), storage=Storage("", 0), storage_offset=0, parts=())
