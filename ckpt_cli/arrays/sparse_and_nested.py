"""Locate elements of tensors that are made of parts: the part, and the index within it.

Layouts: https://docs.pytorch.org/docs/stable/sparse.html, torch/csrc and ATen's NestedTensorImpl.h,
torch/nested/_internal/nested_tensor.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.arrays.codec import require_honest, require_plain
from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import MalformedError, UnsupportedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

_PIECE = 1 << 20
"""Indices that are looked through at a time."""


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """Elements of a part that are the elements which were asked for."""

    part: Tensor
    index: Index
    stored: bool = True
    """False where a sparse tensor does not store them, so that they are zeros of the part's dtype and dimensions."""


def place(checkpoint: Checkpoint, tensor: Tensor, index: Index) -> PlacedPart:
    """Return where the elements at an index are stored.

    Raises UsageError for an index that does not fit, UnsupportedError where they have no one place, MalformedError
    where the parts contradict each other.
    """
    find = _FINDERS.get(tensor.layout)
    if find is None:
        require_plain(tensor)
        return PlacedPart(tensor, index)
    return find(checkpoint, tensor, index)


def _items(tensor: Tensor, index: Index) -> list[int | slice]:
    """One item a dimension, integers from 0."""
    shape = tensor.shape or ()
    try:
        return Region(shape, tuple(1 for _ in shape), 0).items(index)
    except UsageError as error:
        raise UsageError(f"tensor {tensor.name!r}: {error.problem}") from None


def _integers(tensor: Tensor, items: list[int | slice], count: int) -> list[int]:
    """Return the first items, which must be integers."""
    found = [item for item in items[:count] if isinstance(item, int)]
    if len(found) < count:
        raise UnsupportedError(
            f"an index into {tensor.layout} tensor {tensor.name!r} starts with {count} integers",
            hint=f"its stored elements are {tensor.name}.values",
        )
    return found


def _wrong(tensor: Tensor, problem: str) -> MalformedError:
    return MalformedError(f"{tensor.layout} tensor {tensor.name!r}: {problem}")


# --- sparse ----------------------------------------------------------------------------------------------------------


def _in_coo(checkpoint: Checkpoint, tensor: Tensor, index: Index) -> PlacedPart:
    """COO: column k of `indices` says where `values[k]` stands."""
    import numpy as np

    check_sparse(tensor)
    indices, values = tensor.parts[:2]
    shape = indices.shape or ()
    items = _items(tensor, index)
    wanted = np.array(_integers(tensor, items, shape[0]), np.int64)[:, None]
    found: list[int] = []
    for begin in range(0, shape[1], _PIECE):
        columns = values_of(checkpoint, indices, (slice(None), slice(begin, begin + _PIECE)))
        found += (begin + np.flatnonzero((columns == wanted).all(axis=0))).tolist()[:2]
    return _stored(tensor, values, found, tuple(items[shape[0] :]))


def _in_compressed(checkpoint: Checkpoint, tensor: Tensor, index: Index) -> PlacedPart:
    """CSR and its relatives: `compressed[i]:compressed[i + 1]` are the numbers of the elements in row (column) i."""
    import numpy as np

    check_sparse(tensor)
    compressed, plain, values = tensor.parts[:3]
    if len(compressed.shape or ()) != 1:
        raise UnsupportedError(
            f"tensor {tensor.name!r} is a batch of {tensor.layout} tensors: its values cannot be read one by one",
            hint=f"its stored elements are {tensor.name}.values",
        )
    items = _items(tensor, index)
    row, column = _integers(tensor, items, 2)
    within: tuple[int | slice, ...] = ()
    if tensor.layout in ("sparse_bsr", "sparse_bsc"):
        _, height, width = (values.shape or ())[:3]
        within = (row % height, column % width)
        row, column = row // height, column // width
    if tensor.layout in ("sparse_csc", "sparse_bsc"):
        row, column = column, row
    begin, end = (int(item) for item in values_of(checkpoint, compressed, (slice(row, row + 2),)))
    if not 0 <= begin <= end <= (plain.shape or (0,))[0]:
        raise _wrong(tensor, f"{compressed.name} says that its elements {begin}–{end} are in one row")
    columns = values_of(checkpoint, plain, (slice(begin, end),))
    found = (begin + np.flatnonzero(columns == column)).tolist()
    return _stored(tensor, values, found, (*within, *items[2:]))


def _stored(tensor: Tensor, values: Tensor, found: list[int], rest: Index) -> PlacedPart:
    if len(found) > 1:
        raise UnsupportedError(
            f"this element of tensor {tensor.name!r} is the sum of several stored ones, as it is not coalesced",
            hint=f"its stored elements are {tensor.name}.values",
        )
    part = replace(values, name=tensor.name, kind=tensor.kind)
    if found:
        return PlacedPart(part, (found[0], *rest))
    shape = (values.shape or ())[1:]
    empty = replace(part, shape=shape, stride=tuple(0 for _ in shape), storage_offset=0)
    return PlacedPart(empty, rest, stored=False)


def check_sparse(tensor: Tensor) -> None:
    """Raise MalformedError where the parts' shapes do not fit each other, UnsupportedError for parts without values."""
    shape, values = tensor.shape or (), tensor.parts[_ROLES[tensor.layout] - 1]
    for part in tensor.parts[: _ROLES[tensor.layout]]:
        require_plain(part)
        require_honest(part)
    kept = values.shape or ()
    if any(part.dtype.category != "int" for part in tensor.parts[: _ROLES[tensor.layout] - 1]):
        raise _wrong(tensor, "its indices are not integers")
    if tensor.layout == "sparse_coo":
        indices = tensor.parts[0].shape or ()
        fits = len(indices) == 2 and indices[0] <= len(shape) and kept == (indices[1], *shape[indices[0] :])
    else:
        fits = _compressed_fits(tensor, shape, kept)
    if not fits:
        shapes = ", ".join(f"{part.name} {list(part.shape or ())}" for part in tensor.parts)
        raise _wrong(tensor, f"its parts do not fit its shape {list(shape)}: {shapes}")


def _compressed_fits(tensor: Tensor, shape: tuple[int, ...], kept: tuple[int, ...]) -> bool:
    """Return True if the parts of a compressed tensor have the lengths that its shape needs."""
    compressed, plain = (part.shape or () for part in tensor.parts[:2])
    batch = len(compressed) - 1
    blocks = 2 if tensor.layout in ("sparse_bsr", "sparse_bsc") else 0
    if batch < 0 or len(shape) < batch + 2 or len(plain) != batch + 1 or len(kept) < batch + 1 + blocks:
        return False
    block = kept[batch + 1 : batch + 3] if blocks else (1, 1)
    if 0 in block or any(size % side for size, side in zip(shape[batch:], block, strict=False)):
        return False
    long = batch + (tensor.layout in ("sparse_csc", "sparse_bsc"))
    rows = shape[long] // block[long - batch]
    outer = shape[:batch]
    dense = shape[batch + 2 :]
    return (
        compressed == (*outer, rows + 1)
        and plain[:-1] == outer
        and kept == (*plain, *(block if blocks else ()), *dense)
    )


_ROLES = {"sparse_coo": 2, "sparse_csr": 3, "sparse_csc": 3, "sparse_bsr": 3, "sparse_bsc": 3}
"""The number of parts that make a sparse tensor, the values last; further parts are its attributes."""


# --- nested ----------------------------------------------------------------------------------------------------------


def _in_nested(checkpoint: Checkpoint, tensor: Tensor, index: Index) -> PlacedPart:
    """Return the place of an index, whose first item is the number of the constituent."""
    if not index or not isinstance(index[0], int):
        raise UnsupportedError(
            f"an index into {tensor.layout} tensor {tensor.name!r} starts with the number of a constituent"
        )
    bounds = count_constituents(tensor)
    number = index[0]
    if not -bounds <= number < bounds:
        raise UsageError(f"index {number} is out of range for the {bounds} constituents of tensor {tensor.name!r}")
    number %= bounds
    return PlacedPart(next(constituents(checkpoint, tensor, number, number + 1)), index[1:])


def constituents(checkpoint: Checkpoint, tensor: Tensor, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
    """Return the constituents of a nested or jagged tensor as views of its buffer, called `NAME[0]`, `NAME[1]`…

    Raises MalformedError for one that lies outside the buffer. Who goes through all must bound how many they are.
    """
    end = count_constituents(tensor) if end is None else end
    return (_jagged if tensor.layout == "jagged" else _strided)(checkpoint, tensor, begin, end)


def count_constituents(tensor: Tensor) -> int:
    """Return how many constituents a nested or jagged tensor has; raises MalformedError where its parts do not fit."""
    for part in tensor.parts[: 2 if tensor.layout == "jagged" else 4]:
        require_plain(part)
    if tensor.layout == "jagged":
        offsets = tensor.part("offsets")
        if offsets is None or len(offsets.shape or ()) != 1 or not offsets.numel:
            raise UnsupportedError(f"tensor {tensor.name!r} has no offsets in the file: its constituents are not known")
        return offsets.numel - 1
    shape = tensor.parts[1].shape or ()
    lengths = tensor.parts[3].shape
    if len(shape) != 2 or tensor.parts[2].shape != shape or lengths != shape[:1] or shape[1] > limits.DIMENSIONS:
        raise _wrong(tensor, "its sizes, strides and offsets do not fit each other")
    return shape[0]


def _strided(checkpoint: Checkpoint, tensor: Tensor, begin: int, end: int) -> Iterator[Tensor]:
    buffer = tensor.parts[0]
    rows = (slice(begin, end),)
    sizes, strides, offsets = (values_of(checkpoint, part, rows).tolist() for part in tensor.parts[1:4])
    if buffer.stride != (1,):
        raise _wrong(tensor, "its buffer is not a row of elements")
    for number, (shape, stride, offset) in enumerate(zip(sizes, strides, offsets, strict=True), begin):
        if not all(type(item) is int and 0 <= item < _END for item in (*shape, *stride, offset)):
            raise _wrong(tensor, f"constituent {number} has a size, stride or offset that is not a count")
        at = buffer.storage_offset + offset
        yield _view(tensor, buffer, number, Region(tuple(shape), tuple(stride), at))


def _jagged(checkpoint: Checkpoint, tensor: Tensor, begin: int, end: int) -> Iterator[Tensor]:
    values, offsets, lengths = (tensor.part(role) for role in ("values", "offsets", "lengths"))
    if values is None or offsets is None:
        return
    dim = tensor.ragged_dim - 1
    starts = values_of(checkpoint, offsets, (slice(begin, end + 1),)).tolist()
    stops = starts[1:]
    if lengths is not None:
        given = values_of(checkpoint, lengths, (slice(begin, end),)).tolist()
        stops = [start + length for start, length in zip(starts, given, strict=False)]
    for number, (start, stop) in enumerate(zip(starts, stops, strict=False), begin):
        if not 0 <= start <= stop <= (values.shape or ())[dim]:
            raise _wrong(tensor, f"constituent {number} has the elements {start}–{stop} of {(values.shape or ())[dim]}")
        index = (*(slice(None) for _ in range(dim)), slice(start, stop))
        yield _view(tensor, values, number, Region.of(values).at(index))


_END = 1 << 62


def _view(tensor: Tensor, buffer: Tensor, number: int, region: Region) -> Tensor:
    """A constituent, checked to lie inside the buffer."""
    view = replace(
        buffer,
        name=f"{tensor.name}[{number}]",
        shape=region.shape,
        stride=region.stride,
        storage_offset=region.offset,
        parts=(),
        requires_grad=False,
    )
    if view.span[1] > buffer.span[1]:
        raise _wrong(tensor, f"constituent {number} reaches beyond its buffer")
    return view


# --- distributed -----------------------------------------------------------------------------------------------------


def _in_shards(checkpoint: Checkpoint, tensor: Tensor, index: Index) -> PlacedPart:
    """Return the one local part that an index of the whole falls into."""
    if tensor.sharding is None or not tensor.sharding.offsets:
        require_plain(tensor)  # which raises
    items = _items(tensor, index)
    offsets = tensor.sharding.offsets if tensor.sharding is not None else ()
    found: list[PlacedPart] = []
    for part, offset in zip(tensor.parts, offsets, strict=False):
        local = _local(items, tensor.shape or (), part.shape or (), offset)
        if local is not None:
            found.append(PlacedPart(part, tuple(local)))
    if len(found) != 1:
        raise UnsupportedError(
            f"this file has only a part of tensor {tensor.name!r}, and these elements are not one piece of it",
            hint=f"name the part: {', '.join(f'{tensor.name}.{part.name}' for part in tensor.parts[:3])}",
        )
    return place(checkpoint, replace(found[0].part, name=tensor.name), found[0].index)


def _local(
    items: list[int | slice], whole: tuple[int, ...], shape: tuple[int, ...], offset: tuple[int, ...]
) -> list[int | slice] | None:
    """Return the index within a part, or None for elements that do not all lie in it."""
    if len(shape) != len(items):
        return None
    local: list[int | slice] = []
    for item, full, size, begin in zip(items, whole, shape, offset, strict=True):
        if isinstance(item, slice):
            if (begin, size) != (0, full):
                return None
            local.append(item)
        elif begin <= item < begin + size:
            local.append(item - begin)
        else:
            return None
    return local


_Finder = Callable[[Checkpoint, Tensor, Index], PlacedPart]

_FINDERS: dict[str, _Finder] = {
    "sparse_coo": _in_coo,
    "sparse_csr": _in_compressed,
    "sparse_csc": _in_compressed,
    "sparse_bsr": _in_compressed,
    "sparse_bsc": _in_compressed,
    "nested": _in_nested,
    "jagged": _in_nested,
    "wrapper": _in_shards,
}
