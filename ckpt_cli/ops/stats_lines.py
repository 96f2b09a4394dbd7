"""The engine of `stats --by`: a summary of each row or column of matrices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Region, part_at, row_cuts
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, LimitError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import announce
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.show import spell_index
from ckpt_cli.ops.stats import planned, selected, stats
from ckpt_cli.ops.summaries import Row, Stats
from ckpt_cli.parallel.announced import places_in
from ckpt_cli.parallel.map import grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import CHUNK, Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.indexing import Index
    from ckpt_cli.arrays.line_moments import LineMoments

LINES = ("row", "column")
"""What `--by` may be: the first or the second index counts the lines."""

_MOST = 1 << 15
"""Lines of a chunk: what is found of them is a few times as large as they may be."""


class Matrix:
    """One distinct view, and what was found of its lines so far."""

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor, region: Region, index: Index, by: str) -> None:
        from ckpt_cli.arrays.line_moments import LineMoments
        from ckpt_cli.arrays.quantized import codec_of
        from ckpt_cli.arrays.statistics import summer_of

        codec = codec_of(checkpoint, tensor).at(index)
        flagged = tensor.conj or tensor.neg or tensor.layout == "quantized"
        self.source = TensorReader(checkpoint, tensor, region, codec)
        self._summer = summer_of(codec, flagged=flagged, big_endian=tensor.big_endian)
        self._shape = region.shape
        self._dim = LINES.index(by)
        self.found: LineMoments = LineMoments.none(region.shape[self._dim])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker in another process, without the results so far."""
        return {**self.__dict__, "found": None}

    def chunks(self) -> Iterator[Chunk]:
        """Yield its chunks, each of which is a basic index of few enough lines."""
        from math import prod

        most = CHUNK // 8  # as float64 they should stay in the cache
        below = prod(self._shape[self._dim + 1 :])
        if self._dim == 0 or self._shape[self._dim] > _MOST:
            most = min(most, _MOST * below)
        yield from self.source.chunks(row_cuts(self._shape, max(most, 1)))

    def sum(self, chunk: Chunk) -> tuple[int, LineMoments]:
        """Return the first line of a chunk and the moments of its lines; runs on a worker."""
        import numpy as np

        from ckpt_cli.arrays.line_moments import line_moments
        from ckpt_cli.arrays.statistics import Codes

        part = part_at(self._shape, chunk.begin, chunk.end)
        data, summer = self.source.read(chunk), self._summer
        if isinstance(summer, Codes):
            values = summer.numbers(data).astype(np.int64 if summer.whole else np.float64, copy=False)
        else:
            values = summer.values(data, part)
        box = [item.stop - item.start for item in part]
        lines = np.moveaxis(values.reshape(*box, -1), self._dim, 0).reshape(box[self._dim], -1)
        return part[self._dim].start, line_moments(lines)


def _sum_lines(checkpoint: Checkpoint, matrices: Sequence[Matrix], executor: Executor, on_progress: OnProgress) -> None:
    """Go through every chunk of every matrix, in the order of the files."""
    total = sum(matrix.source.nbytes for matrix in matrices)
    done = 0
    in_order = in_file_order(matrices, lambda matrix: matrix.source.place, checkpoint.container.files)
    announce(place for matrix in in_order for place in matrix.source.all_places())
    for nbytes, answers in run(grouped(_items(in_order)), _sum_job, executor, places=places_in):
        for number, first, part in answers:
            in_order[number].found.add(first, part)
        done += nbytes
        on_progress(done, total)


_Item = tuple[int, Matrix, Chunk]
"""The number of a matrix, the matrix, and a chunk of it."""


def _items(matrices: Iterable[Matrix]) -> Iterator[tuple[_Item, int]]:
    for number, matrix in enumerate(matrices):
        for chunk in matrix.chunks():
            yield (number, matrix, chunk), matrix.source.cost(chunk)


def _sum_job(job: list[_Item]) -> tuple[int, list[tuple[int, int, LineMoments]]]:
    """Summarize the lines of each chunk of a job; returns their bytes too."""
    answers: list[tuple[int, int, LineMoments]] = []
    nbytes = 0
    for number, matrix, chunk in job:
        try:
            answers.append((number, *matrix.sum(chunk)))
        except CkptError as error:
            error.path = error.path or matrix.source.path
            raise
        nbytes += matrix.source.dtype.nbytes(chunk.end - chunk.begin)
    return nbytes, answers


@dataclass(frozen=True, slots=True)
class Member:
    """The lines of one tensor, or the reason why it has none."""

    tensor: Tensor
    shape: tuple[int, ...] | None
    """Of the part that was asked for."""
    plan: Matrix | str
    index: Index
    """The part that was asked for."""

    def __len__(self) -> int:
        return 1 if isinstance(self.plan, str) else len(self.plan.found.count)

    def label(self, number: int, by: str) -> str:
        """Return the name of a line: that of the tensor with the index that selects it."""
        items = Region.of(self.tensor).items(self.index)
        dims = [dim for dim, item in enumerate(items) if isinstance(item, slice)]
        dim = dims[LINES.index(by)]
        chosen = items[dim]
        assert isinstance(chosen, slice)
        items[dim] = range(*chosen.indices((self.tensor.shape or ())[dim]))[number]
        while items[-1] == slice(None):
            items.pop()
        return f"{self.tensor.name}[{spell_index(tuple(items))}]"

    def row(self, number: int, by: str) -> Row:
        """Return the row of a line."""
        dtype = self.tensor.dtype.name
        if isinstance(self.plan, str) or self.shape is None:
            return Row(self.tensor.name, dtype, self.shape, self.tensor.numel, note=str(self.plan))
        place = LINES.index(by)
        shape = (*self.shape[:place], *self.shape[place + 1 :])
        numel = 1
        for size in shape:
            numel *= size
        return Row(self.label(number, by), dtype, shape, numel, self.plan.found.line(number))


class Rows(Sequence[Row]):
    """The rows of all lines, each made when it is asked for: there may be very many."""

    def __init__(self, members: Sequence[Member], by: str) -> None:
        self._members = members
        self._by = by
        self._ends = list(accumulate(map(len, members)))
        self._order: Any = range(self._ends[-1] if members else 0)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        number = int(self._order[at])
        member = bisect_right(self._ends, number)
        return self._members[member].row(number - (self._ends[member - 1] if member else 0), self._by)

    def arranged(self, sort: str | None, *, bad_only: bool) -> Rows:
        """Return the same: by a column, greatest first but for names; and only lines with NaN or infinities."""
        import numpy as np

        order = np.arange(len(self))
        if sort == "name":
            starts = [end - len(member) for end, member in zip(self._ends, self._members, strict=True)]
            pairs = sorted(zip(self._members, starts, strict=True), key=lambda pair: pair[0].tensor.name)
            order = np.concatenate([order[:0], *(order[start : start + len(one)] for one, start in pairs)])
        elif sort is not None:
            order = np.argsort(-self._column(lambda found: found.column(sort), sort), kind="stable")  # NaN come last
        if bad_only:
            order = order[(self._column(lambda found: found.nan + found.inf, "") > 0)[order]]
        self._order = order
        return self

    def _column(self, of: Callable[[LineMoments], Any], key: str) -> Any:
        """Return a number of each line; NaN of tensors without lines."""
        import numpy as np

        found = [np.zeros(0)]
        for member in self._members:
            if key == "numel":
                found.append(np.full(len(member), member.row(0, self._by).numel if len(member) else 0))
            else:
                found.append(np.full(1, np.nan) if isinstance(member.plan, str) else of(member.plan.found))
        return np.concatenate(found)


def stats_of(
    checkpoint: Checkpoint,
    arguments: Sequence[str],
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    by: str | None,
    exclude: Sequence[str] = (),
    sort: str | None = None,
    bad_only: bool = False,
    **more: bool,
) -> Stats:
    """Summarize tensors, as `stats` with `more` of its options, or with `by` each of their rows or columns."""
    if by is None:
        return stats(
            checkpoint, arguments, executor, on_progress, exclude=exclude, sort=sort, bad_only=bad_only, **more
        )
    if by not in LINES or any(more.values()):
        raise UsageError("--by is row or column, and takes no --total, --fold or --percentiles")
    return _stats_by(checkpoint, arguments, executor, on_progress, by=by, exclude=exclude, sort=sort, bad_only=bad_only)


def _stats_by(
    checkpoint: Checkpoint,
    arguments: Sequence[str],
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    by: str,
    exclude: Sequence[str] = (),
    sort: str | None = None,
    bad_only: bool = False,
) -> Stats:
    """Summarize each `row` or `column` of the tensors that NAMEs select: all that one first, or second, index selects.

    A tensor of fewer dimensions than two has a note. Raises LimitError for more lines than are held.
    """
    known: dict[object, Matrix | str] = {}
    members: list[Member] = []
    lines = 0
    with about(checkpoint.path):
        budget = Budget.of(checkpoint)

        def plan(tensor: Tensor, region: Region | None, index: Index) -> Matrix | str:
            if region is None or len(region.shape) < len(LINES):
                return f"it has no {by}s"
            return Matrix(checkpoint, tensor, region, index, by)

        for tensor, region, index in selected(checkpoint, arguments, exclude):
            is_matrix = region is not None and len(region.shape) >= len(LINES)
            lines += region.shape[LINES.index(by)] if region is not None and is_matrix else 1
            if lines > limits.STATS_LINES:
                raise LimitError(f"these are more than the {limits.STATS_LINES:,} {by}s that stats summarizes")
            key = (tensor.view or id(tensor), region)
            if key not in known:
                known[key] = planned(plan, budget, tensor, region, index or ())
            shape = tensor.shape if region is None else region.shape
            members.append(Member(tensor, shape, known[key], index or ()))
        _sum_lines(checkpoint, [each for each in known.values() if isinstance(each, Matrix)], executor, on_progress)
    return Stats(checkpoint.path, Rows(members, by).arranged(sort, bad_only=bad_only))
