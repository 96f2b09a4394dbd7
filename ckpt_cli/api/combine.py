"""Commands that combine checkpoints as functions with their names and options, such as `avg` and `merge`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing

from ckpt_cli.api.edits import Report, edit_with, options_of, report_of
from ckpt_cli.api.new_checkpoints import new_checkpoint
from ckpt_cli.api.request import Path, path_of, request
from ckpt_cli.errors import UsageError, about


def avg(
    paths: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] = (),
    ema: float | None = None,
    last: int | None = None,
    normalize: bool = True,
    select: str | None = None,
    rest: str | int = "last",
    ints: str = "equal",
    common: bool = False,
    untie: bool = False,
    finite: bool = False,
    dtype: str | None = None,
    to: str | None = None,
    max_shard: int | str | None = None,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write the average of checkpoints of one model, as `ckpt avg` with these options.

    `weights` has one for each checkpoint. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.avg import average
    from ckpt_cli.edits.avg_options import AvgOptions, inputs_of
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.combine import INTS
    from ckpt_cli.render.avg import to_json as avg_json

    if ints not in INTS:
        raise UsageError(f"ints is {', '.join(INTS)}, not {ints!r}")
    with new_checkpoint(to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only) as new:
        found, _ = inputs_of([path_of(path) for path in paths], last, is_weighted=False)
        options = AvgOptions(
            weights=weights,
            is_normalized=normalize,
            ema=ema,
            select=select,
            rest=str(rest),
            ints=ints,
            common=common,
            untie=untie,
            finite=finite,
            dtype=dtype_named(dtype) if dtype else None,
            output=new,
        )
        return report_of(avg_json(average(found, os.fspath(output), options)))


def mix(
    base: Path,
    paths: Sequence[Path],
    output: Path,
    *,
    method: str,
    weights: Sequence[float] = (),
    normalize: bool | None = None,
    density: float = 1.0,
    t: float | None = None,
    seed: int = 0,
    select: str | None = None,
    ints: str = "equal",
    common: bool = False,
    untie: bool = False,
    finite: bool = False,
    dtype: str | None = None,
    to: str | None = None,
    max_shard: int | str | None = None,
    tensors_only: bool = False,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a mix of a base and models that were trained from it, as `ckpt mix` with these options.

    `method` is `task`, `ties`, `dare` or `slerp`. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.avg_options import inputs_of
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.combine import INTS
    from ckpt_cli.edits.mix import MixOptions
    from ckpt_cli.edits.mix import mix as write
    from ckpt_cli.render.mix import to_json as mix_json

    if ints not in INTS:
        raise UsageError(f"ints is {', '.join(INTS)}, not {ints!r}")
    with new_checkpoint(
        to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        found, _ = inputs_of([path_of(path) for path in paths], is_weighted=False, least=1)
        options = MixOptions(
            method=method,
            weights=weights,
            is_normalized=normalize,
            density=density,
            t=t,
            seed=seed,
            select=select,
            ints=ints,
            common=common,
            untie=untie,
            finite=finite,
            dtype=dtype_named(dtype) if dtype else None,
            output=new,
        )
        return report_of(mix_json(write(path_of(base), found, os.fspath(output), options)))


def merge(
    paths: Sequence[Path],
    output: Path,
    *,
    prefer: str | None = None,
    prefixes: Mapping[Path, str] | None = None,
    to: str | None = None,
    max_shard: int | str | None = None,
    tensors_only: bool = False,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write the union of checkpoints, as `ckpt merge` with these options.

    `prefer` is `first` or `last`, `prefixes` the prefix of names by path. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.merge import PREFERENCES, MergeOptions
    from ckpt_cli.edits.merge import merge as write
    from ckpt_cli.render.merge import to_json as merge_json

    if prefer is not None and prefer not in PREFERENCES:
        raise UsageError(f"prefer is {' or '.join(PREFERENCES)}, not {prefer!r}")
    with new_checkpoint(
        to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        beginnings = {path_of(path): text for path, text in (prefixes or {}).items()}
        options = MergeOptions(prefer, beginnings, new)
        return report_of(merge_json(write([path_of(path) for path in paths], os.fspath(output), options)))


def graft(
    path: Path,
    other: Path,
    *,
    prefix: str = "",
    at: str | None = None,
    add: bool = False,
    partial: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Put the tensors of another checkpoint, or those below `prefix` in it, into this one, as `ckpt graft`.

    `at` is where they go; None for the same prefix. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.graft import plan_graft
    from ckpt_cli.formats import open_checkpoint
    from ckpt_cli.parallel.map import workers

    where = path_of(other)
    with request(), about(where):
        source = open_checkpoint(where)
    with closing(source), workers(0) as executor:
        return edit_with(
            path,
            lambda base: plan_graft(base, source, prefix, at, add=add, partial=partial, executor=executor),
            options_of(output, dry_run, backup, weights_only),
        )


def delta_create(base: Path, tuned: Path, output: Path, *, force: bool = False, dry_run: bool = False) -> Report:
    """Write what changed from one checkpoint to another, as `ckpt delta create`. Raises CkptError, OSError."""
    from ckpt_cli.edits.delta import CreateOptions, create
    from ckpt_cli.parallel.map import workers
    from ckpt_cli.render.delta import to_json as delta_json

    with request(), workers(0) as executor:
        options = CreateOptions(force, dry_run)
        return report_of(delta_json(create(path_of(base), path_of(tuned), os.fspath(output), executor, options)))


def delta_apply(
    base: Path,
    delta: Path,
    output: Path,
    *,
    to: str | None = None,
    max_shard: int | str | None = None,
    tensors_only: bool = False,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write the checkpoint that a delta was made of, as `ckpt delta apply`. Raises CkptError, OSError."""
    from ckpt_cli.edits.delta_apply import apply
    from ckpt_cli.render.delta import applied_json

    with new_checkpoint(
        to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        return report_of(applied_json(apply(path_of(base), path_of(delta), os.fspath(output), new)))
