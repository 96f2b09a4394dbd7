"""Commands that write new checkpoints as functions with their names and options, `convert` and `dequantize`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from ckpt_cli.api.checkpoint import texts
from ckpt_cli.api.edits import Report, report_of
from ckpt_cli.api.request import Path, path_of, request
from ckpt_cli.errors import UsageError

if TYPE_CHECKING:
    from ckpt_cli.edits.derive import DeriveOptions


@contextmanager
def new_checkpoint(
    to: str | None,
    max_shard: int | str | None,
    *,
    force: bool,
    dry_run: bool,
    weights_only: bool,
    tensors_only: bool = False,
) -> Iterator[DeriveOptions]:
    """Context manager: the options of a new checkpoint, with workers that make it, within one request."""
    from ckpt_cli.edits.convert_options import size_of
    from ckpt_cli.edits.derive import DeriveOptions
    from ckpt_cli.parallel.map import workers

    size = None if max_shard is None else size_of(str(max_shard))
    with request(), workers(0) as executor:
        yield DeriveOptions(
            to=to,
            max_shard=size,
            force=force,
            dry_run=dry_run,
            tensors_only=tensors_only,
            weights_only=weights_only,
            executor=executor,
        )


def convert(
    path: Path,
    output: Path,
    *names: str,
    exclude: str | Sequence[str] = (),
    to: str | None = None,
    select: str = "",
    dtype: str | None = None,
    max_shard: int | str | None = None,
    shared: str = "keep-one",
    tensors_only: bool = False,
    plain: bool = False,
    lossy: bool = False,
    raw: bool = False,
    salvage: bool = False,
    weights_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a checkpoint in another format, as `ckpt convert` with these options.

    `max_shard` is a size such as `5GB`, or a number of bytes; `shared` is `keep-one`, `clone` or `error`. With
    `salvage` the report of a file that was cut has `problem` and `lost`. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.convert import convert as write
    from ckpt_cli.edits.convert_options import CLONE, ERROR, KEEP_ONE, ConvertOptions, size_of
    from ckpt_cli.parallel.map import workers
    from ckpt_cli.render.convert import to_json as conversion_json

    if shared not in (KEEP_ONE, CLONE, ERROR):
        raise UsageError(f"shared is {KEEP_ONE}, {CLONE} or {ERROR}, not {shared!r}")
    with request(), workers(0) if dtype else nullcontext() as executor:
        options = ConvertOptions(
            to=to,
            select=select,
            names=names,
            exclude=texts(exclude),
            dtype=dtype_named(dtype) if dtype else None,
            max_shard=None if max_shard is None else size_of(str(max_shard)),
            shared=shared,
            tensors_only=tensors_only,
            plain=plain,
            lossy=lossy,
            raw=raw,
            salvage=salvage,
            weights_only=weights_only,
            force=force,
            dry_run=dry_run,
            executor=executor,
        )
        return report_of(conversion_json(write(path_of(path), os.fspath(output), options)))


def dequantize(
    path: Path,
    output: Path,
    *,
    dtype: str | None = None,
    to: str | None = None,
    max_shard: int | str | None = None,
    weights_only: bool = False,
    tensors_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a checkpoint with its quantized weights as plain floats, as `ckpt dequantize` with these options.

    Raises CkptError, OSError.
    """
    from ckpt_cli.edits.cast import dtype_named
    from ckpt_cli.edits.dequantize import dequantize as write
    from ckpt_cli.render.dequantize import to_json as dequantized_json

    with new_checkpoint(
        to, max_shard, force=force, dry_run=dry_run, weights_only=weights_only, tensors_only=tensors_only
    ) as new:
        target = dtype_named(dtype) if dtype else None
        return report_of(dequantized_json(write(path_of(path), os.fspath(output), target, new)))
