"""Lazy tensors that are made of others: joined, computed, converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

from ckpt_cli.arrays import steps
from ckpt_cli.arrays.indexing import Index
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.files.source import Extent
from ckpt_cli.parallel.lazy import EvaluatedBytes, Home, Lazy, Leaf, Read, Shape, Window, whole_of


class Joined(Lazy):
    """Tensors one behind the other along a dimension."""

    def __init__(self, members: Sequence[Lazy], dim: int) -> None:
        first = members[0]
        sizes = [member.shape[dim] for member in members]
        super().__init__(first.home, first.dtype, (*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :]))
        self.members = members
        self.dim = dim
        self._below = prod(first.shape[dim + 1 :])
        """Elements of one index of the dimension."""

    def leaves(self) -> Iterator[Leaf]:
        """Yield the tensors that the members read."""
        for member in self.members:
            yield from member.leaves()

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that joins ranges: the rest of a row, whole rows, and the begin of one."""
        row = self.shape[self.dim] * self._below
        parts: list[steps.Step] = []
        while begin < end:
            at, within = divmod(begin, row)
            if within or end - begin < row:
                stop = min(end, (at + 1) * row)
                parts += self._of_row(at, within, within + stop - begin, read)
            else:
                count = (end - begin) // row
                stop = begin + count * row
                members = [
                    member.step(at * size, (at + count) * size, read)
                    for member in self.members
                    if (size := member.shape[self.dim] * self._below)
                ]
                parts.append(steps.Join(members, count))
            begin = stop
        return parts[0] if len(parts) == 1 else steps.Join(parts)

    def _of_row(self, row: int, begin: int, end: int, read: Read) -> Iterator[steps.Step]:
        """Yield the steps of a range within one row of all members."""
        at = 0
        for member in self.members:
            size = member.shape[self.dim] * self._below
            low, high = max(begin, at), min(end, at + size)
            if low < high:
                yield member.step(row * size + low - at, row * size + high - at, read)
            at += size

    def extents(self) -> list[Extent] | None:
        """Return the ranges of all members, where these stand one behind the other as a whole."""
        if prod(self.shape[: self.dim]) != 1:
            return None
        found: list[Extent] = []
        for member in self.members:
            some = member.extents()
            if some is None:
                return None
            found += some
        return found

    def at(self, index: Index) -> Lazy:
        """Return the joined parts of the members."""
        items = whole_of(self.shape).items(index)
        item = items[self.dim]
        first = 0
        members: list[Lazy] = []
        for member in self.members:
            size = member.shape[self.dim]
            if isinstance(item, int):
                if first <= item < first + size:
                    return member.at((*items[: self.dim], item - first, *items[self.dim + 1 :]))
            else:
                inside = _inside(range(*item.indices(self.shape[self.dim])), first, size)
                if inside is not None:
                    members.append(member.at((*items[: self.dim], inside, *items[self.dim + 1 :])))
            first += size
        if not members:
            return self.members[0].at((*items[: self.dim], slice(0, 0), *items[self.dim + 1 :]))
        if isinstance(item, slice) and item.step is not None and item.step < 0:
            members.reverse()
        dim = self.dim - sum(isinstance(each, int) for each in items[: self.dim])
        return members[0] if len(members) == 1 else Joined(members, dim)

    def permute(self, dims: Sequence[int]) -> Lazy:
        """Return the members with other dimensions, joined along the same one."""
        return Joined([member.permute(dims) for member in self.members], list(dims).index(self.dim))


def _inside(chosen: range, first: int, size: int) -> slice | None:
    """Return the part of a range that lies in `size` indices from `first` on, counted from there; None for none."""
    step = chosen.step
    if step > 0:
        low = max(-(-(first - chosen.start) // step), 0)
        high = min((first + size - 1 - chosen.start) // step, len(chosen) - 1)
    else:
        low = max(-(-(chosen.start - first - size + 1) // -step), 0)
        high = min((chosen.start - first) // -step, len(chosen) - 1)
    if low > high or not size:
        return None
    begin, last = chosen[low] - first, chosen[high] - first
    end = last + (1 if step > 0 else -1)
    return slice(begin, end if end >= 0 else None, step)


class Computed(Lazy):
    """A sum, difference, product or quotient; operands of one shape, or numbers."""

    def __init__(
        self, home: Home, operator: str, left: Lazy | int | float, right: Lazy | int | float, dtype: DType, shape: Shape
    ) -> None:
        super().__init__(home, dtype, shape)
        self._operator = operator
        self._operands = left, right

    def leaves(self) -> Iterator[Leaf]:
        """Yield the tensors that both operands read."""
        for operand in self._operands:
            if isinstance(operand, Lazy):
                yield from operand.leaves()

    def wide(self) -> bool:
        """True if it is computed in float64."""
        return super().wide() or any(isinstance(operand, Lazy) and operand.wide() for operand in self._operands)

    @property
    def kind(self) -> str:
        """The kind of values that it is computed with, if nothing around it is computed in a wider one."""
        if self.dtype.category == "int":
            return steps.INT64
        return "float64" if self.wide() else "float32"

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that computes and rounds once."""
        computed = self.values(begin, end, self.kind, read)
        return steps.Round(computed, self.dtype, self.kind, self.home.name, is_cast=False, allow=self.home.allow)

    def values(self, begin: int, end: int, kind: str, read: Read) -> steps.Step:
        """Return the step that computes, without rounding; integers are computed as such."""
        own = steps.INT64 if self.dtype.category == "int" else kind
        left, right = (
            operand.values(begin, end, own, read) if isinstance(operand, Lazy) else operand
            for operand in self._operands
        )
        computed = steps.Operate(self._operator, left, right, own, self.home.name)
        return computed if own == kind else steps.Convert(computed, kind)

    def at(self, index: Index) -> Lazy:
        """Return the part, computed of parts of the operands."""
        return self._of([self._as_is(operand, lambda each: each.at(index)) for operand in self._operands])

    def permute(self, dims: Sequence[int]) -> Lazy:
        """Return it computed of operands with other dimensions."""
        return self._of([self._as_is(operand, lambda each: each.permute(dims)) for operand in self._operands])

    def expand(self, shape: Shape) -> Lazy:
        """Return it computed of more elements."""
        return self._of([self._as_is(operand, lambda each: each.expand(shape)) for operand in self._operands])

    def reshape(self, shape: Shape) -> Lazy:
        """Return it computed of operands in another shape."""
        return self._of([self._as_is(operand, lambda each: each.reshape(shape)) for operand in self._operands])

    @staticmethod
    def _as_is(operand: Lazy | int | float, change: Callable[[Lazy], Lazy]) -> Lazy | int | float:
        return change(operand) if isinstance(operand, Lazy) else operand

    def _of(self, operands: Sequence[Lazy | int | float]) -> Lazy:
        shape = next(operand.shape for operand in operands if isinstance(operand, Lazy))
        left, right = operands
        return Computed(self.home, self._operator, left, right, self.dtype, shape)


def promoted(one: Lazy, other: Lazy) -> DType:
    """Return the dtype of two operands as torch has it: the wider one, of a float and an integer the float.

    A tensor without dimensions does not widen one that has some. Two of the same width become float32.
    """
    a, b = one.dtype, other.dtype
    if a is b:
        return a
    if a.category != b.category:
        return a if a.category == "float" else b
    if bool(one.shape) != bool(other.shape):
        return a if one.shape else b
    if a.category == "int":
        import numpy as np

        return BY_NAME[np.promote_types(a.name, b.name).name]
    if a.bits == b.bits:
        return BY_NAME["float32"]
    return a if a.bits > b.bits else b


class Converted(Lazy):
    """Another one in another dtype; what is computed is rounded to that one alone."""

    def __init__(self, inner: Lazy, dtype: DType) -> None:
        super().__init__(inner.home, dtype, inner.shape)
        self._inner = inner

    def leaves(self) -> Iterator[Leaf]:
        """Yield the tensors that the other one reads."""
        return self._inner.leaves()

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that converts."""
        inner, kind = self._inner, self._inner.dtype.name
        if isinstance(inner, Computed | Window) and self._is_computed():
            kind = steps.INT64 if inner.dtype.category == "int" else "float64" if self._is_wide() else "float32"
            found = inner.values(begin, end, kind, read)
        else:
            found = inner.step(begin, end, read)
        return steps.Round(found, self.dtype, kind, self.home.name, is_cast=True, allow=self.home.allow)

    def _is_computed(self) -> bool:
        inner = self._inner
        while isinstance(inner, Window):
            inner = inner.inner
        return isinstance(inner, Computed)

    def _is_wide(self) -> bool:
        return self._inner.wide() or self.dtype.name == "float64"

    def at(self, index: Index) -> Lazy:
        """Return a part, converted."""
        return Converted(self._inner.at(index), self.dtype)

    def permute(self, dims: Sequence[int]) -> Lazy:
        """Return it with other dimensions."""
        return Converted(self._inner.permute(dims), self.dtype)

    def expand(self, shape: Shape) -> Lazy:
        """Return more of it."""
        return Converted(self._inner.expand(shape), self.dtype)

    def reshape(self, shape: Shape) -> Lazy:
        """Return it in another shape."""
        return Converted(self._inner.reshape(shape), self.dtype)


class MeanRows(Lazy):
    """The mean row of a floating tensor again and again: added up in float64 in the order of the rows, rounded once."""

    def __init__(self, inner: Lazy, rows: int) -> None:
        super().__init__(inner.home, inner.dtype, (rows, *inner.shape[1:]))
        self._inner = inner
        self._row: bytes | None = None

    def leaves(self) -> Iterator[Leaf]:
        """Yield nothing: the mean is made at once when it is first needed."""
        return iter(())

    def step(self, begin: int, end: int, read: Read) -> steps.Step:
        """Return the step that repeats the row."""
        del read
        if self._row is None:
            self._row = self._mean()
        row = prod(self.shape[1:])
        return steps.Cycle(steps.raw_of(self.dtype), self._row, begin % row, end - begin)

    def _mean(self) -> bytes:
        """Return the mean row as stored elements."""
        import numpy as np

        inner, row = self._inner, prod(self.shape[1:])
        total = np.zeros(row, np.float64)
        source = EvaluatedBytes(inner, None)
        size, most = inner.dtype.itemsize, max(_ROWS // row, 1)
        codec = steps.codec_of(inner.dtype, inner.home.name)
        for first in range(0, inner.shape[0], most):
            count = min(most, inner.shape[0] - first) * row
            stored = np.frombuffer(source.view(first * row * size, count * size), codec.stored)
            total += codec.decode(stored).reshape(-1, row).sum(axis=0, dtype=np.float64)
        with np.errstate(all="ignore"):
            total /= inner.shape[0]
        return codec.encode(total, cast=True).tobytes()


_ROWS = 1 << 20
"""Elements of rows that are added up at a time."""
