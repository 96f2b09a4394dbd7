"""The engine of `series`: the tensors of a run from one checkpoint to the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.errors import CkptError, NameNotFoundError, UnsupportedError, UsageError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.ls import Fold, fold
from ckpt_cli.ops.optimizer_names import by_parameter
from ckpt_cli.ops.select import part_of, select, with_values
from ckpt_cli.ops.show import spell_index
from ckpt_cli.ops.steps import steps_of
from ckpt_cli.parallel.tensor_series import Found, Place, Track, follow

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


@dataclass(slots=True)
class _Entry:
    """A tensor of one name through the checkpoints, and what was found of it there."""

    label: str
    places: dict[int, Place | _Without] = field(default_factory=dict)
    found: dict[int, Found] = field(default_factory=dict)

    @property
    def first(self) -> Tensor:
        """The tensor in the first file that has it, by the name of its row."""
        return replace(next(iter(self.places.values())).tensor, name=self.label)


@dataclass(frozen=True, slots=True)
class _Without:
    """A tensor without values that could be summarized."""

    tensor: Tensor
    reason: str


def series(
    checkpoints: Sequence[Checkpoint],
    arguments: Sequence[str],
    executor: Executor,
    on_progress: OnProgress = lambda _, __: None,
    *,
    folded: bool = False,
) -> Series:
    """Follow the tensors that NAMEs select through the checkpoints of a run, on an executor.

    They are put in the order of their steps. A checkpoint whose values cannot be read is in the answer with its error.
    Raises NameNotFoundError for a NAME that none of them has.
    """
    steps = steps_of(checkpoints)
    ordered = by_parameter([checkpoints[number] for number in steps.order], arguments)
    known = [steps.numbers[number] for number in steps.order]
    entries = _aligned(ordered, arguments)
    tracks, owners = _tracks(entries.values())
    follow(tracks, executor, on_progress)
    errors: dict[int, CkptError | OSError] = {}
    for track in tracks:
        for number, error in track.errors.items():
            errors.setdefault(number, error)
    for entry, track in owners:
        entry.found.update((place.step, found) for place, found in zip(track.places, track.found, strict=True))
    return Series(
        [
            File(checkpoint.path, said.get("step"), said.get("epoch"), errors.get(number))
            for number, (checkpoint, said) in enumerate(zip(ordered, known, strict=True))
        ],
        steps.by,
        [_row(label, group, len(ordered), errors) for label, group in _groups(entries.values(), folded=folded)],
    )


def _aligned(checkpoints: Sequence[Checkpoint], arguments: Sequence[str]) -> dict[tuple[str, int], _Entry]:
    """Return the tensors by name, and by how many before them have it too, in the order in which they first appear."""
    entries: dict[tuple[str, int], _Entry] = {}
    missing: dict[str, list[NameNotFoundError]] = {}
    for step, checkpoint in enumerate(checkpoints):
        budget = Budget.of(checkpoint)
        counts: Counter[str] = Counter()
        for label, tensor, index in _selected(checkpoint, arguments, missing):
            entry = entries.setdefault((label, counts[label]), _Entry(label))
            entry.places[step] = _place(step, checkpoint, budget, tensor, index)
            counts[label] += 1
    for errors in missing.values():
        if len(errors) == len(checkpoints):
            raise errors[0]
    return entries


def _selected(
    checkpoint: Checkpoint, arguments: Sequence[str], missing: dict[str, list[NameNotFoundError]]
) -> Iterator[tuple[str, Tensor, Index]]:
    """Yield the tensors of one checkpoint that NAMEs select, each once, with the name of its row and its index."""
    seen: dict[tuple[int, str], Tensor] = {}
    wanted: Sequence[str | None] = arguments or [None]
    for argument in wanted:
        try:
            selections = select(checkpoint, [] if argument is None else [argument])
        except NameNotFoundError as error:
            missing.setdefault(str(argument), []).append(error)
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


def _place(step: int, checkpoint: Checkpoint, budget: Budget, tensor: Tensor, index: Index) -> Place | _Without:
    from ckpt_cli.arrays.codec import require_plain

    with about(checkpoint.path):
        try:
            if tensor.layout != "quantized":
                require_plain(tensor)
            if tensor.shape is None:
                return _Without(tensor, "it has no shape")
            region = part_of(tensor, index)
            budget.read_parts(tensor, Region.of)
            budget.read(tensor, region)
            return Place(step, checkpoint, budget, tensor, region, index)
        except UnsupportedError as error:
            return _Without(tensor, error.problem.removeprefix(f"tensor {tensor.name!r} "))


def _tracks(entries: Iterable[_Entry]) -> tuple[list[Track], list[tuple[_Entry, Track]]]:
    """Return what is to be read, which tied names share, and the pairs of an entry and one of its tracks."""
    known: dict[object, Track] = {}
    owners: list[tuple[_Entry, Track]] = []
    for entry in entries:
        for run in _runs(entry):
            key = tuple((place.step, place.tensor.view or id(place.tensor), place.region) for place in run)
            owners.append((entry, known.setdefault(key, Track(run))))
    return list(known.values()), owners


def _runs(entry: _Entry) -> Iterator[list[Place]]:
    """Yield the places of a tensor in files that follow each other, as long as it keeps its shape."""
    run: list[Place] = []
    for step, place in entry.places.items():
        if isinstance(place, _Without):
            continue
        if run and (step != run[-1].step + 1 or place.region.shape != run[-1].region.shape):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


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
    numbers = sorted({step for entry in entries for step in entry.places} - errors.keys())
    points = [point for step in numbers if (point := _point(entries, step, errors)) is not None]
    whole = [step for step in range(files) if step not in errors]
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
    from ckpt_cli.arrays.moments import Moments, merged

    whole, before, squares = Moments(), 0.0, None
    here: list[Place] = []
    for entry in entries:
        place, found = entry.places.get(step), entry.found.get(step)
        if not isinstance(place, Place) or found is None:
            continue
        here.append(place)
        whole = merged(whole, found.moments)
        if found.moved is not None and step - 1 not in errors:
            squares = (squares or 0.0) + found.moved
            before += entry.found[step - 1].moments.norm ** 2
    if not here:
        return None
    return Point(
        step,
        here[0].tensor.dtype.name,
        here[0].region.shape,
        sum(place.region.numel for place in here),
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
    last: Place | _Without | None = None
    for place, step in enumerate(whole):
        now = entry.places.get(step)
        if place and (now is None) != (last is None):
            yield Event(step, "appears" if last is None else "is gone")
        if isinstance(now, _Without) and not isinstance(last, _Without):
            yield Event(step, now.reason)
        if now is not None and last is not None:
            yield from (Event(step, what) for what in _differences(last, now))
        last = now


def _differences(last: Place | _Without, now: Place | _Without) -> Iterator[str]:
    for what, before, after in (
        ("shape", _shape_of(last), _shape_of(now)),
        ("dtype", last.tensor.dtype.name, now.tensor.dtype.name),
        ("layout", last.tensor.layout, now.tensor.layout),
    ):
        if before != after:
            yield f"{what} {before} → {after}"


def _shape_of(place: Place | _Without) -> str:
    shape = place.tensor.shape
    return "?" if shape is None else f"[{','.join(map(str, shape))}]"
