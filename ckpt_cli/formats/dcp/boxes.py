"""A tensor that is stored in chunks: which chunk has which elements, by arithmetic over boxes.

A chunk is a box of the whole tensor, `offsets` to `offsets + sizes`, stored with strides of its own. A range of the
whole tensor in row-major order is a few boxes; where these meet a chunk, rows are copied or pointed to.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import contiguous_stride

_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""Formats of a memoryview by bytes of an item: what is copied is never looked at."""

_LONG_ROW = 64
"""Bytes from which on a row is copied as one rather than column by column."""

Axis = tuple[int, int, int]
"""The number of steps, and the length of each in the target and in the source."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: one range a dimension."""

    offsets: tuple[int, ...]
    """The index of its first element."""
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.sizes)

    def meet(self, other: Box) -> Box | None:
        """The part that both have; None where that is empty."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, _ends(self), _ends(other))
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Box(begins, sizes) if all(size > 0 for size in sizes) else None


def _ends(box: Box) -> Iterator[int]:
    return (offset + size for offset, size in zip(box.offsets, box.sizes, strict=True))


def boxes_of_range(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The elements `begin` to `end` of a row-major tensor as boxes in their order, two a dimension at most."""
    stride = contiguous_stride(shape)
    found: list[Box] = []

    def cut(prefix: tuple[int, ...], low: int, high: int) -> None:
        dim = len(prefix)
        if low >= high:
            return
        if dim == len(shape):
            found.append(Box(prefix, (1,) * dim))
            return
        step = stride[dim]
        first, last = -(-low // step), high // step
        if first > last:  # within one index of this dimension
            cut((*prefix, last), low - last * step, high - last * step)
            return
        if low % step:
            cut((*prefix, first - 1), low - (first - 1) * step, step)
        if first < last:
            rest = shape[dim + 1 :]
            found.append(Box((*prefix, first, *(0 for _ in rest)), (*(1 for _ in prefix), last - first, *rest)))
        if high % step:
            cut((*prefix, last), 0, high - last * step)

    cut((), begin, end)
    return found


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """Elements of a range that one chunk has, as steps through the range and through the chunk's storage."""

    chunk: int
    """The number of the chunk."""
    target: int
    """Its first element, counted from the begin of the tensor."""
    source: int
    """The same, counted in the chunk's own storage from the chunk's first element."""
    axes: tuple[Axis, ...]
    """Steps in elements, the longest of the target first."""

    @property
    def run(self) -> int:
        """Elements that stand together in both."""
        return self.axes[-1][0] if self.axes and self.axes[-1][1:] == (1, 1) else 1

    @property
    def runs(self) -> int:
        """The number of such runs in it."""
        return prod(size for size, _, _ in self.axes) // self.run

    def starts(self) -> Iterable[tuple[int, int]]:
        """Yield the beginning of each run, in the target and in the source."""
        places: list[tuple[int, int]] = [(self.target, self.source)]
        for size, to, of in self.axes[:-1] if self.run > 1 else self.axes:
            places = [(target + n * to, source + n * of) for target, source in places for n in range(size)]
        return places

    @property
    def span(self) -> tuple[int, int]:
        """The first element of the chunk's storage that is touched and the one after the last."""
        return self.source, self.source + sum((size - 1) * of for size, _, of in self.axes) + 1


def part_of(number: int, chunk: Box, box: Box, shape: Sequence[int], stride: Sequence[int]) -> ChunkPart | None:
    """Return the elements that a chunk, stored with `stride`, has of a box of a row-major tensor of `shape`."""
    meeting = box.meet(chunk)
    if meeting is None:
        return None
    steps = contiguous_stride(shape)
    source = sum((o - c) * step for o, c, step in zip(meeting.offsets, chunk.offsets, stride, strict=True))
    target = sum(offset * step for offset, step in zip(meeting.offsets, steps, strict=True))
    axes: list[Axis] = []
    for size, to, of in zip(meeting.sizes, steps, stride, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * to and axes[-1][2] == size * of:
            axes[-1] = (axes[-1][0] * size, to, of)
        else:
            axes.append((size, to, of))
    return ChunkPart(number, target, source, tuple(axes))


def copy_part(target: bytearray, source: memoryview, part: ChunkPart, begin: int, itemsize: int) -> None:
    """Copy a part's elements from the bytes of its span to `target`, whose first element is `begin`."""
    unit = min(itemsize, 8)
    wide = itemsize // unit
    axes = [(size, to * wide, of * wide) for size, to, of in part.axes]
    if wide > 1:
        axes.append((wide, 1, 1))
    into = memoryview(target).cast(_FORMATS[unit])  # type: ignore[call-overload]  # a table's value
    low, high = part.span
    items = source[: (high - low) * itemsize].cast("B").cast(_FORMATS[unit])  # type: ignore[call-overload]  # a table's value
    _copy(into, items, _ordered(axes, unit), (part.target - begin) * wide, 0)


def _ordered(axes: list[Axis], unit: int) -> list[Axis]:
    """The axes, that which is copied in one call last: long rows as they are, else the longest column."""
    if axes and axes[-1][1:] == (1, 1) and axes[-1][0] * unit >= _LONG_ROW:
        return axes
    usable = [number for number, axis in enumerate(axes) if axis[1] and axis[2]]
    if not usable:
        return [*axes, (1, 1, 1)]
    chosen = max(usable, key=lambda number: axes[number][0])
    return [*axes[:chosen], *axes[chosen + 1 :], axes[chosen]]


def _copy(into: memoryview, items: memoryview, axes: list[Axis], to: int, of: int) -> None:
    count, step, stride = axes[0]
    if len(axes) == 1:
        into[to : to + (count - 1) * step + 1 : step] = items[of : of + (count - 1) * stride + 1 : stride]
        return
    rest = axes[1:]
    for number in range(count):
        _copy(into, items, rest, to + number * step, of + number * stride)


class Chunks:
    """The chunks of one tensor, ordered by their first element; `covered` checks that they are all of it."""

    def __init__(self, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
        self.shape = shape
        self.numel = prod(shape)
        self.boxes = boxes
        self._spans: tuple[list[int], list[int]] | None = None
        """The first element of each chunk, and the furthest end of those up to it."""

    def meeting(self, begin: int, end: int) -> range:
        """The numbers of chunks that may have elements `begin` to `end`."""
        if self._spans is None:
            self._check()
            steps = contiguous_stride(self.shape)
            firsts = [_flat(box.offsets, steps) for box in self.boxes]
            ends = [
                first + _flat([max(size - 1, 0) for size in box.sizes], steps) + (1 if box.numel else 0)
                for first, box in zip(firsts, self.boxes, strict=True)
            ]
            self._spans = (firsts, list(accumulate(ends, max)))
        firsts, furthest = self._spans
        return range(bisect_right(furthest, begin), bisect_left(firsts, end))

    def _check(self) -> None:
        """Raise MalformedError where elements have no chunk or two."""
        have = sum(box.numel for box in self.boxes)
        boxes = [box for box in self.boxes if box.numel]
        if boxes and self.shape:
            self._check_apart(boxes)
        elif len(boxes) > 1:
            raise MalformedError("two of its chunks overlap")
        if have < self.numel:
            raise MalformedError(
                f"its chunks have {have:,} of its {self.numel:,} elements: a rank did not save its own"
            )

    def _check_apart(self, boxes: list[Box]) -> None:
        """Compare the chunks that share a range of the dimension with the most of them."""
        dim = max(range(len(self.shape)), key=lambda dim: _distinct(sorted(box.offsets[dim] for box in boxes)))
        open_boxes: list[Box] = []
        left = limits.CHUNK_PAIRS
        for box in sorted(boxes, key=lambda box: box.offsets[dim]):
            open_boxes = [other for other in open_boxes if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
            left -= len(open_boxes)
            if left < 0:
                raise LimitError(f"its {len(boxes)} chunks lie so that telling whether they overlap takes too long")
            if any(box.meet(other) for other in open_boxes):
                raise MalformedError("two of its chunks overlap")
            open_boxes.append(box)


def _flat(index: Sequence[int], steps: Sequence[int]) -> int:
    return sum(place * step for place, step in zip(index, steps, strict=True))


def _distinct(ordered: list[int]) -> int:
    return sum(one != other for one, other in pairwise(ordered))


def check_scattered(parts: Iterable[ChunkPart]) -> None:
    """Raise UnsupportedError where a range lies in too many pieces to be changed one by one."""
    if sum(part.runs for part in parts) > limits.SCATTERED:
        raise UnsupportedError(
            "its elements lie apart in so many pieces that they cannot be changed at once",
            hint="set fewer elements at a time",
        )
