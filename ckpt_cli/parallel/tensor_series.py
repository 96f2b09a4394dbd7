"""The values of one tensor in several checkpoints, chunk by chunk on an executor: every byte is read once.

A job reads the same elements of each checkpoint, one after another, and keeps those of the one before. Where both
are stored alike, chunks of the same bytes are not summed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_cli.arrays.indexing import Index, Region, row_cuts
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.source import SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.parallel.announced import announce_tensors, places_in
from ckpt_cli.parallel.map import JOB, grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import CHUNK, Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from ckpt_cli.arrays.moments import Moments

_LEAST = 64 << 10
"""Bytes of a chunk that is sent to a worker, at least."""


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor, or a part of it, in one of the checkpoints."""

    step: int
    """The number of the checkpoint."""
    checkpoint: Checkpoint
    budget: Budget
    tensor: Tensor
    region: Region
    index: Index


@dataclass(slots=True)
class Found:
    """The summary of a tensor's values in one checkpoint."""

    moments: Moments
    moved: float | None
    """The sum of the squares of the differences from the checkpoint before; None for the first of a run."""


@dataclass(slots=True, eq=False)
class Track:
    """One tensor in checkpoints that follow each other, of one shape in all of them; and what was found.

    There may be very many, so what reads them is made when their turn comes.
    """

    places: Sequence[Place]
    found: Sequence[Found] = ()
    errors: dict[int, CkptError | OSError] = field(default_factory=dict)
    """For steps whose values could not be read, the first error."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(place.tensor.dtype.nbytes(place.region.numel) for place in self.places)

    @property
    def place(self) -> tuple[SourceFile, int] | None:
        """Return the file and the byte where the first begins; None where it is compressed."""
        first = self.places[0]
        if first.tensor.storage is not None:
            begin, end = first.tensor.span
            try:
                extents = first.tensor.storage.extents(begin, end - begin)
            except CkptError:
                return None
            if extents:
                return extents[0].file, extents[0].offset
        return None


Key = TypeVar("Key")


def tracks_of(places: Mapping[Key, Sequence[Place]]) -> tuple[list[Track], list[tuple[Key, Track]]]:
    """Return what is to be read, which tied names share, and the pairs of a tensor's key and one of its tracks.

    The places of a key are in the order of their checkpoints.
    """
    known: dict[object, Track] = {}
    owners: list[tuple[Key, Track]] = []
    for name, of_name in places.items():
        for run_of_places in _runs(of_name):
            views = tuple((place.step, place.tensor.view or id(place.tensor), place.region) for place in run_of_places)
            owners.append((name, known.setdefault(views, Track(run_of_places))))
    return list(known.values()), owners


def _runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Yield the places of a tensor in files that follow each other, as long as it keeps its shape."""
    found: list[Place] = []
    for place in places:
        if found and (place.step != found[-1].step + 1 or place.region.shape != found[-1].region.shape):
            yield found
            found = []
        found.append(place)
    if found:
        yield found


class _Side:
    """Reads and summarizes the tensor of one checkpoint."""

    def __init__(self, place: Place, *, any_order: bool) -> None:
        from ckpt_cli.arrays.quantized import codec_of
        from ckpt_cli.arrays.statistics import Numbers, summer_of

        tensor = place.tensor
        codec = codec_of(place.checkpoint, tensor).at(place.index)
        flagged = tensor.conj or tensor.neg or tensor.layout == "quantized"
        self.source = TensorReader(place.checkpoint, tensor, place.region, codec, any_order=any_order)
        self.budget: Budget | None = place.budget
        self.summer = summer_of(codec, flagged=flagged, big_endian=tensor.big_endian)
        self._numbers = Numbers(codec, flagged=flagged, big_endian=tensor.big_endian, magnitudes=False)
        self.by_rows = not codec.uniform
        quantizer = tensor.quantizer
        self.stored = None if quantizer else (tensor.dtype.name, tensor.conj, tensor.neg, tensor.big_endian)
        """The key that two sides have in common if the same bytes mean the same values; None if nothing says so."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker in another process."""
        return {**self.__dict__, "budget": None}

    def chunk(self, begin: int, end: int) -> Chunk:
        """Return a chunk; what has to be gathered in order is, as a request for this checkpoint."""
        assert self.budget is not None
        self.budget.begun()
        return next(self.source.chunks([(begin, end)]))

    def values(self, data: memoryview, chunk: Chunk, which: int) -> NDArray[Any]:
        """Return the values of a chunk, flat; valid until this thread asks for others of the same `which`."""
        from ckpt_cli.arrays.statistics import Codes

        if isinstance(self.summer, Codes):
            return self.summer.narrow(data, which)
        part = self.source.part(chunk.begin, chunk.end) if self.by_rows else ()
        return self._numbers.values(data, part, which)

    def summary(self, data: memoryview, values: NDArray[Any]) -> Any:
        """Return the moments of a chunk, or the counts of its codes."""
        from ckpt_cli.arrays.change import moments_of
        from ckpt_cli.arrays.statistics import Codes, magnitudes

        if isinstance(self.summer, Codes):
            return self.summer.chunk(data, ())
        return moments_of(magnitudes(values) if values.dtype.kind == "c" else values)


_Error = CkptError | OSError

_Answer = tuple[Any, float | None] | _Error
"""Of a chunk in one checkpoint: its summary and how far it moved, or the error of reading it."""


class _Reader:
    """Reads the chunks of a track, and gathers what is found of them."""

    def __init__(self, track: Track) -> None:
        strides = {place.region.stride for place in track.places}
        self.sides = [_Side(place, any_order=len(strides) == 1) for place in track.places]
        self._track: Track | None = track
        self._summaries: list[Any] = [None] * len(self.sides)
        self._moved: list[float | None] = [None, *[0.0] * (len(self.sides) - 1)]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker in another process, without the results so far."""
        return {"sides": self.sides}

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of elements of the chunks, which are the same of all checkpoints."""
        sources = [side.source for side in self.sides]
        size = max(max(source.dtype.bits // 8, 1) for source in sources)
        nbytes = CHUNK if size != 2 else CHUNK // 2
        if any(source.sends_bytes for source in sources):
            nbytes = min(nbytes, max(JOB // len(sources), _LEAST))
        most = max(nbytes // size, 1)
        if all(source.plain and not side.by_rows for source, side in zip(sources, self.sides, strict=True)):
            yield from sources[0].cuts(most)
        else:
            yield from row_cuts(sources[0].region.shape, most)

    def chunks(self) -> Iterator[list[Chunk | _Error]]:
        """Yield the same chunk of every checkpoint; the error of one that cannot be read is in place of its chunks."""
        failed: dict[int, _Error] = {}
        for cut in self.cuts():
            row: list[Chunk | _Error] = []
            for number, side in enumerate(self.sides):
                if number not in failed:
                    try:
                        row.append(side.chunk(*cut))
                        continue
                    except (CkptError, OSError) as error:
                        failed[number] = error
                row.append(failed[number])
            yield row

    def cost(self, chunks: Iterable[Chunk | _Error]) -> int:
        """Bytes that a chunk of every checkpoint adds to a job."""
        sides = zip(self.sides, chunks, strict=True)
        return sum(side.source.cost(chunk) for side, chunk in sides if isinstance(chunk, Chunk))

    def nbytes(self, chunks: Iterable[Chunk | _Error]) -> int:
        """Bytes of a chunk of every checkpoint."""
        sides = zip(self.sides, chunks, strict=True)
        return sum(side.source.dtype.nbytes(c.end - c.begin) for side, c in sides if isinstance(c, Chunk))

    def follow(self, chunks: Sequence[Chunk | _Error]) -> list[_Answer]:
        """Summarize one chunk in every checkpoint, each beside the one before; runs on a worker."""
        found: list[_Answer] = []
        before: _Seen | None = None
        for number, (side, chunk) in enumerate(zip(self.sides, chunks, strict=True)):
            now = _seen(side, chunk, number % 2, before) if isinstance(chunk, Chunk) else chunk
            before = now if isinstance(now, _Seen) else None
            found.append((now.summary, now.moved) if isinstance(now, _Seen) else now)
        return found

    def add(self, answers: Sequence[_Answer]) -> None:
        """Add what was found of the next chunk."""
        from ckpt_cli.arrays.statistics import add

        assert self._track is not None
        for number, answer in enumerate(answers):
            if isinstance(answer, CkptError | OSError):
                self._track.errors.setdefault(self._track.places[number].step, answer)
                continue
            summary, moved = answer
            self._summaries[number] = add(self._summaries[number], summary)
            before = self._moved[number]
            self._moved[number] = None if before is None or moved is None else before + moved

    def finish(self) -> None:
        """Note what was found of all chunks."""
        assert self._track is not None
        self._track.found = [
            Found(replace(side.summer.total(summary), below=()), moved)
            for side, summary, moved in zip(self.sides, self._summaries, self._moved, strict=True)
        ]


class _Seen:
    """A chunk in one checkpoint, as long as the next one needs it; it becomes numbers when these are asked for."""

    def __init__(self, side: _Side, chunk: Chunk, which: int) -> None:
        self.side = side
        self.data = side.source.read(chunk, which)
        self.summary: Any = None
        self.moved: float | None = None
        self._chunk = chunk
        self._which = which
        self._values: NDArray[Any] | None = None

    def values(self) -> NDArray[Any]:
        """Return its numbers, flat."""
        if self._values is None:
            self._values = self.side.values(self.data, self._chunk, self._which)
        return self._values

    def after(self, before: _Seen | None) -> _Seen:
        """Summarize it, beside the same chunk of the checkpoint before; returns itself."""
        from ckpt_cli.arrays.change import moved
        from ckpt_cli.arrays.compare import same_bytes

        stored = self.side.stored
        alike = before is not None and stored is not None and stored == before.side.stored
        if before is not None and alike and same_bytes(self.data, before.data):
            self.summary, self.moved = before.summary, 0.0
            return self
        self.moved = None if before is None else moved(before.values(), self.values())
        self.summary = self.side.summary(self.data, self.values())
        return self


def _seen(side: _Side, chunk: Chunk, which: int, before: _Seen | None) -> _Seen | _Error:
    """Return a chunk with its summary, or the error of reading it."""
    try:
        return _Seen(side, chunk, which).after(before)
    except (CkptError, OSError) as error:
        return error


def follow(tracks: Sequence[Track], executor: Executor, on_progress: OnProgress) -> None:
    """Fill in what is found of every track, in the order of the first file."""
    total = sum(track.nbytes for track in tracks)
    done = 0
    files = dict.fromkeys(file for track in tracks for file in track.places[0].checkpoint.container.files)
    in_order = in_file_order(tracks, lambda track: track.place, list(files))
    readers: dict[int, _Reader] = {}
    last = 0
    places = (place for track in in_order for place in track.places if place.region.numel == place.tensor.numel)
    announce_tensors((place.checkpoint, place.tensor) for place in places)
    for answers in run(grouped(_items(in_order, readers)), _follow_job, executor, places=_places_in):
        for number, nbytes, found in answers:
            for finished in range(last, number):
                readers.pop(finished).finish()
            last = number
            readers[number].add(found)
            done += nbytes
        on_progress(done, total)
    for reader in readers.values():
        reader.finish()


_Item = tuple[int, _Reader, "list[Chunk | _Error]"]
"""The number of a track, what reads it, and a chunk of every checkpoint."""


def _items(tracks: Iterable[Track], readers: dict[int, _Reader]) -> Iterator[tuple[_Item, int]]:
    for number, track in enumerate(tracks):
        reader = readers[number] = _Reader(track)
        for chunks in reader.chunks():
            yield (number, reader, chunks), reader.cost(chunks)


def _places_in(job: list[_Item]) -> list[tuple[SourceFile, int, int]]:
    """Return what a job reads."""
    return places_in(row for _, _, row in job)


def _follow_job(job: list[_Item]) -> list[tuple[int, int, list[_Answer]]]:
    """Follow each chunk of a job: the number of its track, its bytes in all checkpoints, and what was found."""
    return [(number, reader.nbytes(chunks), reader.follow(chunks)) for number, reader, chunks in job]
