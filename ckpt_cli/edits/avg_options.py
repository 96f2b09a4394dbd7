"""Options of `avg`, and what they say of its checkpoints: which these are, their weights, and which gives the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field

from ckpt_cli.dtypes import DType
from ckpt_cli.edits.combine import EQUAL, FIRST, LAST
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.places import canonical, exists
from ckpt_cli.formats.runs.names import natural
from ckpt_cli.ops.steps import checkpoints_at

DROP = "drop"


@dataclass(frozen=True, slots=True)
class AvgOptions:
    """Options of an average."""

    weights: Sequence[float] = ()
    """One for each checkpoint; none for equal ones."""
    is_normalized: bool = True
    """True if the sum is divided by that of the weights."""
    ema: float | None = None
    """The decay of an exponential moving average over the checkpoints in their order."""
    select: str | None = None
    """The prefix below which tensors are averaged; None for those of the model."""
    rest: str = LAST
    """The checkpoint that everything else is taken from: `first`, `last`, its number from 1 on, or `drop` for none."""
    ints: str = EQUAL
    """`first`, `last` or `max` if integers that differ are those, else `equal`."""
    common: bool = False
    """True if only the names that all have are averaged, and others are left as they are."""
    untie: bool = False
    """True if names that are tied in some checkpoints only get bytes of their own."""
    finite: bool = False
    """True if NaN and infinities are an error."""
    dtype: DType | None = None
    """The new dtype; None for the widest of each tensor."""
    output: DeriveOptions = field(default_factory=DeriveOptions)


def inputs_of(
    arguments: Sequence[str], latest: int | None = None, *, is_weighted: bool = True, least: int = 2
) -> tuple[list[str], list[float | None]]:
    """Return the checkpoints that arguments stand for, and the weight of each that has one after a colon.

    The folder of a run and a glob stand for the checkpoints that they lead to, in the order of their names, of which
    the last `latest` are taken. If not `is_weighted`, a colon is a part of a path.

    Raises UsageError for fewer than `least`.
    """
    paths: list[str] = []
    weights: list[float | None] = []
    for argument in arguments:
        path, weight = path_and_number(argument) if is_weighted else (argument, None)
        found = sorted(checkpoints_at(path), key=natural)
        paths += found
        weights += [weight] * len(found)
    if latest is not None:
        if latest < 1:
            raise UsageError("--last takes a number from 1 on")
        paths, weights = paths[-latest:], weights[-latest:]
    if len(paths) < least:
        raise UsageError("an average takes two checkpoints at least", path=paths[0])
    return paths, weights


def path_and_number(argument: str) -> tuple[str, float | None]:
    """Return the path and the weight of `FILE:0.7`; a path that is there wins."""
    path, colon, text = argument.rpartition(":")
    if colon and path and "/" not in text and not exists(argument):
        try:
            return path, float(text)
        except ValueError:
            return argument, None
    return argument, None


def weights_of(count: int, options: AvgOptions) -> tuple[list[float], float | None]:
    """Return the weights, and what the sum is divided by."""
    if options.ema is not None:
        if options.weights:
            raise UsageError("--ema makes the weights, so it does not go with others")
        if not 0 <= options.ema < 1:
            raise UsageError("the decay of --ema is from 0 to less than 1")
        decay = options.ema
        rest = [(1 - decay) * decay ** (count - 1 - number) for number in range(1, count)]
        return [decay ** (count - 1), *rest], None
    weights = [float(weight) for weight in options.weights] or [1.0] * count
    if len(weights) != count:
        raise UsageError(f"{len(weights)} weights for {count} checkpoints")
    require_finite(weights)
    total = sum(weights)
    if not options.is_normalized:
        return weights, None
    if abs(total) < _ZERO:
        raise UsageError("the weights come to 0", hint="--no-normalize does not divide by their sum")
    return weights, total


def require_finite(weights: Sequence[float]) -> None:
    """Raise UsageError for a weight that is NaN or infinite."""
    if not all(map(math.isfinite, weights)):
        raise UsageError("a weight is not a finite number")


_ZERO = 1e-8
"""Sums of weights below this are zero, as in mergekit."""


def place_of_rest(count: int, options: AvgOptions) -> int:
    """Return the number of the checkpoint that everything else is taken from."""
    if options.rest in (LAST, DROP):
        return count - 1
    if options.rest == FIRST:
        return 0
    if options.rest.isdecimal() and 1 <= int(options.rest) <= count:
        return int(options.rest) - 1
    raise UsageError(f"--rest is first, last, drop, or a number from 1 to {count}, and not {options.rest!r}")


def named_twice(paths: Sequence[str]) -> list[str]:
    """Return a warning for each checkpoint that is named twice."""
    seen: set[str] = set()
    found = []
    for path in paths:
        if canonical(path) in seen:
            found.append(f"{path} is named twice")
        seen.add(canonical(path))
    return found
