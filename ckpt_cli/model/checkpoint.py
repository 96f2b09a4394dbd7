"""The facts of a checkpoint: names over byte ranges.

Units: `nbytes` and `offset` are bytes, `shape`, `stride` and `storage_offset` are elements.

The fields of Storage and Tensor are `Final` instead of the classes frozen: the type checker refuses assignments
all the same, and a frozen dataclass of twenty fields takes eight times as long to make. A large file has 100,000.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from math import prod
from typing import TYPE_CHECKING, Final, Protocol

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import CkptError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import ByteSource, Extent, SourceFile

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay


class StorageSource(Protocol):
    """The place of the bytes of one storage, which its container gives to each storage."""

    @property
    def composed(self) -> bool:
        """True if they are gathered from several places."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the ranges of files in which they stand as they are."""


class PlainBytes:
    """The bytes of a storage that stand one after another in a file, or in a part of one."""

    __slots__ = ("begin", "file")
    composed = False

    def __init__(self, file: ByteSource, begin: int) -> None:
        self.file = file
        self.begin = begin
        """The first byte within `file`."""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        return self.file.view(self.begin + begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return the extents of a range of its bytes."""
        return [Extent(self.file.whole, self.file.begin + self.begin + begin, nbytes)]


@dataclass(slots=True, eq=False)
class Storage:
    """A byte buffer that tensors are views of; compared by identity, so that two are equal only where they are one."""

    key: Final[str]
    """The container's own name for it, such as `3` for the record `data/3`."""
    nbytes: Final[int]
    """Bytes that it holds."""
    location: Final[str] = "cpu"
    """The device that it was saved from, such as `cuda:0`."""
    source: Final[StorageSource | None] = None
    """The place of its bytes; None for a storage that is still to be written."""

    @property
    def composed(self) -> bool:
        """True if its bytes are gathered from several places, as those of a tensor saved in chunks are."""
        return self.source is not None and self.source.composed

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Its bytes from `begin` on, decompressed where they must be; raises CkptError where it has none yet."""
        return self._source().view(begin, nbytes)

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:
        """Return where its bytes from `begin` on stand as they are, piece by piece.

        Raises UnsupportedError where they are compressed.
        """
        return self._source().extents(begin, nbytes)

    def _source(self) -> StorageSource:
        if self.source is None:
            raise CkptError(f"storage {self.key!r} has no bytes yet")
        return self.source


@dataclass(frozen=True, slots=True)
class Quantizer:
    """The values that the integers of a quantized tensor stand for: `(integer - zero_point) * scale`."""

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
    """The distribution over processes of a tensor that this file has a part of."""

    mesh: str = ""
    """The devices, as torch prints a DeviceMesh; empty where the file has none."""
    placements: str = ""
    """The placements of a DTensor on the mesh, as torch prints them: `(Shard(dim=0),)`."""
    offsets: tuple[tuple[int, ...], ...] = ()
    """For each part, the index at which it begins in the whole; empty if the file does not say."""


@dataclass(slots=True, unsafe_hash=True)
class Tensor:
    """One named view of a storage, or what stands in its place."""

    name: Final[str]
    """The dotted name, unique in most checkpoints."""
    dtype: Final[DType]
    shape: Final[tuple[int, ...] | None]
    """None for a tensor that has no shape yet: an uninitialized one."""
    stride: Final[tuple[int, ...]] = ()
    storage: Final[Storage | None] = None
    """None where the tensor has no bytes of its own; `layout` says why."""
    storage_offset: Final[int] = 0
    kind: Final[str] = "tensor"
    """`parameter`, `buffer`, or `tensor` where the file does not say."""
    requires_grad: Final[bool] = False
    layout: Final[str] = "strided"
    """`strided`, or `sparse_coo`, `sparse_csr`…, `quantized`, `nested`, `jagged`, `meta`, `uninitialized`, `wrapper`,
    `array`."""
    parts: Final[tuple[Tensor, ...]] = ()
    """The tensors that this one is made of or has as attributes; their names are the roles they play."""
    conj: Final[bool] = False
    """The values are the conjugates of what is stored."""
    neg: Final[bool] = False
    """The values are the negatives of what is stored."""
    big_endian: Final[bool] = False
    alias_of: Final[str | None] = None
    """The name that this one is recorded as an alias of, where a tie lives in metadata (safetensors)."""
    python_type: Final[str | None] = None
    """The class of a tensor subclass."""
    quantizer: Final[Quantizer | None] = None
    """The quantization; None for a tensor that is not quantized."""
    coalesced: Final[bool | None] = None
    """True if a sparse COO tensor has each index once and in order; None if the file does not say."""
    ragged_dim: Final[int] = 1
    """The dimension of a jagged tensor whose size differs."""
    sharding: Final[Sharding | None] = None
    """The distribution of a distributed tensor."""
    holder: Final[str | None] = None
    """The name of the object that keeps the tensor to itself, as a module's private attributes are kept; else None."""

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
        first = last = self.storage_offset
        for size, step in zip(shape, self.stride, strict=True):
            last += (size - 1) * step
        return self.dtype.byte_range(first, last + 1)

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
        """The key that tied tensors have in common; None for a tensor that cannot share bytes."""
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
    content: object
    """The value, or a `Deferred` that reads it."""
    holder: str | None = None
    """As of a tensor."""
    of_module: bool = False
    """True if it is an attribute of a pickled module, or lies in one: its state_dict does not have it."""

    @property
    def value(self) -> object:
        """A str, int, float, bool, None or a list of these; anything else is an `Opaque`."""
        return self.content.value if isinstance(self.content, Deferred) else self.content


class Deferred:
    """The content of a value that is read when it is asked for, once; a format's own class reads it."""

    __slots__ = ("_loaded",)

    def __init__(self) -> None:
        self._loaded: list[object] = []

    def load(self) -> object:
        """Read the value."""
        raise NotImplementedError

    @property
    def is_loaded(self) -> bool:
        """True if it was read, so that it needs no file any more."""
        return bool(self._loaded)

    @property
    def value(self) -> object:
        """Plain data or an `Opaque`, as of a `Value`."""
        if not self._loaded:
            self._loaded.append(self.load())
        return self._loaded[0]


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value that is not plain data: its text stands for it."""

    text: str
    """A short repr, such as `argparse.Namespace(lr=0.1)`; nothing was run to get it."""


AGAIN = "<the same object again>"
"""The text of an object that is open above, or elsewhere."""

Entry = Tensor | Value

_WITH_ELEMENTS = ("strided", "quantized", "array")
"""Layouts of tensors whose elements are stored one after another."""


class Container(Protocol):
    """The files that a format keeps open behind a checkpoint, and the checksums that change with their bytes."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """The open files, in their order."""

    def seal(self, overlay: Overlay) -> None:
        """Add the patches of checksums that the overlay's other patches make necessary."""

    def close(self) -> None:
        """Close the files."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: the names and facts of all entries, and the container with their bytes."""

    path: str
    format: str
    """The registered name of the format, such as `zip`."""
    entries: Sequence[Entry]
    """Every leaf, in the document's order."""
    container: Container
    version: str = ""
    """The version that the container states, in words."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The container's string map (safetensors' `__metadata__`)."""
    objects: Sequence[str] = ()
    """The globals that the document names beyond plain tensors and containers."""
    top_level: Sequence[str] = ()
    """The outermost keys."""
    is_set: bool = False
    """True if it consists of several files that belong together, so that a copy of it is a folder."""
    notes: Sequence[str] = ()
    """Notes about it that are not errors, a line each."""
    unread: Sequence[str] = ()
    """Bytes of its files that no entry and no document stands for, such as those after the last array: a line each."""
    weights: str = ""
    """The name that those of the model's own entries begin with, in the checkpoint of a run that has more than these:
    `model`. They are what `ls` lists and `convert` takes, without that beginning, where nothing else is asked for."""
    fixed: str = ""
    """The reason why none of its entries can be edited, for such as are joined from the files of several ranks."""
    document: object = None
    """The document that says which name is which range: a pickle's `Graph`, or None if there is no pickle."""
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

    @property
    def own(self) -> Sequence[Entry]:
        """The entries of the model itself; all, where nothing says which these are."""
        inside = f"{self.weights}."
        return [entry for entry in self.entries if entry.name.startswith(inside)] if self.weights else self.entries

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
