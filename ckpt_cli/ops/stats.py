"""The engine of `stats`: a summary of the values of each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.at_once import Place
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.ls import Fold, fold
from ckpt_cli.ops.select import excluded_names, part_of, select, with_values
from ckpt_cli.ops.show import spell_index
from ckpt_cli.ops.summaries import Row, Stats
from ckpt_cli.parallel.announced import AHEAD_ELSEWHERE, announced, are_elsewhere, places_in
from ckpt_cli.parallel.map import AHEAD, grouped, in_file_order, run
from ckpt_cli.parallel.tensor_chunks import Chunk, TensorReader

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.indexing import Index
    from ckpt_cli.arrays.moments import Moments
    from ckpt_cli.arrays.sketch import Sketch, Spread
    from ckpt_cli.arrays.statistics import Codes, Numbers

_SPOTS, _SAMPLE = 8, 4096
"""Places of a tensor from which a sample is taken, and elements of the sample."""

_SAMPLES = 1 << 19
"""Elements of the samples of all tensors that are held at once."""

_IN_ORDER = 32 << 20
"""Bytes of a tensor that are read ahead before its sample is taken, so that a disk does not seek within them."""


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
        self.groups: list[_Group] = []
        """Those that it is counted for too, in the order of their edges."""
        self.spread: Spread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker in another process, without the results so far."""
        return {**self.__dict__, "found": None, "groups": []}

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
        return np.concatenate([self._numbers(chunk).copy() for chunk in self._spots()])

    def _spots(self) -> list[Chunk]:
        """Return the places that the sample of values that stand in a row is taken from."""
        source = self.source
        count = min(source.numel, _SAMPLE // _SPOTS if source.numel > _SAMPLE else _SAMPLE)
        last = source.numel - count
        begins = [last * spot // (_SPOTS - 1) for spot in range(_SPOTS)] if last else [0]
        return [source.chunk(at, at + count) for at in begins]

    def places(self) -> list[Place]:
        """Return the places of what is read to plan it; none where it is gathered."""
        from ckpt_cli.arrays.statistics import Numbers

        has_sample = isinstance(self.summer, Numbers) and self.source.numel and not self._is_planned
        if not has_sample or not self.source.plain or self._by_rows:
            return []
        return [place for chunk in self._spots() for place in chunk.places]

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

    def finish(self) -> None:
        """Make the moments of all chunks of what was found, and keep of the sketch what it says."""
        from ckpt_cli.arrays.sketch import both, spread_of

        found: Moments = self.summer.total(self.found)
        self.found = replace(found, sketch=None)
        if self.summer.sketched:
            self.spread = spread_of(found.sketch)
            for group in self.groups:
                group.sketch = both(group.sketch, found.sketch)


@dataclass(slots=True, eq=False)
class _Group:
    """Tensors that are summarized together, tied ones once."""

    subjects: Sequence[_Subject]
    edges: Sequence[float] = ()
    sketch: Sketch | None = None

    def moments(self) -> Moments:
        """Return the moments of all of them, with counts by the edges in common."""
        from ckpt_cli.arrays.moments import Moments, merged

        found = Moments()
        for subject in self.subjects:
            below = subject.found.below
            after = subject.groups[subject.groups.index(self) :]
            first = len(below) - sum(len(group.edges) for group in after)
            found = merged(found, replace(subject.found, below=below[first : first + len(self.edges)]))
        return found

    def row(self, name: str, dtype: str, shape: tuple[int, ...] | None, numel: int, count: int) -> Row:
        """Return the row of all of them."""
        from ckpt_cli.arrays.sketch import spread_of
        from ckpt_cli.arrays.statistics import bars

        found = self.moments()
        spread = spread_of(self.sketch) if any(subject.summer.sketched for subject in self.subjects) else None
        return Row(name, dtype, shape, numel, found, *bars(self.edges, found), count=count, spread=spread)


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
    folded: bool = False,
    percentiles: bool = False,
) -> Stats:
    """Summarize the tensors that NAMEs select, without those that `exclude` selects, on an executor.

    `on_progress` gets the bytes done.

    A tensor that is made of others has a row for each part; one without values, or packed in a way that no format
    defines, has a note instead of numbers. `sort` is a column, greatest first but for names. With `folded` the tensors
    of numbered layers are one row. `percentiles` also finds the spread of each row.
    """
    with about(checkpoint.path):
        for file in checkpoint.container.files if not arguments else ():
            file.note_whole()
        plans = list(_plans(checkpoint, arguments, exclude))
        subjects = list({id(plan): plan for _, plan, _ in plans if isinstance(plan, _Subject)}.values())
        for subject in subjects if percentiles else ():
            subject.summer.sketched = True
        lines = _folded(plans) if folded else [_Line(tensor, shape, [plan]) for tensor, plan, shape in plans]
        groups = [line.group for line in lines if line.group is not None]
        whole = _Group(subjects) if total else None
        _share_edges(subjects, groups if whole is None else [*groups, whole])
        _sum_all(checkpoint, subjects, executor, on_progress)
        rows = [line.row() for line in lines]
        numel = sum(subject.source.numel for subject in subjects)
        together = None if whole is None else whole.row("total", "", None, numel, len(subjects))
    if bad_only:
        rows = [row for row in rows if row.is_bad]
    return Stats(checkpoint.path, _sorted(rows, sort), together)


def _plans(
    checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[Tensor, _Subject | str, tuple[int, ...] | None]]:
    """Yield each tensor with its summary, which tied ones share, or the reason for none; and the shape to report."""
    budget = Budget.of(checkpoint)
    known: dict[object, _Subject | str] = {}

    def plan(tensor: Tensor, region: Region | None, index: Index) -> _Subject | str:
        return "it has no shape" if region is None else _Subject(checkpoint, tensor, region, index)

    for tensor, region, index in selected(checkpoint, arguments, exclude):
        key = (tensor.view or id(tensor), region)
        if key not in known:
            known[key] = planned(plan, budget, tensor, region, index or ())
        label = tensor.name if index is None else f"{tensor.name}[{spell_index(index)}]"
        yield replace(tensor, name=label), known[key], tensor.shape if region is None else region.shape


def selected(
    checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[Tensor, Region | None, Index | None]]:
    """Yield the tensors that have values, with the part that is asked for and its index; without a shape, with None."""
    excluded = excluded_names(checkpoint, exclude)
    for selection in select(checkpoint, arguments):
        if selection.entry.name in excluded:
            continue
        if not isinstance(selection.entry, Tensor):
            if selection.index is not None:
                raise UsageError(f"{selection.entry.name!r} is not a tensor, so it takes no index")
        else:
            for tensor in with_values(selection.entry, set()):
                yield tensor, None if tensor.shape is None else part_of(tensor, selection.index), selection.index


Plan = TypeVar("Plan")


def planned(
    plan: Callable[[Tensor, Region | None, Index], Plan | str],
    budget: Budget,
    tensor: Tensor,
    region: Region | None,
    index: Index,
) -> Plan | str:
    """Return what summarizes a tensor, or the reason why nothing can, once its bytes are counted."""
    from ckpt_cli.arrays.codec import require_plain

    try:
        if tensor.layout != "quantized":
            require_plain(tensor)
        if region is not None:
            budget.read_parts(tensor, Region.of)
            budget.read(tensor, region)
        return plan(tensor, region, index)
    except UnsupportedError as error:
        return error.problem.removeprefix(f"tensor {tensor.name!r} ")


def _sum_all(checkpoint: Checkpoint, subjects: Sequence[_Subject], executor: Executor, on_progress: OnProgress) -> None:
    """Go through every chunk of every subject, in the order of the files."""
    from ckpt_cli.arrays.statistics import add

    nbytes = sum(subject.source.nbytes for subject in subjects)
    done = 0
    in_order = in_file_order(subjects, lambda subject: subject.source.place, checkpoint.container.files)
    last = 0
    ahead = AHEAD_ELSEWHERE if are_elsewhere(subjects) else AHEAD
    for size, answers in run(grouped(_items(in_order)), _sum_job, executor, ahead, places=places_in):
        for number, found in answers:
            for finished in range(last, number):
                in_order[finished].finish()
            last = number
            in_order[number].found = add(in_order[number].found, found)
        done += size
        on_progress(done, nbytes)
    for subject in in_order[last:]:
        subject.finish()


_Item = tuple[int, _Subject, Chunk]
"""The number of a subject, the subject, and a chunk of it."""


def _items(subjects: Sequence[_Subject]) -> Iterator[tuple[_Item, int]]:
    for number, subject in enumerate(announced(subjects, stream=True)):
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


@dataclass(slots=True)
class _Line:
    """What becomes a row: one tensor, or those of numbered layers."""

    tensor: Tensor
    """The first of them, by the name of the row."""
    shape: tuple[int, ...] | None
    plans: Sequence[_Subject | str]
    """Of each, what summarizes it or the reason for there being nothing."""
    group: _Group | None = None

    def row(self) -> Row:
        """Return the row, once everything is summarized."""
        tensor, shape, plan = self.tensor, self.shape, self.plans[0]
        numel = math.prod(shape) * len(self.plans) if shape is not None else 0
        if isinstance(plan, str):
            return Row(tensor.name, tensor.dtype.name, shape, numel, note=plan, count=len(self.plans))
        if self.group is not None:
            return self.group.row(tensor.name, tensor.dtype.name, shape, numel, len(self.plans))
        edges, counts = plan.summer.histogram(plan.found)
        return Row(tensor.name, tensor.dtype.name, shape, numel, plan.found, edges, counts, spread=plan.spread)


def _folded(plans: Sequence[tuple[Tensor, _Subject | str, tuple[int, ...] | None]]) -> list[_Line]:
    """Return the rows of which those of numbered layers are one."""
    known = {id(tensor): (plan, shape) for tensor, plan, shape in plans}
    lines = []
    for row in fold(tensor for tensor, _, _ in plans):
        members = row.members if isinstance(row, Fold) else [row] if isinstance(row, Tensor) else []
        of_members = [known[id(member)][0] for member in members]
        line = _Line(replace(members[0], name=row.name), known[id(members[0])][1], of_members)
        if isinstance(row, Fold) and not any(isinstance(plan, str) for plan in of_members):
            line.group = _Group([plan for plan in dict.fromkeys(of_members) if isinstance(plan, _Subject)])
        lines.append(line)
    return lines


def _share_edges(subjects: Iterable[_Subject], groups: Sequence[_Group]) -> None:
    """Have the tensors of each group count by edges in common as well, which samples of all of them decide."""
    from ckpt_cli.arrays.moments import shared_edges

    if not groups:
        return
    filled = [subject for subject in subjects if subject.source.numel]
    most = max(_SAMPLES // max(len(filled), 1), 1)
    samples = {}
    for subject in announced(filled, stream=False):
        sample = subject.plan()
        samples[subject] = (sample[:: -(-len(sample) // most)].copy(), subject.source.numel)
    for group in groups:
        group.edges = shared_edges([samples[subject] for subject in group.subjects if subject in samples])
        for subject in group.subjects:
            subject.groups.append(group)
    for subject in filled:
        subject.summer.share([edge for group in subject.groups for edge in group.edges])


def _sorted(rows: list[Row], key: str | None) -> list[Row]:
    if key is None:
        return rows
    if key == "name":
        return sorted(rows, key=lambda row: row.name)
    keyed = [(row.key(key), row) for row in rows]
    found = [pair for pair in keyed if pair[0] == pair[0]]
    found.sort(key=lambda pair: pair[0], reverse=True)
    return [row for _, row in found] + [row for value, row in keyed if value != value]
