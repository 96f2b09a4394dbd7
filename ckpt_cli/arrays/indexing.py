"""Basic indexing as arithmetic: a part of a tensor is another shape, stride and offset over the same storage.

So whether two parts share bytes is a question of arithmetic too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Tensor, contiguous_stride

if TYPE_CHECKING:
    from numpy.typing import NDArray

Index = tuple["int | slice | EllipsisType", ...]

_INTEGER = r"[+-]?\d{1,19}$"

PAGE = 4096
"""Bytes between two rows from which on it pays to touch each row alone."""


@dataclass(frozen=True, slots=True)
class Region:
    """A strided set of elements of a storage; strides may be negative or 0."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """The element within the storage that index 0, 0, … is."""

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """All of a tensor."""
        return cls(tensor.shape or (), tensor.stride, tensor.storage_offset)

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def span(self) -> tuple[int, int]:
        """Return the first element of the storage that is touched and the one after the last."""
        if not self.numel:
            return (self.offset, self.offset)
        reaches = [(size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)]
        low = self.offset + sum(reach for reach in reaches if reach < 0)
        return low, self.offset + sum(reach for reach in reaches if reach > 0) + 1

    def at(self, index: Index) -> Region:
        """Return the part that a basic index selects; raises UsageError where it does not fit the shape."""
        shape: list[int] = []
        stride: list[int] = []
        offset = self.offset
        for item, size, step in zip(self.items(index), self.shape, self.stride, strict=True):
            if isinstance(item, int):
                offset += item * step
            else:
                chosen = range(*item.indices(size))
                shape.append(max((chosen.stop - chosen.start - chosen.step // abs(chosen.step)) // chosen.step + 1, 0))
                stride.append(chosen.step * step)
                offset += chosen.start * step if chosen else 0
        return Region(tuple(shape), tuple(stride), offset)

    def items(self, index: Index) -> list[int | slice]:
        """A basic index with one item a dimension, integers counted from 0; raises UsageError where it does not fit."""
        items = self._complete(index)
        for place, (item, size) in enumerate(zip(items, self.shape, strict=True)):
            if isinstance(item, int):
                if not -size <= item < size:
                    raise UsageError(f"index {item} is out of range for size {size} in shape {list(self.shape)}")
                items[place] = item % size
        return items

    def _complete(self, index: Index) -> list[int | slice]:
        """One item a dimension: `...` and what was left out become whole slices."""
        given = [item for item in index if item is not Ellipsis]
        if len(index) - len(given) > 1:
            raise UsageError("an index takes one ... at most")
        if len(given) > len(self.shape):
            raise UsageError(f"an index of {len(given)} dimensions does not fit shape {list(self.shape)}")
        cut = index.index(Ellipsis) if Ellipsis in index else len(index)
        fill = [slice(None)] * (len(self.shape) - len(given))
        before: list[int | slice] = [item for item in index[:cut] if item is not Ellipsis]
        return [*before, *fill, *(item for item in index[cut:] if item is not Ellipsis)]

    @property
    def is_row_major(self) -> bool:
        """True if the elements stand one after the other, whatever strides of dimensions of one element say."""
        strides = zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        return all(size == 1 or step == expected for size, step, expected in strides)

    def in_file_order(self) -> Region:
        """Return the elements in the order in which they stand; as one row where there are no gaps or repetition."""
        dims = [(step, size) for size, step in zip(self.shape, self.stride, strict=True) if size != 1]
        dims.sort(reverse=True)
        shape = tuple(size for _, size in dims)
        stride = tuple(step for step, _ in dims)
        if self.numel and stride == contiguous_stride(shape):
            return Region((self.numel,), (1,), self.offset)
        return Region(shape, stride, self.offset)

    def pieces(self, itemsize: int, most: int, *, across_gaps: bool = False) -> Iterator[tuple[slice, ...]]:
        """Cut into parts whose bytes lie within `most` bytes of each other, without gaps unless `across_gaps`.

        Yields a slice for each dimension. The parts are cut along the longest strides, so that they come in the order
        of the file if strides are positive.
        """
        whole = tuple(slice(0, size) for size in self.shape)
        pending = [whole] if self.numel else []
        while pending:
            part = pending.pop()
            region = self.at(part)
            cut = region._longest()
            low, high = region.span()
            gaps = cut is not None and not across_gaps and region._has_gaps(cut, itemsize)
            if cut is None or ((high - low) * itemsize <= most and not gaps):
                yield part
                continue
            begin, end = part[cut].start, part[cut].stop
            if end - begin > 2 and gaps:
                yield from (row for at in range(begin, end) for row in self._rows(part, cut, at, itemsize, most))
                continue
            middle = (begin + end) // 2
            halves = (slice(middle, end), slice(begin, middle))
            pending.extend((*part[:cut], half, *part[cut + 1 :]) for half in halves)

    def _rows(
        self, part: tuple[slice, ...], cut: int, at: int, itemsize: int, most: int
    ) -> Iterator[tuple[slice, ...]]:
        """Yield the pieces of one row of a part, its slices counted from this region's own origin."""
        row = (*part[:cut], slice(at, at + 1), *part[cut + 1 :])
        for inner in self.at(row).pieces(itemsize, most):
            yield tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(row, inner, strict=True))

    def rows(self, itemsize: int) -> Rows:
        """Return the rows to read for a part whose span is not too long to be read whole."""
        low, high = self.span()
        dims = sorted((abs(step), dim) for dim, step in enumerate(self.stride) if step and self.shape[dim] > 1)
        length, within = 1, 0
        for step, dim in dims:
            if (step - length) * itemsize >= PAGE:
                break
            length += step * (self.shape[dim] - 1)
            within += 1
        beyond = dims[within:][::-1]
        count = prod(self.shape[dim] for _, dim in beyond)
        if count * (length * itemsize + PAGE) > (high - low) * itemsize + PAGE:  # they are near each other, or overlap
            beyond, length, count = [], high - low, 1
        begins, moves, block = [low], list(self.stride), length * count
        for step, dim in beyond:
            begins = [begin + step * at for begin in begins for at in range(self.shape[dim])]
            block //= self.shape[dim]
            moves[dim] = block if moves[dim] > 0 else -block
        first = -sum((size - 1) * move for size, move in zip(self.shape, moves, strict=True) if move < 0)
        return Rows(Region(self.shape, tuple(moves), first), begins, length)

    def _longest(self) -> int | None:
        """Return the dimension with the longest stride of those that have more than one element."""
        dims = [dim for dim, size in enumerate(self.shape) if size > 1 and self.stride[dim]]
        return max(dims, key=lambda dim: abs(self.stride[dim]), default=None)

    def _has_gaps(self, dim: int, itemsize: int) -> bool:
        """Return True if a page or more lies untouched between two indices of a dimension."""
        row = Region((*self.shape[:dim], 1, *self.shape[dim + 1 :]), self.stride, self.offset)
        low, high = row.span()
        return (abs(self.stride[dim]) - (high - low)) * itemsize >= PAGE


@dataclass(frozen=True, slots=True)
class Rows:
    """Return the byte ranges of a region's elements, without gaps of a page or more."""

    region: Region
    """The same elements over the rows one after the other."""
    begins: Sequence[int]
    """The element of the storage at which each row begins."""
    length: int
    """Elements of each."""


def parse_index(text: str) -> Index:
    """Return the index between the brackets of `NAME[…]`: integers, slices and `...`, as numpy reads them."""
    if not text.strip():
        raise UsageError("an index must not be empty: write [...] for all elements")
    return tuple(_parse_item(item.strip()) for item in text.split(","))


def _parse_item(text: str) -> int | slice | EllipsisType:
    if text == "...":
        return Ellipsis
    if ":" in text:
        bounds = [_integer(bound.strip()) if bound.strip() else None for bound in text.split(":")]
        if len(bounds) > 3 or (len(bounds) == 3 and bounds[2] == 0):
            raise UsageError(f"{text!r} is not a slice")
        return slice(*bounds)
    return _integer(text)


def _integer(text: str) -> int:
    if not re.match(_INTEGER, text):
        raise UsageError(f"{text!r} is not an index: integers, slices (a:b:c) and ... are")
    return int(text)


# --- ranges of elements in row-major order --------------------------------------------------------------------------


def row_cuts(shape: tuple[int, ...], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most `most` elements in row-major order, each of which is a basic index of the shape."""
    begin, numel = 0, prod(shape)
    while begin < numel:
        _, end = row_cut(shape, begin, most)
        yield begin, end
        begin = end


def row_cut(shape: tuple[int, ...], at: int, most: int) -> tuple[int, int]:
    """Return the one of these ranges that has the element `at`."""
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


def range_cuts(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut a range of elements in row-major order into as few basic indices of the shape as possible."""
    while begin < end:
        row = inner = prod(shape)
        for size in shape:
            row, inner = inner, inner // size
            if begin % inner == 0 and begin + inner <= end:
                break
        last = min(end - (end - begin) % inner, begin - begin % row + row)
        yield begin, last
        begin = last


def part_at(shape: tuple[int, ...], begin: int, end: int) -> tuple[slice, ...]:
    """Return the basic index that selects a range which `row_cuts` or `range_cuts` made."""
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


def row_pieces(region: Region, most: int) -> Iterator[tuple[slice, ...]]:
    """Yield the basic indices of parts of at most about `most` elements, in row-major order."""
    return (part_at(region.shape, *cut) for cut in row_cuts(region.shape, most))


def regions_meet(a: Tensor, b: Tensor, of_a: Region | None = None) -> bool:
    """Return True if two views of one storage, or a region of the first and the second, have a byte in common.

    Cases that numpy cannot decide within `limits.VIEW_STEPS` count as yes.
    """
    import numpy as np

    if a.dtype.elements > 1 or b.dtype.elements > 1:  # elements that share bytes with their neighbours
        return True
    base = np.empty(1, np.uint8)
    try:
        first, second = _ghost(base, a, of_a or Region.of(a)), _ghost(base, b, Region.of(b))
        return np.shares_memory(first, second, max_work=limits.VIEW_STEPS)  # type: ignore[arg-type]  # numpy's stub knows -1 and 0
    except (np.exceptions.TooHardError, OverflowError, ValueError):
        return True


def _ghost(base: NDArray[Any], tensor: Tensor, region: Region) -> NDArray[Any]:
    """Return an array with the region's addresses relative to `base`, for numpy to compare.

    It is made of an interface, not of a buffer, as its addresses lie outside of `base`; its elements are never touched.
    """
    import numpy as np

    size = tensor.dtype.itemsize
    address = base.__array_interface__["data"][0] + region.offset * size
    strides = tuple(step * size for step in region.stride)
    interface = {
        "data": (address, False),
        "shape": region.shape,
        "strides": strides,
        "typestr": f"|V{size}",
        "version": 3,
    }
    return np.asarray(type("Ghost", (), {"__array_interface__": interface})())


def grouped_ranges(cuts: Iterable[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Yield ranges that follow each other in groups of at most `most` elements."""
    group: list[tuple[int, int]] = []
    for begin, end in cuts:
        if group and end - group[0][0] > most:
            yield group
            group = []
        group.append((begin, end))
    if group:
        yield group
