"""The engine of `mix`: a base and models that were trained from it, mixed by task arithmetic, TIES, DARE or SLERP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.avg_options import named_twice, require_finite
from ckpt_cli.edits.combine import EQUAL, Sources, combine, made_bytes
from ckpt_cli.edits.derive import Derived, DeriveOptions
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import StorageSource
from ckpt_cli.parallel.made import PIECE, Making, PreparedBytes, pieces_made

if TYPE_CHECKING:
    from ckpt_cli.arrays.mixing import Threshold, Widening

TASK, SLERP, TIES, DARE = "task", "slerp", "ties", "dare"
METHODS = (TASK, SLERP, TIES, DARE)


@dataclass(frozen=True, slots=True)
class MixOptions:
    """Options of `mix`."""

    method: str = TASK
    weights: Sequence[float] = ()
    """One for each model beside the base; none for 1 each."""
    is_normalized: bool | None = None
    """True if the sum of task vectors is divided by that of the weights; None for TIES alone."""
    density: float = 1.0
    """The share of the elements of a task vector that TIES and DARE keep."""
    t: float | None = None
    """For SLERP, the share of the way from the base to the model."""
    seed: int = 0
    """For DARE, the number that decides which elements are kept."""
    select: str | None = None
    """The prefix below which tensors are mixed; None for those of the model."""
    ints: str = EQUAL
    """`first`, `last` or `max` if integers that differ are those, else `equal`."""
    common: bool = False
    """True if only the names that all have are mixed, and others are left as they are."""
    untie: bool = False
    """True if names that are tied in some checkpoints only get bytes of their own."""
    finite: bool = False
    """True if NaN and infinities are an error."""
    dtype: DType | None = None
    """The new dtype; None for the widest of each tensor."""
    output: DeriveOptions = field(default_factory=DeriveOptions)


@dataclass(frozen=True, slots=True)
class Mix:
    """The result of a mix, or of its dry run."""

    base: str
    models: Sequence[tuple[str, float]]
    """Each model beside the base, and its weight."""
    method: str
    mixed: int
    """The number of tensors that were mixed; tied ones count for each name."""
    copied: Sequence[str]
    """Tensors of the model that were taken as they are."""
    warnings: Sequence[str]
    derived: Derived


def mix(base: str, models: Sequence[str], output: str, options: MixOptions) -> Mix:
    """Write a mix of a base and models that were trained from it as `output`, all or nothing.

    What is not mixed is that of the base. Raises RefusedError where names, shapes or ties differ, UsageError for
    options that do not go together.
    """
    weights = _weights(len(models), options)
    paths = [base, *models]
    done = combine(paths, 0, output, _method(options, weights), options)
    warnings = [*named_twice(paths), *done.warnings]
    weighted = list(zip(models, weights, strict=True))
    return Mix(base, weighted, options.method, done.made, done.copied, warnings, done.derived)


def _weights(count: int, options: MixOptions) -> list[float]:
    """Return the weight of each model; raises UsageError for options that the method does not have."""
    method = options.method
    if method not in METHODS:
        raise UsageError(f"--method is {', '.join(METHODS)}, not {method!r}")
    if not 0 < options.density <= 1:
        raise UsageError("--density is more than 0, and at most 1")
    if method in (TASK, SLERP) and options.density != 1:
        raise UsageError(f"--density is for {TIES} and {DARE}")
    if method == SLERP:
        return [_share(count, options)]
    if options.t is not None:
        raise UsageError(f"--t is for {SLERP}")
    weights = [float(weight) for weight in options.weights] or [1.0] * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} models", hint="the base has none")
    require_finite(weights)
    return weights


def _share(count: int, options: MixOptions) -> float:
    """Return the share of the way to the one model; raises UsageError for options that SLERP does not have."""
    if count != 1:
        raise UsageError(f"{SLERP} is between the base and one model")
    if options.weights or options.is_normalized is not None:
        raise UsageError(f"{SLERP} has no weights", hint="--t says how far from the base to the model")
    if options.t is None or not 0 <= options.t <= 1:
        raise UsageError(f"{SLERP} takes --t, from 0 for the base to 1 for the model")
    return options.t


def _method(options: MixOptions, weights: Sequence[float]) -> Callable[[Sources], StorageSource]:
    """Return the function that makes the bytes of a tensor."""
    from ckpt_cli.arrays.mixing import Recipe, TaskVectors, Widening

    if options.method == SLERP:
        return lambda sources: _slerp(sources, options.t or 0.0)
    is_ties = options.method == TIES
    recipe = Recipe(
        weights,
        is_normalized=is_ties if options.is_normalized is None else options.is_normalized,
        agrees=is_ties,
        density=options.density if options.method == DARE else 1.0,
        seed=options.seed,
    )

    def method(sources: Sources) -> StorageSource:
        widening = Widening(sources.dtypes, sources.target, sources.name)
        if not is_ties or options.density == 1:
            return made_bytes(sources, TaskVectors(widening, recipe, sources.name, PIECE))

        def prepare() -> Any:
            found = _thresholds(sources, widening, options.density)
            return made_bytes(sources, TaskVectors(widening, recipe, sources.name, PIECE, found))

        return PreparedBytes(prepare)

    return method


def _slerp(sources: Sources, t: float) -> StorageSource:
    from ckpt_cli.arrays.mixing import Between, Products, Widening, arc_weights

    widening = Widening(sources.dtypes, sources.target, sources.name)

    def prepare() -> Any:
        sums = [0.0, 0.0, 0.0]

        def add(facts: Sequence[float]) -> None:
            sums[:] = [old + new for old, new in zip(sums, facts, strict=True)]

        _survey(sources, Products(widening), add)
        return made_bytes(sources, Between(widening, arc_weights(sums[0], sums[1], sums[2], t)))

    return PreparedBytes(prepare)


def _survey(sources: Sources, making: Making, note: Callable[[Any], None]) -> None:
    """Pass over all elements of some sources, of which nothing is made, and note the facts of each piece in order."""
    for _, facts in pieces_made(making, sources.readers(), sources.numel, PIECE, sources.executor):
        note(facts)


def _thresholds(sources: Sources, widening: Widening, density: float) -> list[Threshold | None]:
    """Return the least magnitude that each model keeps, as those of all elements are counted, 16 bits in a pass."""
    import numpy as np

    from ckpt_cli.arrays.mixing import DIGITS, CountDigits, CountEqual, Threshold

    models, bits = len(sources.dtypes) - 1, widening.kind.itemsize * 8
    kept = max(1, int(density * sources.numel))
    beginnings, left, equal = [0] * models, [kept] * models, [0] * models
    for known in range(0, bits, DIGITS):
        totals = [np.zeros(1 << DIGITS, np.int64) for _ in range(models)]

        def add(counts: Sequence[Any], totals: Sequence[Any] = totals) -> None:
            for total, count in zip(totals, counts, strict=True):
                total += count

        _survey(sources, CountDigits(widening, beginnings, known), add)
        for number, total in enumerate(totals):
            above = np.cumsum(total[::-1])  # elements with at least a digit, the greatest one first
            place = int(np.searchsorted(above, left[number]))
            left[number] -= int(above[place - 1]) if place else 0
            digit = (1 << DIGITS) - 1 - place
            equal[number] = int(total[digit])
            beginnings[number] = beginnings[number] << DIGITS | digit
    some = [
        magnitude if magnitude and found > wanted else None
        for magnitude, wanted, found in zip(beginnings, left, equal, strict=True)
    ]
    before: list[list[int]] = [[0] for _ in range(models)]
    if any(magnitude is not None for magnitude in some):

        def run_on(counts: Sequence[int]) -> None:
            for running, count in zip(before, counts, strict=True):
                running.append(running[-1] + count)

        _survey(sources, CountEqual(widening, some), run_on)
    return [
        Threshold(beginnings[number], None if some[number] is None else left[number], before[number])
        for number in range(models)
    ]
