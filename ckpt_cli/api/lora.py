"""Commands for LoRA adapters as functions: `lora_merge` and `lora_info`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing

from ckpt_cli.api.edits import Report, report_of
from ckpt_cli.api.request import Path, path_of, request
from ckpt_cli.errors import about


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
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a model with adapters merged into it, as `ckpt lora merge` with these options.

    `adapters` is a path, several, or a dict with a scale for each. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.convert_options import size_of
    from ckpt_cli.edits.derive import DeriveOptions
    from ckpt_cli.edits.lora_merge import MergeOptions, merge
    from ckpt_cli.parallel.map import workers
    from ckpt_cli.render.lora import merge_json

    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    scales = list(adapters.items()) if isinstance(adapters, Mapping) else [(path, 1.0) for path in adapters]
    with request(), workers(0) as executor:
        scaled = [(path_of(path), float(number)) for path, number in scales]
        options = MergeOptions(
            scale=scale,
            alpha=alpha,
            partial=partial,
            untie=untie,
            keep_tied=keep_tied,
            dtype=dtype_named(dtype) if dtype else None,
            output=DeriveOptions(
                to=to,
                max_shard=None if max_shard is None else size_of(str(max_shard)),
                force=force,
                dry_run=dry_run,
                weights_only=weights_only,
                executor=executor,
            ),
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
