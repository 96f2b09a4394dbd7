"""What a checkpoint is, as frozen facts: names over byte ranges.

Units: `nbytes` and `offset` are bytes, `shape`, `stride` and `storage_offset` are elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Protocol

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import CkptError
from ckpt_cli.files.source import Extent, LocalFile, Source

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class StorageSource(Protocol):
    """Where the bytes of one storage are: what a container gives each storage that it makes."""

    @property
    def composed(self) -> bool:
        """True if they are gathered from several places."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Where they stand plainly."""


class PlainBytes:
    """The bytes of a storage that stand one after another in a file, or in a part of one."""

    __slots__ = ("begin", "file", "number")
    composed = False

    def __init__(self, file: Source, begin: int, number: int = 0) -> None:
        self.file = file
        self.begin = begin
        """The first byte within `file`."""
        self.number = number
        """The file's number within its container."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        return self.file.view(self.begin + begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Where they stand."""
        return [Extent(self.number, self.file.begin + self.begin + begin, nbytes)]


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A byte buffer that tensors are views of; compared by identity, so that two are equal only where they are one."""

    key: str
    """The container's own name for it, such as `3` for the record `data/3`."""
    nbytes: int
    """Bytes that it holds."""
    location: str = "cpu"
    """The device that it was saved from, such as `cuda:0`."""
    source: StorageSource | None = None
    """Where its bytes are; None for a storage that is still to be written."""

    @property
    def composed(self) -> bool:
        """True if its bytes are gathered from several places, as those of a tensor saved in chunks are."""
        return self.source is not None and self.source.composed

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Its bytes from `begin` on, decompressed where they must be; raises CkptError where it has none yet."""
        return self._source().view(begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Where its bytes from `begin` on stand plainly, piece by piece, in the files of the container that made it.

        Raises UnsupportedError where they are compressed.
        """
        return self._source().extents(begin, nbytes)

    def _source(self) -> StorageSource:
        if self.source is None:
            raise CkptError(f"storage {self.key!r} has no bytes yet")
        return self.source


@dataclass(frozen=True, slots=True)
class Quantizer:
    """What the integers of a quantized tensor stand for: `(integer - zero_point) * scale`."""

    scheme: str
    """torch's word for it, such as `per_tensor_affine` or `per_channel_affine_float_qparams`."""
    scale: float = 1.0
    """The one scale; meaningless where there is an axis."""
    zero_point: int = 0
    """The integer that stands for 0; meaningless where there is an axis."""
    axis: int | None = None
    """The dimension each of whose indices has its own scale: those of the parts `scales` and `zero_points`."""
    scales: tuple[float, ...] = ()
    """The scales themselves, where an old file has them in its pickle instead of in parts."""
    zero_points: tuple[int | float, ...] = ()
    """The zero points, in the same case."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor that this file has a part of is spread over processes."""

    mesh: str = ""
    """The devices, as torch prints a DeviceMesh; empty where the file has none."""
    placements: str = ""
    """What a DTensor's dimensions do on the mesh, as torch prints them: `(Shard(dim=0),)`."""
    offsets: tuple[tuple[int, ...], ...] = ()
    """For each part, the index at which it begins in the whole; empty where the file does not tell."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named view of a storage, or what stands in its place."""

    name: str
    """The dotted name, unique in most checkpoints."""
    dtype: DType
    shape: tuple[int, ...] | None
    """None for a tensor that has no shape yet: an uninitialized one."""
    stride: tuple[int, ...] = ()
    storage: Storage | None = None
    """None where the tensor has no bytes of its own; `layout` says why."""
    storage_offset: int = 0
    kind: str = "tensor"
    """`parameter`, `buffer`, or `tensor` where the file does not say."""
    requires_grad: bool = False
    layout: str = "strided"
    """`strided`, or `sparse_coo`, `sparse_csr`…, `quantized`, `nested`, `jagged`, `meta`, `uninitialized`, `wrapper`,
    `array`."""
    parts: tuple[Tensor, ...] = ()
    """The tensors that this one is made of or has as attributes; their names are the roles they play."""
    conj: bool = False
    """The values are the conjugates of what is stored."""
    neg: bool = False
    """The values are the negatives of what is stored."""
    big_endian: bool = False
    alias_of: str | None = None
    """The name that this one is recorded as an alias of, where a tie lives in metadata (safetensors)."""
    python_type: str | None = None
    """The class of a tensor subclass."""
    quantizer: Quantizer | None = None
    """What the integers of a quantized tensor stand for."""
    coalesced: bool | None = None
    """True if a sparse COO tensor has each index once and in order; None where the file does not say."""
    ragged_dim: int = 1
    """The dimension of a jagged tensor whose size differs."""
    sharding: Sharding | None = None
    """How a distributed tensor is spread."""
    holder: str | None = None
    """Where what holds it keeps it to itself, as a module's private attributes: the name of that object."""

    @property
    def numel(self) -> int:
        """Elements, those of all constituents of a nested tensor; 0 where there is no shape yet."""
        if self.shape is not None:
            return prod(self.shape)
        return self.parts[0].numel if self.layout in ("nested", "jagged") else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once, as a contiguous copy has them.

        What consists of parts takes what these take, and what has no values takes none.
        """
        if self.layout in _WITH_ELEMENTS:
            return self.dtype.nbytes(self.numel)
        return sum(part.nbytes for part in self.parts)

    @property
    def nnz(self) -> int | None:
        """Stored elements, or blocks, of a sparse tensor: in all for COO, else in each of a batch."""
        if not self.layout.startswith("sparse"):
            return None
        shape = self.parts[-2].shape  # the plain indices: (dimensions, nnz) for COO, (…, nnz) for the others
        return shape[-1] if shape else 0

    def part(self, role: str) -> Tensor | None:
        """The part that plays a role."""
        return next((part for part in self.parts if part.name == role), None)

    @property
    def attributes(self) -> tuple[Tensor, ...]:
        """The parts that a tensor with elements of its own only has as attributes: the elements do not need them."""
        if self.storage is None or not self.parts:
            return ()
        if self.quantizer is None:
            return self.parts
        return tuple(part for part in self.parts if part.name not in ("scales", "zero_points"))

    @property
    def device(self) -> str:
        """The device that the bytes were saved from."""
        if self.storage is not None:
            return self.storage.location
        if self.parts:
            return self.parts[-1].device
        return "meta" if self.layout == "meta" else "cpu"

    @property
    def span(self) -> tuple[int, int]:
        """The first byte within the storage that the view touches, and the one after its last."""
        shape = self.shape
        if shape is None or 0 in shape:
            return (0, 0)
        bits = self.dtype.bits
        first = last = self.storage_offset
        for size, step in zip(shape, self.stride, strict=True):
            last += (size - 1) * step
        return (first * bits // 8, ((last + 1) * bits + 7) // 8)

    @property
    def is_contiguous(self) -> bool:
        """True if the elements stand in row-major order without gaps."""
        if self.shape is None:
            return False
        return 0 in self.shape or self.stride == contiguous_stride(self.shape) or self._contiguous_but_for_ones()

    def _contiguous_but_for_ones(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape or ()), reversed(self.stride), strict=True):
            if size != 1:
                if step != expected:
                    return False
                expected *= size
        return True

    @property
    def view(self) -> tuple[object, ...] | None:
        """The facts that two tied tensors share; None for a tensor that shares no bytes with any."""
        if self.storage is None or not self.numel:
            return self._view_of_parts() if self.parts and self.storage is None else None
        view = (self.storage, self.dtype.name, self.storage_offset, self.shape, self.stride, self.conj, self.neg)
        return view if self.quantizer is None else (*view, self.quantizer, *(part.view for part in self.parts))

    def _view_of_parts(self) -> tuple[object, ...] | None:
        """The same, of a tensor that is made of others: those that have bytes must be the same ones."""
        views = tuple(part.view for part in self.parts)
        if not any(views):
            return None
        return (self.layout, self.python_type, self.shape, tuple(part.name for part in self.parts), views)


@dataclass(frozen=True, slots=True)
class Value:
    """A named leaf that is not a tensor: an epoch, a learning rate, an object of some class."""

    name: str
    value: object
    """A str, int, float, bool, None or a list of these; anything else is an `Opaque`."""
    holder: str | None = None
    """As of a tensor."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is not plain data, by its text."""

    text: str
    """A short repr, such as `argparse.Namespace(lr=0.1)`; nothing was run to get it."""


AGAIN = "<the same object again>"
"""The text of an object that is open above, or elsewhere."""

Entry = Tensor | Value

_WITH_ELEMENTS = ("strided", "quantized", "array")
"""Layouts of tensors whose elements are stored one after another."""


class Container(Protocol):
    """What a format keeps open behind a checkpoint: where bytes are, and what a changed byte drags along."""

    @property
    def files(self) -> Sequence[LocalFile]:
        """The open files, in the order that `Extent.file` counts them."""

    def extents(self, storage: Storage, offset: int, nbytes: int) -> Sequence[Extent]:
        """The extents of a range of a storage, their files counted as `files` has them."""

    def seal(self, overlay: Overlay) -> None:
        """Add the patches of checksums that the overlay's other patches make necessary."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a path, opened."""

    path: str
    format: str
    """The registered name of the format, such as `zip`."""
    entries: Sequence[Entry]
    """Every leaf, in the document's order."""
    container: Container
    version: str = ""
    """What the container says of its own version, in words."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The container's string map (safetensors' `__metadata__`)."""
    objects: Sequence[str] = ()
    """The globals that the document names beyond plain tensors and containers."""
    top_level: Sequence[str] = ()
    """The outermost keys."""
    is_set: bool = False
    """True if it consists of several files that belong together, so that a copy of it is a folder."""
    notes: Sequence[str] = ()
    """What is odd about it without being an error, a line each."""
    unread: Sequence[str] = ()
    """Bytes of its files that no entry and no document stands for, such as those after the last array: a line each."""
    document: object = None
    """What says which name is which range, as it was read: a pickle's `Graph`, or None where there is no pickle."""
    _names: dict[str, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    @property
    def names(self) -> Mapping[str, int]:
        """The number of entries that have each name, in the document's order; counted at the first use."""
        if not self._names:
            for entry in self.entries:
                self._names[entry.name] = self._names.get(entry.name, 0) + 1
        return self._names

    @property
    def tensors(self) -> list[Tensor]:
        """The entries that are tensors."""
        return [entry for entry in self.entries if isinstance(entry, Tensor)]

    def close(self) -> None:
        """Close the container's files."""
        self.container.close()


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The stride, in elements, of a row-major tensor."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
