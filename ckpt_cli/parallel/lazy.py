"""New tensors as trees over old ones: shapes and dtypes are known at once, elements are made in pieces when read.

Slices, transpositions and broadcasts are moved down to the tensors that they read, so that each piece reads its own
bytes only. Where that is not possible (a slice of a reshaped sum), what is below is a storage that is made.

`lazy_made.py` has the ones that are made of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays import steps
from ckpt_cli.arrays.cast import Losses
from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.arrays.random_normal import NormalSource
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.files.source import Extent
from ckpt_cli.model.changes import Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, contiguous_stride
from ckpt_cli.parallel.made import Job, MadeBytes, Source
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

Shape = tuple[int, ...]

Read = Callable[["Leaf", int, int], None]
"""Notes that a job reads a range of a leaf's elements."""


class Home:
    """What all parts of one new tensor share."""

    def __init__(self, name: str, checkpoint: Checkpoint, *, allow: bool) -> None:
        self.name = name
        """The name of the new tensor, for errors."""
        self.checkpoint = checkpoint
        self.allow = allow
        """True if values that a dtype cannot hold are converted as a C cast does."""
        self.losses = Losses()
        """The finite values that a dtype cannot hold, counted while they are made."""

    def note(self, facts: Any) -> None:
        """Add what was lost of a piece."""
        self.losses.add(facts)


class Lazy:
    """A tensor that is not made yet."""

    def __init__(self, home: Home, dtype: DType, shape: Shape) -> None:
        self.home = home
        self.dtype = dtype
        self.shape = shape

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    def leaves(self) -> Iterator[Leaf]:
        """Yield the tensors that it reads."""
        return iter(())

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that makes a range of its elements, as stored, in row-major order."""
        raise NotImplementedError

    def values(self, begin: int, end: int, kind: str, read: Read) -> steps.Step:
        """Return the step that makes values of a kind to compute with."""
        return steps.Decode(self.step(begin, end, read), self.dtype, kind, self.home.name)

    def wide(self) -> bool:
        """True if what is computed with it is computed in float64."""
        return self.dtype.name == "float64"

    def extents(self) -> list[Extent] | None:
        """Return the ranges of files that its elements are, one after the other; None where they are not."""
        return None

    # --- views: what cannot be moved down becomes a view of a storage that is made -----------------------------------

    def at(self, index: Index) -> Lazy:
        """Return the part that a basic index selects; raises UsageError where it does not fit the shape."""
        return self._view(whole_of(self.shape).at(index))

    def permute(self, dims: Sequence[int]) -> Lazy:
        """Return it with its dimensions in another order."""
        return self._view(_permuted(whole_of(self.shape), dims))

    def expand(self, shape: Shape) -> Lazy:
        """Return it repeated along new dimensions, and those of one element."""
        return self if shape == self.shape else self._view(_expanded(whole_of(self.shape), shape))

    def reshape(self, shape: Shape) -> Lazy:
        """Return the same elements in another shape."""
        return self if shape == self.shape else Window(self, 0, shape)

    def _view(self, region: Region) -> Lazy:
        """Return a region of its elements, which are counted in row-major order."""
        if region.is_row_major:
            return Window(self, region.offset if region.numel else 0, region.shape)
        return Leaf(self.home, self.home.checkpoint, self._as_made(), region)

    def _as_made(self) -> Tensor:
        """Return a tensor over a storage that makes the elements of this one."""
        source = EvaluatedBytes(self, None)
        storage = Storage(self.home.name, self.dtype.nbytes(self.numel), source=source)
        return Tensor(self.home.name, self.dtype, self.shape, contiguous_stride(self.shape), storage)


def whole_of(shape: Shape) -> Region:
    """Return all elements of a shape, counted in row-major order."""
    return Region(shape, contiguous_stride(shape), 0)


def _permuted(region: Region, dims: Sequence[int]) -> Region:
    return Region(tuple(region.shape[dim] for dim in dims), tuple(region.stride[dim] for dim in dims), region.offset)


def _expanded(region: Region, shape: Shape) -> Region:
    new = len(shape) - len(region.shape)
    sizes = zip(region.shape, region.stride, shape[new:], strict=True)
    stride = [0 if old == 1 and size != 1 else step for old, step, size in sizes]
    return Region(shape, (*(0 for _ in range(new)), *stride), region.offset)


class Leaf(Lazy):
    """A region of a tensor that is there."""

    def __init__(self, home: Home, checkpoint: Checkpoint, tensor: Tensor, region: Region | None = None) -> None:
        self.region = Region.of(tensor) if region is None else region
        super().__init__(home, tensor.dtype, self.region.shape)
        self.checkpoint = checkpoint
        self.tensor = tensor

    def leaves(self) -> Iterator[Leaf]:
        """Yield itself."""
        yield self

    def reader(self) -> TensorReader:
        """Return a reader of its elements."""
        return TensorReader(self.checkpoint, self.tensor, self.region)

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that takes the elements which are read."""
        read(self, begin, end)
        return steps.Take(steps.raw_of(self.dtype))

    def extents(self) -> list[Extent] | None:
        """Return the ranges of files that its elements are."""
        tensor, size = self.tensor, self.dtype.itemsize
        swapped = tensor.big_endian and tensor.dtype.bits > 8
        if not self.region.is_row_major or tensor.conj or tensor.neg or swapped or tensor.storage is None:
            return None
        with suppress(UnsupportedError):
            return list(tensor.storage.extents(self.region.offset * size, self.numel * size)) if self.numel else []
        return None

    def at(self, index: Index) -> Lazy:
        """Return a part of the region."""
        return self._view(self.region.at(index))

    def permute(self, dims: Sequence[int]) -> Lazy:
        """Return the region with other dimensions."""
        return self._view(_permuted(self.region, dims))

    def expand(self, shape: Shape) -> Lazy:
        """Return the region with strides of 0."""
        return self._view(_expanded(self.region, shape))

    def reshape(self, shape: Shape) -> Lazy:
        """Return the region in another shape, where it has no gaps."""
        if self.region.is_row_major:
            return self._view(Region(shape, contiguous_stride(shape), self.region.offset))
        return super().reshape(shape)

    def _view(self, region: Region) -> Lazy:
        return Leaf(self.home, self.checkpoint, self.tensor, region)


class Filled(Lazy):
    """One element again and again."""

    def __init__(self, home: Home, dtype: DType, shape: Shape, element: bytes) -> None:
        super().__init__(home, dtype, shape)
        self._element = element

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that repeats it."""
        del read
        return steps.Fill(steps.raw_of(self.dtype), self._element, end - begin)

    def reshape(self, shape: Shape) -> Lazy:
        """Return that many of it."""
        return Filled(self.home, self.dtype, shape, self._element)

    def expand(self, shape: Shape) -> Lazy:
        """Return more of it."""
        return self.reshape(shape)

    def _view(self, region: Region) -> Lazy:
        return self.reshape(region.shape)


class Normal(Lazy):
    """Normal numbers, rounded once from float64."""

    def __init__(self, home: Home, dtype: DType, shape: Shape, source: NormalSource, mean: float, std: float) -> None:
        super().__init__(home, dtype, shape)
        self._source = source
        self._mean = mean
        self._std = std

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that draws them."""
        del read
        drawn = steps.Draw(self._source, begin, end, self._mean, self._std)
        return steps.Round(drawn, self.dtype, "float64", self.home.name, is_cast=False, allow=self.home.allow)


class Window(Lazy):
    """A range of the elements of another one, in another shape."""

    def __init__(self, inner: Lazy, offset: int, shape: Shape) -> None:
        super().__init__(inner.home, inner.dtype, shape)
        self.inner = inner
        self._offset = offset

    def leaves(self) -> Iterator[Leaf]:
        """Yield the tensors that the other one reads."""
        return self.inner.leaves()

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step of the other one."""
        return self.inner.step(self._offset + begin, self._offset + end, read)

    def values(self, begin: int, end: int, kind: str, read: Read) -> steps.Step:
        """Return the step of the other one."""
        return self.inner.values(self._offset + begin, self._offset + end, kind, read)

    def wide(self) -> bool:
        """True if that of the other one is."""
        return self.inner.wide()

    def extents(self) -> list[Extent] | None:
        """Return the ranges of the other one's files."""
        found = self.inner.extents()
        size = self.dtype.itemsize
        return None if found is None else _cut(found, self._offset * size, (self._offset + self.numel) * size)

    def reshape(self, shape: Shape) -> Lazy:
        """Return the same range in another shape."""
        return Window(self.inner, self._offset, shape)


def _cut(extents: Sequence[Extent], begin: int, end: int) -> list[Extent]:
    """Return a range of the bytes of some extents."""
    found, at = [], 0
    for extent in extents:
        low, high = max(begin, at), min(end, at + extent.nbytes)
        if low < high:
            found.append(extent.cut(low - at, high - low))
        at += extent.nbytes
    return found


class ExtentBytes:
    """The bytes of a storage that are ranges of files, one after the other."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        self._extents = extents
        self.composed = len(extents) > 1

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        found = self.extents(begin, nbytes)
        if len(found) == 1:
            return found[0].file.view(found[0].offset, found[0].nbytes)
        return memoryview(b"".join(each.file.view(each.offset, each.nbytes) for each in found))

    def extents(self, begin: int, nbytes: int) -> list[Extent]:
        """Return the ranges of a part of it."""
        return _cut(self._extents, begin, begin + nbytes)


class EvaluatedBytes(MadeBytes):
    """The bytes of a storage that has the elements of a lazy tensor."""

    def __init__(self, tensor: Lazy, executor: Executor | None) -> None:
        leaves = list(tensor.leaves())
        super().__init__(
            lambda: [leaf.reader() for leaf in leaves], steps.Program(_NOTHING), tensor.numel, tensor.dtype.itemsize,
            tensor.home.note, executor,
        )  # fmt: skip
        self._tensor = tensor
        self._numbers = {id(leaf): number for number, leaf in enumerate(leaves)}

    def _job(self, number: int) -> Job:
        """Return the job of making one piece."""
        sources: list[tuple[Source, Chunk]] = []

        def read(leaf: Leaf, begin: int, end: int) -> None:
            reader = self._readers[self._numbers[id(leaf)]]
            assert isinstance(reader, TensorReader)
            reader.expect(end * reader.dtype.itemsize)
            sources.append((reader, reader.chunk(begin, end)))

        step = self._tensor.step(*self._range(number), read)
        return steps.Program(step), sources


_NOTHING = steps.Fill("u1", b"\0", 0)

_EXTENTS = 10_000
"""Ranges of files above which a tensor is read in pieces rather than copied range by range."""


def made_of(tensor: Lazy, name: str, executor: Executor | None, location: str = "cpu") -> tuple[Tensor, Content]:
    """Return a lazy tensor as one alone in its storage, and the bytes of that: copied where they are there, else made.

    Raises UnsupportedError where an element is not whole bytes.
    """
    tensor.dtype.itemsize  # noqa: B018
    nbytes = tensor.dtype.nbytes(tensor.numel)
    extents = tensor.extents()
    source = None if extents is not None and len(extents) <= _EXTENTS else EvaluatedBytes(tensor, executor)
    storage = Storage(f"new {name}", nbytes, location, source)
    new = Tensor(name, tensor.dtype, tensor.shape, contiguous_stride(tensor.shape), storage)
    if source is None:
        return new, Content(nbytes, extents=extents)
    return new, content_of(storage) if nbytes else Content(0, extents=())
