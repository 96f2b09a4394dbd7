"""The engine of `series`: the tensors of a run from one checkpoint to the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, NameNotFoundError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.ls import Fold, fold
from ckpt_cli.ops.optimizer_names import StateNames
from ckpt_cli.ops.select import part_of, select, with_values
from ckpt_cli.ops.show import spell_index
from ckpt_cli.ops.steps import OnError, Progress, Source, raised, run_of
from ckpt_cli.parallel.tensor_series import Found, Place, follow, tracks_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.indexing import Index
    from ckpt_cli.arrays.moments import Moments
    from ckpt_cli.ops.steps import Number


@dataclass(frozen=True, slots=True)
class File:
    """One checkpoint of the run."""

    path: str
    step: Number | None = None
    """None where nothing says it."""
    epoch: Number | None = None
    error: CkptError | OSError | None = None
    """The error because of which nothing of it is in the answer."""


@dataclass(frozen=True, slots=True)
class Point:
    """A tensor, or several of a folded row, in one checkpoint: all but the counts is over the finite values."""

    file: int
    """The number of the file."""
    dtype: str
    shape: tuple[int, ...] | None
    """Of a folded row, that of each of its tensors."""
    numel: int
    norm: float
    mean: float
    """NaN where there are no finite values, as is `std` of fewer than two."""
    std: float
    max: float | int | None
    """The greatest magnitude; None where there are no finite values."""
    nan: int
    inf: int
    change: float | None
    """‖W - V‖ / ‖V‖, V being the values in the file before; None where that has no such tensor of this shape."""


@dataclass(frozen=True, slots=True)
class Event:
    """A change of what a tensor is."""

    file: int
    """The number of the file from which on it is so."""
    what: str


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, or the tensors of numbered layers, through the run."""

    name: str
    points: Sequence[Point]
    """Those files that have it, in their order."""
    count: int = 1
    """Tensors of a folded row."""
    events: Sequence[Event] = ()
    """That it comes, goes, or changes its shape or dtype, or has no values that can be summarized."""


@dataclass(frozen=True, slots=True)
class Series:
    """The answer."""

    files: Sequence[File]
    """In the order of the run; those that cannot be read come last."""
    by: str
    """What they are ordered by: `step`, `epoch` or `name`."""
    tensors: Sequence[Row]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each tensor in each file that has it, for a DataFrame."""
        return [
            {"name": row.name, **_facts(self.files[point.file], point), "count": row.count}
            for row in self.tensors
            for point in row.points
        ]

    def with_files(self, files: Sequence[File]) -> Series:
        """Return the same with files that could not be opened after the others."""
        return replace(self, files=[*self.files, *files])


def _facts(file: File, point: Point) -> dict[str, Any]:
    """Return what is known of a file and of a tensor in it."""
    keys = ("dtype", "shape", "numel", "norm", "change", "mean", "std", "max", "nan", "inf")
    return {"path": file.path, "step": file.step, "epoch": file.epoch} | {key: getattr(point, key) for key in keys}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a tensor is in one checkpoint."""

    dtype: str
    layout: str
    shape: tuple[int, ...] | None
    part: tuple[int, ...]
    """The shape of the part of it that is followed."""
    reason: str = ""
    """Why it has no values that could be summarized; empty where it has."""


@dataclass(slots=True)
class _Entry:
    """A tensor of one name through the checkpoints, and what was found of it there."""

    label: str
    first: Tensor
    """That of the first file that has it, by the name of its row."""
    kinds: dict[int, _Kind] = field(default_factory=dict)
    found: dict[int, Found] = field(default_factory=dict)


@dataclass(slots=True)
class _Entries:
    """What is known of the run so far."""

    state_names: StateNames
    by_key: dict[tuple[str, int], _Entry] = field(default_factory=dict)
    """The tensors by name, and by how many before them have it too, in the order in which they first appear."""
    errors: dict[int, CkptError | OSError] = field(default_factory=dict)
    """For checkpoints whose values cannot be read, the first error."""
    _kinds: dict[tuple[object, ...], _Kind] = field(default_factory=dict)

    def kind(self, *facts: Any) -> _Kind:
        """Return what a tensor is, the same object for equal facts."""
        found = self._kinds.get(facts)
        if found is None:
            found = self._kinds[facts] = _Kind(*facts)
        return found

    def note(self, key: tuple[str, int], step: int, tensor: Tensor, kind: _Kind) -> None:
        """Note that a checkpoint has a tensor."""
        entry = self.by_key.get(key)
        if entry is None:
            label = key[0]
            first = tensor if tensor.name == label else replace(tensor, name=label)
            entry = self.by_key[key] = _Entry(label, first)
        entry.kinds.setdefault(step, kind)


def series(
    sources: Sequence[Source],
    arguments: Sequence[str],
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    folded: bool = False,
    on_error: OnError = raised,
) -> Series:
    """Follow the tensors that NAMEs select through the checkpoints of a run, on an executor.

    They are put in the order of their steps, and a bounded number is open at a time. One that cannot be opened is
    reported to `on_error`, which may raise it; one whose values cannot be read is in the answer with its error.
    Raises NameNotFoundError for a NAME that none of them has.
    """
    known = _Entries(StateNames(arguments))
    missing: dict[str, NameNotFoundError | None] = dict.fromkeys(arguments)

    def look(checkpoint: Checkpoint) -> None:
        known.state_names.look(checkpoint)
        for argument in list(missing):
            error = _not_found(checkpoint, argument)
            if error is None:
                del missing[argument]
            else:
                missing[argument] = missing[argument] or error

    with run_of(sources, look, on_error) as run:
        error = next(filter(None, missing.values()), None)
        if error is not None and not known.state_names.differing:
            raise error
        read = Progress(on_progress, len(run.members))
        for begin, end in run.spans():
            with run.opened(begin, end) as checkpoints:
                _follow(begin, checkpoints, arguments, known, executor, read.part(end))
        if error is not None and not known.by_key:
            raise error
    errors, files = known.errors, len(run.members)
    return Series(
        [
            File(member.path, member.numbers.get("step"), member.numbers.get("epoch"), errors.get(number))
            for number, member in enumerate(run.members)
        ],
        run.by,
        [_row(label, group, files, errors) for label, group in _groups(known.by_key.values(), folded=folded)],
    )


def _not_found(checkpoint: Checkpoint, argument: str) -> NameNotFoundError | None:
    """Return the error if a NAME selects nothing."""
    try:
        select(checkpoint, [argument])
    except NameNotFoundError as error:
        return error
    return None


def _follow(
    begin: int,
    checkpoints: Sequence[Checkpoint | CkptError | OSError],
    arguments: Sequence[str],
    known: _Entries,
    executor: Executor,
    on_progress: OnProgress,
) -> None:
    """Read the tensors of checkpoints that follow each other, from number `begin` of the run on."""
    places: dict[tuple[str, int], list[Place]] = {}
    for step, checkpoint in enumerate(checkpoints, begin):
        if not isinstance(checkpoint, Checkpoint):
            known.errors.setdefault(step, checkpoint)
            continue
        budget = Budget.of(checkpoint)
        counts: Counter[str] = Counter()
        for label, tensor, index in _selected(known.state_names.of(checkpoint), arguments):
            key = label, counts[label]
            counts[label] += 1
            place, kind = _place(step, checkpoint, budget, tensor, index, known.kind)
            known.note(key, step, tensor, kind)
            if place is not None:
                places.setdefault(key, []).append(place)
    tracks, owners = tracks_of(places)
    follow(tracks, executor, on_progress)
    for track in tracks:
        for number, error in track.errors.items():
            known.errors.setdefault(number, error)
    for key, track in owners:
        for place, found in zip(track.places, track.found, strict=True):
            known.by_key[key].found.setdefault(place.step, found)


def _selected(checkpoint: Checkpoint, arguments: Sequence[str]) -> Iterator[tuple[str, Tensor, Index]]:
    """Yield the tensors of one checkpoint that NAMEs select, each once, with the name of its row and its index."""
    seen: dict[tuple[int, str], Tensor] = {}
    wanted: Sequence[str | None] = arguments or [None]
    for argument in wanted:
        try:
            selections = select(checkpoint, [] if argument is None else [argument])
        except NameNotFoundError:
            continue
        for selection in selections:
            if not isinstance(selection.entry, Tensor):
                if selection.index is not None:
                    raise UsageError(f"{selection.entry.name!r} is not a tensor, so it takes no index")
                continue
            at = "" if selection.index is None else f"[{spell_index(selection.index)}]"
            if (id(selection.entry), at) not in seen:
                seen[id(selection.entry), at] = selection.entry
                for tensor in with_values(selection.entry, set()):
                    yield f"{tensor.name}{at}", tensor, selection.index or ()


def _place(
    step: int, checkpoint: Checkpoint, budget: Budget, tensor: Tensor, index: Index, kind: Callable[..., _Kind]
) -> tuple[Place | None, _Kind]:
    """Return where the values of a tensor are, and what it is; None where it has none that could be summarized."""
    from ckpt_cli.arrays.codec import require_plain

    known = tensor.dtype.name, tensor.layout, tensor.shape
    try:
        if tensor.layout != "quantized":
            require_plain(tensor)
        if tensor.shape is None:
            return None, kind(*known, (), "it has no shape")
        region = part_of(tensor, index)
        budget.read_parts(tensor, Region.of)
        budget.read(tensor, region)
        return Place(step, checkpoint, budget, tensor, region, index), kind(*known, region.shape)
    except UnsupportedError as error:
        return None, kind(*known, (), error.problem.removeprefix(f"tensor {tensor.name!r} "))
    except CkptError:
        with about(checkpoint.path):
            raise


def _groups(entries: Iterable[_Entry], *, folded: bool) -> Iterator[tuple[str, list[_Entry]]]:
    """Yield the entries of each row with its name: one, or with `folded` those of numbered layers."""
    if not folded:
        yield from ((entry.label, [entry]) for entry in entries)
        return
    by_tensor = {}
    firsts = []
    for entry in entries:
        firsts.append(entry.first)
        by_tensor[id(firsts[-1])] = entry
    for row in fold(firsts):
        members = row.members if isinstance(row, Fold) else [row]
        yield row.name, [by_tensor[id(member)] for member in members]


def _row(label: str, entries: Sequence[_Entry], files: int, errors: dict[int, CkptError | OSError]) -> Row:
    numbers = sorted({step for entry in entries for step in entry.kinds} - errors.keys())
    points = [point for step in numbers if (point := _point(entries, step, errors)) is not None]
    whole = [step for step in range(files) if step not in errors]
    for entry in entries:
        entry.found.clear()  # of a long run this is much more than the points
    return Row(label, points, len(entries), _shared_events(entries, whole))


def _shared_events(entries: Sequence[_Entry], whole: Sequence[int]) -> list[Event]:
    """Return the events of all tensors of a row: what happens to several of them once, with their number."""
    owners: dict[Event, list[str]] = {}
    for entry in entries:
        for event in _events(entry, whole):
            owners.setdefault(event, []).append(entry.label)
    found = []
    for event, labels in owners.items():
        some = labels[0] if len(labels) == 1 else f"{len(labels)} of {len(entries)}"
        found.append(event if len(labels) == len(entries) else replace(event, what=f"{some}: {event.what}"))
    return sorted(found, key=lambda event: event.file)


def _point(entries: Sequence[_Entry], step: int, errors: Collection[int]) -> Point | None:
    """Return the summary of some tensors in one file; None where none of them has values there."""
    from ckpt_cli.arrays.moments import merged

    whole: Moments | None = None
    before, squares = 0.0, None
    here: list[_Kind] = []
    for entry in entries:
        kind, found = entry.kinds.get(step), entry.found.get(step)
        if kind is None or kind.reason or found is None:
            continue
        here.append(kind)
        whole = found.moments if whole is None else merged(whole, found.moments)
        if found.moved is not None and step - 1 not in errors:
            squares = (squares or 0.0) + found.moved
            before += entry.found[step - 1].moments.norm ** 2
    if whole is None:
        return None
    return Point(
        step,
        here[0].dtype,
        here[0].part,
        sum(prod(kind.part) for kind in here),
        whole.norm,
        whole.mean,
        whole.std,
        _greatest(whole),
        whole.nan,
        whole.inf,
        _relative(squares, before),
    )


def _greatest(found: Moments) -> float | int | None:
    return None if found.least is None or found.most is None else max(abs(found.least), abs(found.most))


def _relative(squares: float | None, before: float) -> float | None:
    """Return the length of a difference as a share of a length before: 0 of nothing by nothing, else infinite."""
    if squares is None:
        return None
    if not before:
        return math.inf if squares else 0.0
    return math.sqrt(squares) / math.sqrt(before)


def _events(entry: _Entry, whole: Sequence[int]) -> Iterator[Event]:
    """Yield the changes of what a tensor is, from one to the next of the files that can be read."""
    last: _Kind | None = None
    for place, step in enumerate(whole):
        now = entry.kinds.get(step)
        if place and (now is None) != (last is None):
            yield Event(step, "appears" if last is None else "is gone")
        if now is not None and now.reason and not (last is not None and last.reason):
            yield Event(step, now.reason)
        if now is not None and last is not None and now is not last:
            yield from (Event(step, what) for what in _differences(last, now))
        last = now


def _differences(last: _Kind, now: _Kind) -> Iterator[str]:
    for what, before, after in (
        ("shape", _shape_text(last.shape), _shape_text(now.shape)),
        ("dtype", last.dtype, now.dtype),
        ("layout", last.layout, now.layout),
    ):
        if before != after:
            yield f"{what} {before} → {after}"


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else f"[{','.join(map(str, shape))}]"
