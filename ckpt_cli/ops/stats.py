"""The engine of `stats`: a summary of the values of each tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.select import excluded_names, part_of, select
from ckpt_cli.ops.show import spell_index
from ckpt_cli.parallel.map import grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.indexing import Index
    from ckpt_cli.arrays.moments import Moments
    from ckpt_cli.arrays.statistics import Codes, Numbers

_SPOTS = 8
"""Places of a tensor from which a sample is taken."""

_SAMPLE = 4096
"""Elements of a sample."""

_SAMPLES = 1 << 19
"""Elements of the samples of all tensors that are held at once."""

_IN_ORDER = 32 << 20
"""Bytes of a tensor that are read ahead before its sample is taken, so that a disk does not seek within them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor's line."""

    name: str
    """Its name, with the index that was asked for."""
    dtype: str
    shape: tuple[int, ...] | None
    numel: int
    """Elements as they are stored: a packed float4 has two values in each."""
    moments: Moments | None = None
    """None where there are no values to summarize; `note` says why."""
    edges: Sequence[float | int] = ()
    """Of the histogram's bars, the first being the least and the last the greatest value."""
    counts: Sequence[int] = ()
    note: str = ""

    @property
    def is_bad(self) -> bool:
        """True if it has NaN or infinities."""
        return self.moments is not None and bool(self.moments.nan or self.moments.inf)

    def key(self, key: str) -> Any:
        """Return the sort key: the value of a column, NaN where it has no value."""
        if key in ("name", "numel"):
            return getattr(self, key)
        found = getattr(self.moments, {"min": "least", "max": "most"}.get(key, key)) if self.moments else None
        return math.nan if found is None else found


@dataclass(frozen=True, slots=True)
class Stats:
    """The answer."""

    path: str
    rows: Sequence[Row]
    total: Row | None = None
    """All of them together, tied ones counted once."""


class _Subject:
    """One distinct view, and the statistics of its chunks so far."""

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor, region: Region, index: Index) -> None:
        from ckpt_cli.arrays.quantized import codec_of
        from ckpt_cli.arrays.statistics import summer_of

        codec = codec_of(checkpoint, tensor).at(index)
        flagged = tensor.conj or tensor.neg or tensor.layout == "quantized"
        self.source = TensorReader(checkpoint, tensor, region, codec, any_order=True)
        self.summer: Numbers | Codes = summer_of(codec, flagged=flagged, big_endian=tensor.big_endian)
        self._by_rows = not codec.uniform
        self._is_planned = False
        self.found: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker in another process, without the results so far."""
        return {**self.__dict__, "found": None}

    def plan(self) -> Any:
        """Let a sample decide how it is summed; returns the sample."""
        from ckpt_cli.arrays.statistics import Numbers

        sample = self._sample()
        self._is_planned = True
        if isinstance(self.summer, Numbers):
            self.summer.sample(sample)
        return sample

    def chunks(self) -> Iterator[Chunk]:
        """Its chunks, after a sample decided how they are summed."""
        from ckpt_cli.arrays.statistics import Numbers

        if isinstance(self.summer, Numbers) and self.source.numel and not self._is_planned:
            if self.source.plain:
                self.source.expect(_IN_ORDER)
            self.plan()
        yield from self.source.chunks(self.source.cuts())

    def _sample(self) -> Any:
        """Values from a few places, the same ones every time; of what must be gathered, from its beginning."""
        import numpy as np

        source = self.source
        if not source.plain or self._by_rows:
            begin, end = next(source.cuts())
            chunk = source.chunk(begin, end)
            values = self._numbers(chunk)
            return values[:: max(len(values) // _SAMPLE, 1)].copy()
        count = min(source.numel, _SAMPLE // _SPOTS if source.numel > _SAMPLE else _SAMPLE)
        last = source.numel - count
        begins = [last * spot // (_SPOTS - 1) for spot in range(_SPOTS)] if last else [0]
        return np.concatenate([self._numbers(source.chunk(at, at + count)).copy() for at in begins])

    def _numbers(self, chunk: Chunk) -> Any:
        from ckpt_cli.arrays.statistics import Codes

        data = self.source.read(chunk)
        summer = self.summer
        return summer.numbers(data) if isinstance(summer, Codes) else summer.values(data, self._part(chunk))

    def _part(self, chunk: Chunk) -> tuple[slice, ...]:
        return self.source.part(chunk.begin, chunk.end) if self._by_rows else ()

    def sum(self, chunk: Chunk) -> Any:
        """Summarize one chunk; runs on a worker."""
        return self.summer.chunk(self.source.read(chunk), self._part(chunk))

    def nbytes(self, chunk: Chunk) -> int:
        """Bytes of a chunk."""
        return self.source.dtype.nbytes(chunk.end - chunk.begin)


def stats(
    checkpoint: Checkpoint,
    arguments: Sequence[str],
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    exclude: Sequence[str] = (),
    sort: str | None = None,
    bad_only: bool = False,
    total: bool = False,
) -> Stats:
    """Summarize the tensors that NAMEs select, without those that `exclude` selects, on an executor.

    `on_progress` gets the bytes done.

    A tensor that is made of others has a row for each part; one without values, or packed in a way that no format
    defines, has a note instead of numbers. `sort` is a column, greatest first but for names.
    """
    with about(checkpoint.path):
        plans = list(_plans(checkpoint, arguments, exclude))
        subjects = list({id(plan): plan for _, plan, _ in plans if isinstance(plan, _Subject)}.values())
        edges = _share_edges(subjects) if total else ()
        _sum_all(checkpoint, subjects, executor, on_progress)
        rows = [_row(tensor, plan, shape) for tensor, plan, shape in plans]
        whole = _total(subjects, edges) if total else None
    if bad_only:
        rows = [row for row in rows if row.is_bad]
    return Stats(checkpoint.path, _sorted(rows, sort), whole)


def _plans(
    checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[Tensor, _Subject | str, tuple[int, ...] | None]]:
    """Yield each tensor with its summary, which tied ones share, or the reason for none; and the shape to report."""
    budget = Budget.of(checkpoint)
    known: dict[object, _Subject | str] = {}
    excluded = excluded_names(checkpoint, exclude)
    for selection in select(checkpoint, arguments):
        if selection.entry.name in excluded:
            continue
        if not isinstance(selection.entry, Tensor):
            if selection.index is not None:
                raise UsageError(f"{selection.entry.name!r} is not a tensor, so it takes no index")
        else:
            index = selection.index or ()
            for tensor in _with_values(selection.entry, set()):
                region = part_of(tensor, index) if tensor.shape is not None else None
                key = (tensor.view or id(tensor), region)
                if key not in known:
                    known[key] = _subject(checkpoint, budget, tensor, region, index)
                label = tensor.name if selection.index is None else f"{tensor.name}[{spell_index(index)}]"
                yield replace(tensor, name=label), known[key], tensor.shape if region is None else region.shape


def _subject(
    checkpoint: Checkpoint, budget: Budget, tensor: Tensor, region: Region | None, index: Index
) -> _Subject | str:
    from ckpt_cli.arrays.codec import require_plain

    try:
        if tensor.layout != "quantized":
            require_plain(tensor)
        if region is None:
            return "it has no shape"
        budget.read_parts(tensor, Region.of)
        budget.read(tensor, region)
        return _Subject(checkpoint, tensor, region, index)
    except UnsupportedError as error:
        return error.problem.removeprefix(f"tensor {tensor.name!r} ")


def _with_values(tensor: Tensor, seen: set[object]) -> Iterator[Tensor]:
    """Yield the tensor and its attributes, or the tensors that it is made of, each set of parts once."""
    if not tensor.parts or tensor.storage is not None:
        yield tensor
    parts = tensor.parts if tensor.storage is None else tensor.attributes
    view = (tensor.view, tuple(part.storage for part in parts)) if tensor.view is not None else None
    if parts and (view is None or view not in seen):
        seen.add(view)
        for part in parts:
            yield from _with_values(replace(part, name=f"{tensor.name}.{part.name}"), seen)


def _sum_all(checkpoint: Checkpoint, subjects: Sequence[_Subject], executor: Executor, on_progress: OnProgress) -> None:
    """Go through every chunk of every subject, in the order of the files."""
    from ckpt_cli.arrays.statistics import add

    nbytes = sum(subject.source.nbytes for subject in subjects)
    done = 0
    in_order = in_file_order(subjects, lambda subject: subject.source.place, checkpoint.container.files)
    for size, answers in run(grouped(_items(in_order)), _sum_job, executor):
        for number, found in answers:
            in_order[number].found = add(in_order[number].found, found)
        done += size
        on_progress(done, nbytes)


_Item = tuple[int, _Subject, Chunk]
"""The number of a subject, the subject, and a chunk of it."""


def _items(subjects: Iterable[_Subject]) -> Iterator[tuple[_Item, int]]:
    for number, subject in enumerate(subjects):
        for chunk in subject.chunks():
            yield (number, subject, chunk), subject.source.cost(chunk)


def _sum_job(job: list[_Item]) -> tuple[int, list[tuple[int, Any]]]:
    """Summarize each chunk of a job, by the number of its subject, and their bytes.

    They are not merged here: which chunks share a job depends on the file, and the last digits must not.
    """
    answers: list[tuple[int, Any]] = []
    nbytes = 0
    for number, subject, chunk in job:
        try:
            answers.append((number, subject.sum(chunk)))
        except CkptError as error:
            error.path = error.path or subject.source.path
            raise
        nbytes += subject.nbytes(chunk)
    return nbytes, answers


def _row(tensor: Tensor, plan: _Subject | str, shape: tuple[int, ...] | None) -> Row:
    numel = math.prod(shape) if shape is not None else 0
    if isinstance(plan, str):
        return Row(tensor.name, tensor.dtype.name, shape, numel, note=plan)
    found = plan.summer.total(plan.found)
    edges, counts = plan.summer.histogram(found)
    return Row(tensor.name, tensor.dtype.name, shape, numel, found, edges, counts)


def _share_edges(subjects: Iterable[_Subject]) -> tuple[float, ...]:
    """Have all of them count by the same edges as well, which samples of all decide."""
    from ckpt_cli.arrays.moments import shared_edges

    filled = [subject for subject in subjects if subject.source.numel]
    most = max(_SAMPLES // max(len(filled), 1), 1)
    samples = []
    for subject in filled:
        sample = subject.plan()
        samples.append((sample[:: -(-len(sample) // most)].copy(), subject.source.numel))
    edges = shared_edges(samples)
    for subject in filled:
        subject.summer.share(edges)
    return edges


def _total(subjects: Iterable[_Subject], edges: Sequence[float]) -> Row:
    """All of them together."""
    from ckpt_cli.arrays.moments import Moments, merged
    from ckpt_cli.arrays.statistics import bars

    found = Moments()
    numel = 0
    for subject in subjects:
        one = subject.summer.total(subject.found)
        found = merged(found, replace(one, below=one.below[len(one.below) - len(edges) :]))
        numel += subject.source.numel
    return Row("total", "", None, numel, found, *bars(edges, found))


def _sorted(rows: list[Row], key: str | None) -> list[Row]:
    if key is None:
        return rows
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    keyed = [(row.key(key), row) for row in rows]
    found = [pair for pair in keyed if pair[0] == pair[0]]
    found.sort(key=lambda pair: pair[0], reverse=True)
    return [row for _, row in found] + [row for value, row in keyed if value != value]
