"""The tensors of a checkpoint as a new one takes them: whole storages with their views, or each plainly by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import LimitError, RefusedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import is_elsewhere
from ckpt_cli.files.copy import PIECE
from ckpt_cli.files.source import Extent
from ckpt_cli.formats.targets import Target
from ckpt_cli.model.changes import Content, Write, content_of, pieces_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, contiguous_stride
from ckpt_cli.model.new_checkpoint import tied_groups
from ckpt_cli.ops.aliasing import by_storage
from ckpt_cli.parallel.map import grouped, run, shares_memory
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from ckpt_cli.arrays.cast import Cast, Losses

Packed = tuple[list[Tensor], dict[Storage, Content]]
"""New tensors in the order of the old ones, and the bytes of each of their storages."""

_CAST = 1 << 20
"""Bytes that are read at a time where they are cast: what the processor's cache holds with its results."""

_AHEAD = 4
"""Pieces that are cast, or wait for that, before the first of them is written."""

_EXTENTS = 10_000
"""Pieces of a tensor above which its bytes are gathered rather than copied piece by piece."""


@dataclass(frozen=True, slots=True)
class Casting:
    """The new dtype of floats; None to keep theirs."""

    dtype: DType | None
    losses: Losses
    """The counts of values that a cast loses, complete once all is written."""
    executor: Executor | None = None
    """The executor that casts pieces in parallel."""

    def of(self, dtype: DType) -> DType:
        """Return the new dtype of elements of a dtype."""
        return self.dtype if self.dtype is not None and dtype.category == "float" else dtype


def pack_plain(checkpoint: Checkpoint, tensors: Sequence[Tensor], casting: Casting, *, tied: bool) -> Packed:
    """Each tensor contiguous, little-endian and alone in its storage, floats cast.

    Those that are one share a storage where they may stay `tied`. Raises LimitError, before anything is read, where
    views repeat or share so few bytes that the copies would be far larger than the file.
    """
    budget = Budget.of(checkpoint)
    made: dict[int, Tensor] = {}
    contents: dict[Storage, Content] = {}
    for group in tied_groups(tensors):
        for members in [group] if tied else [[tensor] for tensor in group]:
            first = members[0]
            budget.read(first, Region.of(first))
            wanted = casting.of(first.dtype)
            location = first.storage.location if first.storage is not None else "cpu"
            storage = Storage(first.name, wanted.nbytes(first.numel), location)
            contents[storage] = _plain_content(checkpoint, first, wanted, casting)
            for tensor in members:
                made[id(tensor)] = plain_view(tensor, wanted, storage)
    return [made[id(tensor)] for tensor in tensors], contents


def plain_view(tensor: Tensor, dtype: DType, storage: Storage) -> Tensor:
    """Return a tensor over a storage that has its elements alone, in row-major order and little-endian."""
    return replace(
        tensor, dtype=dtype, storage=storage, storage_offset=0, stride=contiguous_stride(tensor.shape or ()),
        conj=False, neg=False, big_endian=False, alias_of=None,
    )  # fmt: skip


def _plain_content(checkpoint: Checkpoint, tensor: Tensor, dtype: DType, casting: Casting) -> Content:
    """A tensor's elements in row-major order: copied where their bytes stay as they are, else made."""
    nbytes = dtype.nbytes(tensor.numel)
    if dtype is not tensor.dtype:
        from ckpt_cli.arrays.cast import Cast

        cast = Cast(tensor.dtype, dtype, tensor.name)
        return Content(nbytes, make=_cast_pieces(checkpoint, tensor, casting, cast), reads=_reads(checkpoint, tensor))
    if not tensor.numel:
        return Content(0, extents=())
    if is_as_stored(tensor):
        extents = _extents(tensor)
        if extents is not None:
            return Content(nbytes, extents=extents)

    def make(write: Write) -> None:
        for piece in elements(checkpoint, tensor, PIECE):
            write(piece)

    return Content(nbytes, make=make)


def cast_storage(checkpoint: Checkpoint, storage: Storage, numel: int, cast: Cast, casting: Casting) -> Content:
    """The first `numel` elements of a storage in another dtype."""
    whole = Tensor(storage.key, cast.source, (numel,), (1,), storage)
    make = _cast_pieces(checkpoint, whole, casting, cast)
    is_here = casting.executor is None or shares_memory(casting.executor)
    reads = _reads(checkpoint, whole) if is_here else ()
    return Content(numel * cast.target.itemsize, make=make, reads=reads)


def _cast_pieces(checkpoint: Checkpoint, tensor: Tensor, casting: Casting, cast: Cast) -> Callable[[Write], None]:
    """Return a writer of a tensor's elements that reads and casts pieces on the executor and writes them in order."""

    def make(write: Write) -> None:
        source = TensorReader(checkpoint, tensor, Region.of(tensor))
        cuts = source.cuts(_CAST // cast.itemsize)
        items = (((source, cast, chunk), source.cost(chunk)) for chunk in source.chunks(cuts))
        jobs = grouped(items, 1)
        executor = casting.executor
        for job in map(_cast_job, jobs) if executor is None else run(jobs, _cast_job, executor, _AHEAD):
            for made, found in job:
                casting.losses.add(found)
                write(made.data)

    return make


def _cast_job(job: list[tuple[TensorReader, Cast, Chunk]]) -> list[tuple[NDArray[Any], Losses]]:
    """Read and cast some chunks: the bytes of the new elements, and what was lost of each."""
    import numpy as np

    from ckpt_cli.arrays.cast import Losses

    answers = []
    for source, cast, chunk in job:
        losses = Losses()
        answers.append((np.asarray(cast.run(source.read_plainly(chunk), losses)), losses))
    return answers


def is_as_stored(tensor: Tensor) -> bool:
    """True if the elements stand in the file in order and as they are to be written."""
    swapped = tensor.big_endian and tensor.dtype.bits > 8
    return tensor.is_contiguous and not (tensor.conj or tensor.neg or swapped)


def _extents(tensor: Tensor) -> Sequence[Extent] | None:
    """Return the places of a contiguous tensor's bytes; None where they are compressed or in far too many places."""
    if tensor.storage is None:
        return None
    begin, end = tensor.span
    try:
        found = tensor.storage.extents(begin, end - begin)
    except UnsupportedError:
        return None
    return found if len(found) <= _EXTENTS else None


def _reads(checkpoint: Checkpoint, tensor: Tensor) -> Sequence[Extent]:
    """Return the places of a tensor's bytes where they lie elsewhere; none of one with gaps."""
    is_far = any(map(is_elsewhere, checkpoint.container.files)) and tensor.is_contiguous
    return (_extents(tensor) or ()) if is_far else ()


def elements(checkpoint: Checkpoint, tensor: Tensor, most: int) -> Iterator[bytes | memoryview]:
    """Yield a tensor's elements in row-major order, little-endian, bit for bit but for what is lazy about them.

    Each piece has at most about `most` bytes.
    """
    storage = tensor.storage
    if storage is None:
        return
    if is_as_stored(tensor):
        begin, end = tensor.span
        yield from pieces_of(storage, begin, end, checkpoint.container.files, most)
        return
    yield from TensorReader(checkpoint, tensor, Region.of(tensor)).read_all(most, plainly=True)


def pack_whole(checkpoint: Checkpoint, tensors: Sequence[Tensor], casting: Casting) -> Packed:
    """Every storage whole with all its views, floats cast.

    Raises RefusedError for a storage that would have to be cast and is viewed as several dtypes.
    """
    moved: dict[Storage | None, tuple[Storage, DType | None]] = {}
    contents: dict[Storage, Content] = {}
    for storage, views in by_storage(tensors):
        kinds = {view.dtype.name for view in views}
        first = views[0]
        wanted = casting.of(first.dtype)
        swapped = first.big_endian and first.dtype.bits > 8
        floating = casting.dtype is not None and any(view.dtype.category == "float" for view in views)
        if len(kinds) > 1 and (swapped or floating):
            raise RefusedError(f"tensor {first.name!r} is viewed as {' and '.join(sorted(kinds))}")
        numel = storage.nbytes // first.dtype.block_nbytes * first.dtype.elements
        whole = replace(first, shape=(numel,), stride=(1,), storage_offset=0, conj=False, neg=False)
        nbytes = wanted.nbytes(numel) if wanted is not first.dtype else storage.nbytes
        new = Storage(storage.key, nbytes, storage.location)
        plain = wanted is first.dtype and not swapped
        content = (
            content_of(storage, files=checkpoint.container.files)
            if plain
            else _plain_content(checkpoint, whole, wanted, casting)
        )
        contents[new] = content
        moved[storage] = (new, wanted if wanted is not first.dtype else None)
    return [_moved(tensor, moved) for tensor in tensors], contents


def _moved(tensor: Tensor, moved: dict[Storage | None, tuple[Storage, DType | None]]) -> Tensor:
    storage, dtype = moved[tensor.storage]
    return replace(tensor, storage=storage, dtype=dtype or tensor.dtype, big_endian=False, alias_of=None)


def check_items(checkpoint: Checkpoint, target: Target, count: int) -> None:
    """Raise LimitError for far more entries than a file of that size has, where each takes a file of its own."""
    most = limits.DCP_ITEMS_FLOOR + sum(file.size for file in checkpoint.container.files) // 128
    if target.is_of_items and count > most:
        raise LimitError(f"it has {count:,} entries to be written one by one, far more than a file of its size has")
