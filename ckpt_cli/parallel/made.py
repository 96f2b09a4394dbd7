"""Storages whose bytes are made of those of other tensors when they are read, piece by piece on an executor.

Everything that reads or writes a checkpoint takes such a storage like any other: its bytes are those of no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, runtime_checkable

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import Extent
from ckpt_cli.parallel.map import run, shares_memory
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from ckpt_cli.arrays.cast import Cast

PIECE = 256 << 10
"""Elements that are made at a time: with their sources they stay in the processor's cache."""

_AHEAD = 8
"""Pieces that are made, or wait for that, before the first of them is asked for."""

Facts = TypeVar("Facts")


@runtime_checkable
class Making(Protocol):
    """Makes elements of those of other tensors; it runs on a worker, maybe in another process."""

    def run(self, parts: Iterable[memoryview]) -> tuple[bytes | memoryview, object]:
        """Return the new elements as bytes, and facts about them.

        `parts` are the elements of each source, little-endian; each is valid until the next one is asked for.
        """


class MakingAt(Protocol):
    """Makes elements in a way that depends on their place."""

    def at(self, begin: int) -> Making:
        """Return what makes the elements from the number `begin` on; called for each piece, in any order."""


class Source(Protocol):
    """Gives what some new elements are made of; a `TensorReader` gives the elements of the same numbers."""

    def chunk(self, begin: int, end: int) -> Chunk:
        """Return what a worker needs to read the elements for the new elements from `begin` to `end`."""

    def read_plainly(self, chunk: Chunk) -> memoryview:
        """Return the elements of a chunk as bytes, little-endian, valid until this thread reads the next ones."""


class Rows:
    """The rows of a matrix that belong to rows of what is made."""

    def __init__(self, reader: TensorReader, own: int, columns: int) -> None:
        """`own` are the elements of one of its rows, `columns` those of a row of what is made."""
        self._reader = reader
        self._own = own
        self._columns = columns

    def chunk(self, begin: int, end: int) -> Chunk:
        """Return the chunk of the rows to which the new elements belong."""
        return self._reader.chunk(begin // self._columns * self._own, -(-end // self._columns) * self._own)

    def read_plainly(self, chunk: Chunk) -> memoryview:
        """Return their elements."""
        return self._reader.read_plainly(chunk)


class Whole:
    """All elements of a tensor, for whatever is made; read once in a process, and kept as float32 or float64."""

    def __init__(self, reader: TensorReader, cast: Cast | None) -> None:
        """`cast` makes the wide dtype of the tensor's; None where it is that."""
        self._reader = reader
        self._cast = cast
        self._begin()

    def _begin(self) -> None:
        self._lock = Lock()
        self._kept: memoryview | None = None
        self._chunk: Chunk | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return the state for another process, which reads for itself."""
        return {"_reader": self._reader, "_cast": self._cast}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the state in another process."""
        self.__dict__.update(state)
        self._begin()

    def chunk(self, begin: int, end: int) -> Chunk:
        """Return the chunk of all elements."""
        del begin, end
        if self._chunk is None:
            self._chunk = self._reader.chunk(0, self._reader.numel)
        return self._chunk

    def read_plainly(self, chunk: Chunk) -> memoryview:
        """Return all elements in the wide dtype."""
        with self._lock:
            if self._kept is None:
                from ckpt_cli.arrays.cast import Losses

                data = self._reader.read_plainly(chunk)
                self._kept = memoryview(bytes(data if self._cast is None else self._cast.run(data, Losses())))
            return self._kept


class Given:
    """Elements that are there already, for whatever is made."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def chunk(self, begin: int, end: int) -> Chunk:
        """Return the chunk of all of them."""
        return Chunk(begin, end, data=self._data)

    def read_plainly(self, chunk: Chunk) -> memoryview:
        """Return all of them."""
        return memoryview(chunk.data or b"")


class MadeBytes:
    """The bytes of a storage of which each element is made of the elements of the same number of some tensors.

    They are best read from the beginning to the end: what follows is made while a piece is used.
    """

    composed = True

    def __init__(
        self,
        readers: Callable[[], Sequence[Source]],
        making: Making | MakingAt,
        numel: int,
        itemsize: int,
        note: Callable[[object], None],
        executor: Executor | None,
        piece: int | None = None,
    ) -> None:
        """`readers` makes those of the sources when bytes are asked for; `note` gets the facts of each piece once.

        `piece` are the elements that are made at a time: of what is made row by row, those of some whole rows; None for
        as many as suit the processor's cache.
        """
        self._make_readers = readers
        self._making = making
        self._numel = numel
        self._itemsize = itemsize
        self._note = note
        self._executor = executor
        self._most = piece or PIECE
        self._readers: Sequence[Source] = ()
        self._coming: dict[int, Future[tuple[bytes | memoryview, object]]] = {}
        self._noted: set[int] = set()
        self._last: tuple[int, bytes | memoryview] | None = None

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        size = self._most * self._itemsize
        first, last = begin // size, -(-(begin + nbytes) // size)
        if last - first == 1:
            return memoryview(self._piece(first))[begin - first * size :][:nbytes]
        found = bytearray(nbytes)
        for number in range(first, last):
            piece = memoryview(self._piece(number))
            low, high = max(begin, number * size), min(begin + nbytes, number * size + len(piece))
            found[low - begin : high - begin] = piece[low - number * size : high - number * size]
        return memoryview(found)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Raise UnsupportedError: its bytes are in no file."""
        del begin, nbytes
        _refuse()

    def _piece(self, number: int) -> bytes | memoryview:
        """Return one piece, and begin with those after it."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        self._readers = self._readers or self._make_readers()
        if self._executor is None:
            data, facts = _make(self._job(number))
        else:
            ended = (number + 1) * self._most >= self._numel
            for coming in range(number, number + 1 if ended else number + _AHEAD):
                if coming not in self._coming and coming * self._most < self._numel:
                    self._coming[coming] = self._executor.submit(_work_of(self._executor), self._job(coming))
            data, facts = self._coming.pop(number).result()
            for other in [other for other in self._coming if not number < other < number + _AHEAD]:
                self._coming.pop(other).cancel()
        if number not in self._noted:
            self._noted.add(number)
            self._note(facts)
        self._last = number, data
        if (number + 1) * self._most >= self._numel:
            self._readers = ()
        return data

    def _job(self, number: int) -> Job:
        """Return the job of making one piece."""
        begin, end = self._range(number)
        return _job(self._making, self._readers, begin, end)

    def _range(self, number: int) -> tuple[int, int]:
        """Return the elements of one piece."""
        return number * self._most, min((number + 1) * self._most, self._numel)


class PreparedBytes:
    """The bytes of a storage that can be made once something is known of all elements: when they are read."""

    composed = True

    def __init__(self, prepare: Callable[[], MadeBytes]) -> None:
        self._prepare = prepare
        self._made: MadeBytes | None = None

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        if self._made is None:
            self._made = self._prepare()
        return self._made.view(begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Raise UnsupportedError: its bytes are in no file."""
        del begin, nbytes
        _refuse()


Job = tuple[Making, "list[tuple[Source, Chunk]]"]
"""What makes some elements, and the chunks of what they are made of."""


def _job(making: Making | MakingAt, sources: Sequence[Source], begin: int, end: int) -> Job:
    """Return the job of making some elements."""
    found = []
    for source in sources:
        if isinstance(source, TensorReader):
            source.expect(end * source.dtype.itemsize)
        found.append((source, source.chunk(begin, end)))
    return making if isinstance(making, Making) else making.at(begin), found


def pieces_made(
    making: Making | MakingAt, sources: Sequence[Source], numel: int, piece: int, executor: Executor | None
) -> Iterator[tuple[bytes | memoryview, object]]:
    """Yield what is made of each `piece` elements, in order."""
    jobs = (_job(making, sources, at, min(at + piece, numel)) for at in range(0, numel, piece))
    return map(_make, jobs) if executor is None else run(jobs, _work_of(executor), executor, _AHEAD)


def _make(job: Job) -> tuple[bytes | memoryview, object]:
    """Make one piece; runs on a worker."""
    making, sources = job
    data, facts = making.run(reader.read_plainly(chunk) for reader, chunk in sources)
    return (bytes(data) if isinstance(data, memoryview) and data.readonly else data), facts


def _make_apart(job: Job) -> tuple[bytes | memoryview, object]:
    """Make one piece in another process, from which bytes alone can be sent."""
    data, facts = _make(job)
    return bytes(data), facts


def _work_of(executor: Executor) -> Callable[[Job], tuple[bytes | memoryview, object]]:
    """Return the function that makes a piece on a worker."""
    return _make if shares_memory(executor) else _make_apart


def _refuse() -> NoReturn:
    raise UnsupportedError("its bytes are made while they are read, and are in no file")
