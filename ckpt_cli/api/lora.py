"""Commands for LoRA adapters as functions: `lora_merge`, `lora_info`, `lora_extract` and `lora_resize`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing

from ckpt_cli.api.edits import Report, report_of
from ckpt_cli.api.new_checkpoints import new_checkpoint
from ckpt_cli.api.request import Path, path_of, request
from ckpt_cli.errors import UsageError, about


def lora_merge(
    base: Path,
    adapters: Path | Sequence[Path] | Mapping[Path, float],
    output: Path,
    *,
    scale: float = 1.0,
    alpha: float | None = None,
    partial: bool = False,
    untie: bool = False,
    keep_tied: bool = False,
    dtype: str | None = None,
    to: str | None = None,
    max_shard: int | str | None = None,
    tensors_only: bool = False,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a model with adapters merged into it, as `ckpt lora merge` with these options.

    `adapters` is a path, several, or a dict with a scale for each. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.lora_merge import MergeOptions, merge
    from ckpt_cli.render.lora import merge_json

    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    scales = list(adapters.items()) if isinstance(adapters, Mapping) else [(path, 1.0) for path in adapters]
    with new_checkpoint(
        to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        scaled = [(path_of(path), float(number)) for path, number in scales]
        options = MergeOptions(
            scale=scale,
            alpha=alpha,
            partial=partial,
            untie=untie,
            keep_tied=keep_tied,
            dtype=dtype_named(dtype) if dtype else None,
            output=new,
        )
        return report_of(merge_json(merge(path_of(base), scaled, os.fspath(output), options)))


def lora_info(path: Path, base: Path | None = None) -> Report:
    """Return the facts of an adapter, as `ckpt lora info --json` prints them. Raises CkptError, OSError."""
    from ckpt_cli.formats import open_checkpoint
    from ckpt_cli.ops.lora import adapter_of, describe
    from ckpt_cli.ops.lora_names import matched_with
    from ckpt_cli.render.lora import info_json

    place = path_of(path)
    with request(), about(place), closing(open_checkpoint(place)) as checkpoint:
        adapter = adapter_of(checkpoint, place, any_alpha=True)
        if base is None:
            return report_of(info_json(describe(adapter)))
        model = path_of(base)
        with about(model), closing(open_checkpoint(model)) as opened:
            return report_of(info_json(describe(adapter, model, matched_with(adapter, opened, model))))


def lora_extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int,
    svd: str = "randomized",
    seed: int = 0,
    dtype: str = "float32",
    dry_run: bool = False,
) -> Report:
    """Write what a training changed as an adapter, as `ckpt lora extract` with these options.

    `svd` is `randomized` or `exact`. Raises CkptError, OSError.
    """
    from ckpt_cli.arrays.factors import EXACT, RANDOMIZED
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.lora_extract import extract
    from ckpt_cli.edits.lora_write import AdapterOptions
    from ckpt_cli.render.lora import extract_json

    if svd not in (EXACT, RANDOMIZED):
        raise UsageError(f"svd is {RANDOMIZED} or {EXACT}, not {svd!r}")
    with request():
        options = AdapterOptions(dtype_named(dtype), dry_run=dry_run)
        done = extract(path_of(base), path_of(tuned), os.fspath(output), rank, options, svd=svd, seed=seed)
        return report_of(extract_json(done))


def lora_resize(path: Path, output: Path, *, rank: int, force: bool = False, dry_run: bool = False) -> Report:
    """Write an adapter of a lower rank, as `ckpt lora resize` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.lora_resize import resize
    from ckpt_cli.edits.lora_write import AdapterOptions
    from ckpt_cli.render.lora import resize_json

    with request():
        options = AdapterOptions(force=force, dry_run=dry_run)
        return report_of(resize_json(resize(path_of(path), os.fspath(output), rank, options)))
