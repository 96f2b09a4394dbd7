"""Comparing the values of pairs of tensors, chunk by chunk on an executor.

Where both are stored alike, chunks of the same bytes are equal and never decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region, row_cuts
from ckpt_cli.errors import CkptError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.parallel.announced import announce_tensors, places_in
from ckpt_cli.parallel.map import grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import CHUNK, Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from ckpt_cli.arrays.compare import Apart, Sums, Tolerance


class Side:
    """One of the two tensors of a pair."""

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        from ckpt_cli.arrays.codec import as_bytes
        from ckpt_cli.arrays.quantized import codec_of
        from ckpt_cli.arrays.statistics import Numbers

        if tensor.layout == "strided" and not tensor.dtype.is_block:
            tensor = as_bytes(tensor)
        codec = codec_of(checkpoint, tensor)
        flagged = tensor.conj or tensor.neg or tensor.layout == "quantized"
        self.source = TensorReader(checkpoint, tensor, Region.of(tensor), codec)
        self.by_rows = not self.source.plain or not codec.uniform
        self._numbers = Numbers(codec, flagged=flagged, big_endian=tensor.big_endian, magnitudes=False)

        self.stored = self._stored(checkpoint, tensor)
        """Return the key that two sides have in common if the same bytes mean the same values."""

    def _stored(self, checkpoint: Checkpoint, tensor: Tensor) -> tuple[object, ...]:
        scales: tuple[object, ...] = ()
        if tensor.quantizer is not None:
            from ckpt_cli.arrays.quantized import parameters

            quantizer = tensor.quantizer
            scales = (quantizer.scheme, quantizer.axis, *(found.tolist() for found in parameters(checkpoint, tensor)))
        big = tensor.big_endian and tensor.dtype.bits > 8
        return (tensor.dtype.name, tensor.conj, tensor.neg, big, *scales)

    @property
    def per_element(self) -> int:
        """Values that a stored element is: two of packed float4."""
        return 2 if self._numbers.codec.paired else 1

    def values(self, data: memoryview, chunk: Chunk, which: int) -> NDArray[Any]:
        """Return the values of a chunk, flat; valid until this thread asks for others of the same `which`."""
        part = self.source.part(chunk.begin, chunk.end) if not self._numbers.codec.uniform else ()
        return self._numbers.values(data, part, which)


@dataclass(slots=True, eq=False)
class Pair:
    """Two tensors of one shape, and how far they are found to be apart.

    There may be very many, so what reads them is made when their turn comes.
    """

    checkpoints: tuple[Checkpoint, Checkpoint]
    tensors: tuple[Tensor, Tensor]
    tolerance: Tolerance
    found: Apart
    compared: set[int] = field(default_factory=set)
    """The first elements of the chunks whose bytes are not the same in both."""

    @property
    def nbytes(self) -> int:
        """Bytes that both take."""
        return sum(tensor.dtype.nbytes(tensor.numel) for tensor in self.tensors)

    @property
    def place(self) -> tuple[SourceFile, int] | None:
        """Return the file and the byte where the first begins; None where it is compressed."""
        tensor = self.tensors[0]
        if tensor.storage is not None:
            with suppress(CkptError):
                for extent in tensor.storage.extents(tensor.span[0], 1):
                    return extent.file, extent.offset
        return None

    def reader(self) -> Reader:
        """Return a function that compares them; raise UnsupportedError where they cannot be compared."""
        sides = []
        for checkpoint, tensor in zip(self.checkpoints, self.tensors, strict=True):
            with about(checkpoint.path):
                sides.append(Side(checkpoint, tensor))
        return Reader(sides[0], sides[1], self.tolerance)


class Reader:
    """Reads and compares the chunks of a pair."""

    def __init__(self, a: Side, b: Side, tolerance: Tolerance) -> None:
        self.a = a
        self.b = b
        self.tolerance = tolerance
        self.alike = a.stored == b.stored

    def nbytes_of(self, chunk: Chunk) -> int:
        """Bytes that a chunk of both takes."""
        count = chunk.end - chunk.begin
        return sum(side.source.dtype.nbytes(count) for side in (self.a, self.b))

    def chunks(self) -> Iterator[tuple[Chunk, Chunk]]:
        """Yield the chunks of both, which have the same elements."""
        a, b = self.a.source, self.b.source
        most = max(4 * CHUNK // max(a.dtype.bits, b.dtype.bits), 1)  # half a chunk of each
        by_rows = self.a.by_rows or self.b.by_rows
        cuts = (row_cuts(source.region.shape, most) if by_rows else a.cuts(most) for source in (a, b))
        yield from zip(a.chunks(next(cuts)), b.chunks(next(cuts)), strict=True)

    def cost(self, chunk_a: Chunk, chunk_b: Chunk) -> int:
        """Bytes that a chunk of both adds to a job, which ends where a group of chunks does."""
        closes = chunk_a.closes and (chunk_b.closes or chunk_a.group is not None)
        return self.a.source.cost(chunk_a) + self.b.source.cost(chunk_b) if closes else 0

    def compare(self, chunk_a: Chunk, chunk_b: Chunk) -> Apart | None:
        """Return the distance between chunks; None where their bytes are the same. Runs on a worker."""
        from ckpt_cli.arrays.compare import apart, same_bytes

        data_a, data_b = self.a.source.read(chunk_a, 0), self.b.source.read(chunk_b, 1)
        if self.alike and same_bytes(data_a, data_b):
            return None
        values_a, values_b = self.a.values(data_a, chunk_a, 0), self.b.values(data_b, chunk_b, 1)

        def same() -> NDArray[Any]:
            import numpy as np

            rows = (np.frombuffer(data, np.uint8).reshape(values_a.size, -1) for data in (data_a, data_b))
            return np.asarray((next(rows) == next(rows)).all(axis=1))

        begin = chunk_a.begin * self.a.per_element
        whole_bytes = self.alike and self.a.per_element == 1
        return apart(values_a, values_b, same if whole_bytes else None, begin, self.tolerance)

    def squares(self, chunk: Chunk) -> Sums:
        """Return the sums of a chunk that is the same in both. Runs on a worker."""
        from ckpt_cli.arrays.compare import squares_of

        return squares_of(self.b.values(self.b.source.read(chunk, 1), chunk, 1))


def compare_pairs(pairs: Sequence[Pair], executor: Executor, on_progress: OnProgress, *, quick: bool) -> None:
    """Compare all pairs, in the order of the first file; with `quick` no further than the first difference."""
    from ckpt_cli.arrays.compare import together

    total = sum(pair.nbytes for pair in pairs)
    done = 0
    files = pairs[0].checkpoints[0].container.files if pairs else ()
    in_order = in_file_order(pairs, lambda pair: pair.place, files)
    announce_tensors((pair.checkpoints[side], pair.tensors[side]) for pair in in_order for side in (0, 1))
    for size, answers in run(grouped(_items(in_order)), _compare_job, executor, places=places_in):
        for number, begin, found in answers:
            pair = in_order[number]
            pair.found = together(pair.found, found, pair.tolerance.first)
            pair.compared.add(begin)
            if quick and found.differing:
                return
        done += size
        on_progress(done, total)
    if not quick:
        _add_equal_chunks([pair for pair in in_order if pair.found.differing], executor)


def _add_equal_chunks(pairs: Sequence[Pair], executor: Executor) -> None:
    """Add the chunks that are the same in both to the sums of pairs that differ elsewhere: their norms are of all."""
    for found in run(grouped(_equal_items(pairs)), _squares_job, executor, places=places_in):
        for number, sums in found:
            pair = pairs[number]
            pair.found = replace(pair.found, sums=pair.found.sums.plus(sums))


def _equal_items(pairs: Iterable[Pair]) -> Iterator[tuple[tuple[int, Reader, Chunk], int]]:
    for number, pair in enumerate(pairs):
        reader = pair.reader()
        for chunk_a, chunk_b in reader.chunks() if reader.alike else ():
            if chunk_a.begin not in pair.compared:
                yield (number, reader, chunk_b), reader.b.source.cost(chunk_b)


def _squares_job(job: list[tuple[int, Reader, Chunk]]) -> list[tuple[int, Sums]]:
    """Return the sums of the chunks of a job, by the number of their pair."""
    return [(number, reader.squares(chunk)) for number, reader, chunk in job]


_Item = tuple[int, Reader, Chunk, Chunk]
"""The number of a pair, what reads it, and a chunk of both."""


def _items(pairs: Iterable[Pair]) -> Iterator[tuple[_Item, int]]:
    for number, pair in enumerate(pairs):
        reader = pair.reader()
        for chunk_a, chunk_b in reader.chunks():
            yield (number, reader, chunk_a, chunk_b), reader.cost(chunk_a, chunk_b)


def _compare_job(job: list[_Item]) -> tuple[int, list[tuple[int, int, Apart]]]:
    """Return the distances of the chunks of a job and where these begin, equal ones left out, and the bytes of both."""
    answers: list[tuple[int, int, Apart]] = []
    nbytes = 0
    for number, reader, chunk_a, chunk_b in job:
        nbytes += reader.nbytes_of(chunk_a)
        found = reader.compare(chunk_a, chunk_b)
        if found is not None:
            answers.append((number, chunk_a.begin, found))
    return nbytes, answers
