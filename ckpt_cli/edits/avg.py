"""The engine of `avg`: the weighted average of several checkpoints of one model, in one pass over their bytes."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_cli.edits.avg_options import DROP, AvgOptions, named_twice, place_of_rest, weights_of
from ckpt_cli.edits.combine import Sources, combine, made_bytes
from ckpt_cli.edits.derive import Derived
from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import StorageSource


@dataclass(frozen=True, slots=True)
class Average:
    """The result of an average, or of its dry run."""

    inputs: Sequence[tuple[str, float]]
    """Each checkpoint and its weight."""
    averaged: int
    """The number of tensors that were averaged; tied ones count for each name."""
    copied: Sequence[str]
    """Tensors of the model that were taken as they are."""
    source: str
    """The checkpoint that everything else is from."""
    warnings: Sequence[str]
    derived: Derived


def average(paths: Sequence[str], output: str, options: AvgOptions) -> Average:
    """Write the average of some checkpoints as `output`, all or nothing.

    Sums are made in float32, or float64 for float64, in the order of the checkpoints, and rounded once. What is not
    averaged is that of one of them. Raises RefusedError where names, shapes or ties differ, UsageError for options
    that do not go together.
    """
    weights, divisor = weights_of(len(paths), options)
    place = place_of_rest(len(paths), options)

    def method(sources: Sources) -> StorageSource:
        from ckpt_cli.arrays.weighted import WeightedSum

        return made_bytes(sources, WeightedSum(sources.dtypes, weights, divisor, sources.target, sources.name))

    try:
        done = combine(paths, place, output, method, options, drops=options.rest == DROP)
    except RefusedError as error:
        if error.hint is not None and "--tensors-only" in error.hint:  # which is an option of other commands
            error.hint = "--rest drop writes the averaged tensors alone"
        raise
    warnings = [*named_twice(paths), *done.warnings]
    inputs = list(zip(paths, weights, strict=True))
    return Average(inputs, done.made, done.copied, paths[place], warnings, done.derived)
