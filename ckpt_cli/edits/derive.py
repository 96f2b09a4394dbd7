"""New checkpoints that are another one but for some tensors: in the format of that one, or in another."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from ckpt_cli.edits.convert import convert
from ckpt_cli.edits.convert_options import ConvertOptions, LeftOut
from ckpt_cli.edits.plan import EditOptions, Planner
from ckpt_cli.edits.transaction import transaction
from ckpt_cli.errors import RefusedError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.files.places import is_folder, is_taken, names_in
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.sharded.read import ShardSet
from ckpt_cli.formats.targets import target_of
from ckpt_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.edits.files_beside import Beside

_TARGETS = {"zip": "pt", "legacy": "pt", "safetensors": "safetensors"}
"""The target that is written in the format of a checkpoint of one file."""

_SETS = {"zip": "hf-bin", "legacy": "hf-bin", "safetensors": "hf"}
"""The same for a set of shards of a format."""


@dataclass(frozen=True, slots=True)
class DeriveOptions:
    """Options of every command that writes a new checkpoint of old ones."""

    to: str | None = None
    """The name of the format; None to choose it by the output's name."""
    max_shard: int | None = None
    """Bytes of one shard; None for the shards of the old checkpoint."""
    force: bool = False
    """True if what is there already may be replaced."""
    dry_run: bool = False
    weights_only: bool = False
    """True if a new folder gets no copies of the files beside the weights."""
    tensors_only: bool = False
    """True if other entries, which the new format cannot hold, are left out."""
    only: str | None = None
    """The prefix of the tensors that are written alone; None for the whole checkpoint."""
    executor: Executor | None = None
    """The executor that makes tensors in parallel."""
    on_progress: OnProgress | None = None
    """Called with bytes done and bytes in all, once it takes a while."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A new checkpoint that was written, or would be."""

    output: str
    bytes_written: int
    dry_run: bool
    beside: Beside | None = None
    """The result for the files beside a model's weights, where a new folder was written."""
    left_out: tuple[LeftOut, ...] = ()
    """The entries that the new format cannot hold, or that are not the model's own."""
    notes: tuple[str, ...] = ()
    """Other facts, in words."""


def derive(path: str, output: str, plan: Planner, options: DeriveOptions, already: Checkpoint | None = None) -> Derived:
    """Write the checkpoint `path` as `output` with the changes that a plan makes, all or nothing.

    `already` is the checkpoint where it is open, which is closed and used up.

    It keeps its format and its shards where the output is named like them, and everything that is not changed. Raises
    what `transaction` and `convert` raise.
    """
    if already is None:
        with about(path):
            already = open_checkpoint(path)
    with closing(already):
        if _keeps_format(already, output, options):
            _refuse_taken(output, options)
            edit = EditOptions(
                output, options.dry_run, on_progress=options.on_progress, weights_only=options.weights_only
            )
            done = transaction(path, plan, edit, already)
            return Derived(output, done.bytes_written, options.dry_run, done.beside)
        return _converted(path, output, plan, options, already)


def _converted(path: str, output: str, plan: Planner, options: DeriveOptions, already: Checkpoint) -> Derived:
    """Write it in another format."""
    converting = ConvertOptions(
        to=options.to,
        select=options.only or "",
        max_shard=options.max_shard,
        tensors_only=options.tensors_only or options.only is not None,
        weights_only=options.weights_only,
        force=options.force,
        dry_run=options.dry_run,
        executor=options.executor,
        on_progress=options.on_progress,
    )
    try:
        new = convert(path, output, converting, plan, already)
    except RefusedError as error:
        if error.hint is not None and "--tensors-only" in error.hint:  # and other options, which only convert has
            error.hint = "--tensors-only leaves them out"
        raise
    notes = tuple(f"not kept: {fact}" for fact in new.not_kept)
    return Derived(output, new.bytes_written, options.dry_run, new.beside, new.left_out, notes)


def _refuse_taken(output: str, options: DeriveOptions) -> None:
    """Raise RefusedError where there is something already that nobody allowed to replace."""
    occupied = bool(names_in(output)) if is_folder(output) else is_taken(output)
    if occupied and not options.force:
        raise RefusedError("it is there already", path=output, hint="--force replaces it")


def _keeps_format(checkpoint: Checkpoint, output: str, options: DeriveOptions) -> bool:
    """True if the output is to be of the format of the checkpoint, with the same shards."""
    if options.to is not None or options.max_shard is not None or options.only is not None:
        return False
    if checkpoint.fixed or not format_of(checkpoint).rewriter:
        return False
    return target_of(output, None, sharded=False).name == _target_name(checkpoint)


def _target_name(checkpoint: Checkpoint) -> str | None:
    """Return the name of the target that is of the format of a checkpoint; None for one that is not written."""
    container = checkpoint.container
    if isinstance(container, ShardSet):
        names = {_SETS.get(shard.format) for shard in container.shards}
        return names.pop() if len(names) == 1 else None
    return None if checkpoint.is_set else _TARGETS.get(checkpoint.format)
