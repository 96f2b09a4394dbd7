"""The tensors of a checkpoint under flat names: those that a new format can hold, and those that it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from ckpt_cli.budget import Budget
from ckpt_cli.dtypes import DType
from ckpt_cli.edits.convert_contents import Casting, check_items, pack_plain, pack_whole
from ckpt_cli.edits.convert_options import (
    CLONE,
    ERROR,
    NOT_STATE,
    NOT_WEIGHTS,
    ConvertOptions,
    ConvertPlan,
    LeftOut,
    NewFiles,
    stem_of,
)
from ckpt_cli.edits.folded import reason_lines
from ckpt_cli.errors import RefusedError, quoted, some_of
from ckpt_cli.formats.registry import format_of
from ckpt_cli.formats.sharded.read import ShardSet, read_index
from ckpt_cli.formats.targets import Target
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Tensor, Value
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.nn.state_dict import Versions, has_versions, state_names, versions_of
from ckpt_cli.ops.aliasing import Companions, by_storage, partly_shared, tie_groups

_TOTALS = ("total_size", "total_parameters")
"""Keys of an index that follow from its shards."""

_CLASSES = 3
"""Names of classes that are spelled out."""


def flatten(
    checkpoint: Checkpoint,
    target: Target,
    output: str,
    options: ConvertOptions,
    names: Sequence[str] | None,
    entries: Sequence[Entry],
) -> ConvertPlan:
    """The tensors under their dotted names; refused where something else would be lost that nobody allowed."""
    from ckpt_cli.arrays.cast import Losses

    prefix = f"{options.select.removesuffix('.')}." if options.select else ""
    fits: list[Tensor] = []
    lost: list[LeftOut] = []
    aside: list[LeftOut] = []
    aliases = _aliases(entries)
    for entry, why in _judged(entries, names, target, options.dtype):
        why = why or aliases.get(entry.name)
        if why is None and isinstance(entry, Tensor):
            fits.append(replace(entry, name=entry.name[len(prefix) :]))
        else:
            wanted = (names is None or entry.name in names) and entry.name not in aliases
            (lost if wanted else aside).append(LeftOut(entry.name, why or "", isinstance(entry, Tensor)))
    if names is not None:
        order = {name[len(prefix) :]: place for place, name in enumerate(names)}
        fits.sort(key=lambda tensor: order[tensor.name])
    detached = names is not None and target.keeps_views  # as those of a state_dict are in torch
    plain = [replace(tensor, requires_grad=False) for tensor in fits] if detached else fits
    metadata = metadata_of(checkpoint)
    if not target.keeps_metadata:
        lost += [LeftOut(key, "metadata") for key in metadata if key != "format"]
        metadata = {}
    _refuse_lost(checkpoint, lost, aside, fits, target, options)
    _refuse_names(fits)
    check_items(checkpoint, target, len(fits))
    casting = Casting(options.dtype, Losses(), options.executor)
    tied = target.keeps_ties and options.shared != CLONE
    if target.keeps_views and tied:
        tensors, contents = pack_whole(checkpoint, plain, casting)
    else:
        tensors, contents = pack_plain(checkpoint, plain, casting, tied=tied)
    versions = versions_of(checkpoint, options.select.removesuffix("."))
    kept = versions if versions is not None and target.keeps_notes else None
    added = list(_added(kept))
    if target.keeps_metadata and "format" not in metadata and not _has_strings(checkpoint, metadata):
        metadata["format"] = "pt"  # without which transformers refuses a file
        added.append("format=pt in its metadata")
    new = NewCheckpoint(
        tensors,
        contents,
        metadata,
        index=_index_of(checkpoint, metadata),
        ordered=names is not None,
        notes=kept.notes if kept else {},
        mode_of=checkpoint.container.files[0].path,
        stem=stem_of(output),
    )
    if options.max_shard is not None:
        new = replace(new, max_shard=options.max_shard)
    apart = () if target.keeps_views and tied else tuple(separated(fits, tied=tied))
    return ConvertPlan(
        NewFiles(new, target),
        len(tensors),
        casting.losses,
        contents,
        left_out=(*lost, *aside),
        separated=apart,
        not_kept=tuple(not_kept_of(checkpoint, fits, target, options.select, kept=kept is not None, detached=detached)),
        added=tuple(added),
    )


def refuse_shared(entries: Sequence[Entry], options: ConvertOptions) -> None:
    """Raise where tensors share bytes and that was to be an error."""
    if options.shared == ERROR:
        groups = tie_groups(entry for entry in entries if isinstance(entry, Tensor))
        if groups:
            raise RefusedError(
                f"tensors share their bytes ({len(groups)} groups)",
                details=some_of([", ".join(tensor.name for tensor in group) for group in groups]),
                hint="--shared keep-one keeps them tied, --shared clone writes each",
            )


def flatten_weights(
    checkpoint: Checkpoint,
    target: Target,
    output: str,
    options: ConvertOptions,
    names: Sequence[str],
    dropped: frozenset[str],
) -> ConvertPlan:
    """The model's weights alone, without the beginning of their names, of the checkpoint of a run that has more."""
    entries = [entry for entry in checkpoint.entries if entry.name not in dropped]
    plan = flatten(checkpoint, target, output, replace(options, select=checkpoint.weights), names, entries)
    left_out = (replace(item, why=NOT_WEIGHTS) if item.why == NOT_STATE else item for item in plan.left_out)
    return replace(plan, left_out=tuple(left_out))


def distributed_state(checkpoint: Checkpoint) -> Checkpoint | None:
    """Return the distributed checkpoint that a run is, without the files beside it; None for any other checkpoint."""
    if checkpoint.weights or not checkpoint.is_set:
        return None
    from ckpt_cli.formats.runs.read import RunFiles

    parts = checkpoint.container.parts if isinstance(checkpoint.container, RunFiles) else ()
    found = (part.checkpoint for part in parts if not part.prefix)
    return next((part for part in found if format_of(part).is_distributed), None)


def beside_state(plan: ConvertPlan, run: Checkpoint, state: Checkpoint) -> ConvertPlan:
    """Return the plan for a distributed checkpoint, with what else the run has that it is of as left out."""
    known = {entry.name for entry in state.entries}
    aside = (entry for entry in run.entries if entry.name not in known)
    left_out = (LeftOut(entry.name, NOT_WEIGHTS, isinstance(entry, Tensor)) for entry in aside)
    return replace(plan, left_out=(*plan.left_out, *left_out))


def _aliases(entries: Sequence[Entry]) -> dict[str, str]:
    """Return the tensors that objects have under a further private name, each with the reason to leave it out."""
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    companions = Companions(tensors)
    found: dict[str, str] = {}
    for tensor in tensors:
        public = [each for each in companions.of(tensor) if each.holder is None] if tensor.holder is not None else []
        if public:
            found[tensor.name] = f"the same tensor as {public[0].name}"
    return found


def _judged(
    entries: Sequence[Entry], names: Sequence[str] | None, target: Target, dtype: DType | None
) -> Iterator[tuple[Entry, str | None]]:
    """Yield each entry with the reason to leave it out, None where it is kept."""
    known = set(names) if names is not None else None
    for entry in entries:
        if known is not None and entry.name not in known:
            yield entry, NOT_STATE
        elif isinstance(entry, Value):
            yield entry, "not a tensor"
        else:
            yield entry, why_not(entry, target, dtype)


def why_not(tensor: Tensor, target: Target, dtype: DType | None) -> str | None:
    """Return the reason to leave a tensor out."""
    if tensor.layout != "strided" or tensor.storage is None or tensor.shape is None:
        return f"{tensor.layout} tensor"
    becomes = dtype if dtype is not None and tensor.dtype.category == "float" else tensor.dtype
    if target.spelled(becomes) is None:
        return f"{becomes}, which {target.what} cannot hold"
    if becomes is not tensor.dtype and not (tensor.dtype.numpy and tensor.dtype.is_plain_float):
        return f"{tensor.dtype}, which cannot be cast"
    return None


def _refuse_lost(
    checkpoint: Checkpoint,
    lost: Sequence[LeftOut],
    aside: Sequence[LeftOut],
    fits: Sequence[Tensor],
    target: Target,
    options: ConvertOptions,
) -> None:
    """Raise where something would be lost that nobody allowed, or where no tensor would be written."""
    if lost and not options.tensors_only:
        raise RefusedError(
            f"{len(lost)} of its entries cannot be written to {target.what}",
            details=reason_lines([(item.name, item.why) for item in lost]),
            hint=_hint(checkpoint, lost, target, options),
        )
    if not fits:
        _refuse_empty(checkpoint, [*lost, *aside], target, options)


def _refuse_empty(
    checkpoint: Checkpoint, left_out: Sequence[LeftOut], target: Target, options: ConvertOptions
) -> NoReturn:
    """Raise for a file that would have no tensor in it."""
    tensors = {tensor.name for tensor in checkpoint.tensors}
    listed = [(item.name, item.why) for item in left_out if item.name in tensors]
    where = f" below {options.select!r}" if options.select else ""
    if not listed:
        raise RefusedError(
            f"there is no tensor{where} that could be written to {target.what}",
            hint="ckpt ls -a FILE lists all entries",
        )
    raise RefusedError(
        f"none of the {len(listed)} tensors{where} can be written to {target.what}",
        details=reason_lines(listed),
        hint="ckpt ls -l FILE shows what they are",
    )


def _hint(checkpoint: Checkpoint, lost: Sequence[LeftOut], target: Target, options: ConvertOptions) -> str:
    """Return a hint about entries that would be lost: cast them, take the state_dict alone, or leave it out."""
    dtypes = {entry.name: entry.dtype for entry in checkpoint.tensors}
    unsaid = [dtypes[item.name] for item in lost if item.name in dtypes and "which" in item.why]
    if options.dtype is None and any(dtype.category == "float" for dtype in unsaid):
        return "--dtype float32 casts them; --tensors-only leaves out what does not fit"
    nested = _nested_state(checkpoint) if not options.select else None
    if nested is not None:
        return f"--select {quoted(nested)} takes the tensors below it as the whole; --tensors-only takes all tensors"
    is_kept = format_of(checkpoint).is_pickle and state_names(checkpoint, options.select.removesuffix(".")) is None
    if is_kept and not target.keeps_objects and any(item.is_tensor for item in lost):
        return "a name that ends in .pt keeps them; --tensors-only leaves them out"
    return "--tensors-only leaves them out"


def _nested_state(checkpoint: Checkpoint) -> str | None:
    """The outermost key below which there are tensors only, the most bytes of them: the state_dict of a training."""
    sizes: dict[str, int] = {}
    mixed: set[str] = set()
    for entry in checkpoint.entries:
        key, dot, _ = entry.name.partition(".")
        if not dot or isinstance(entry, Value):
            mixed.add(key)
        else:
            sizes[key] = sizes.get(key, 0) + entry.nbytes
    candidates = {key: size for key, size in sizes.items() if key not in mixed}
    return max(candidates, key=candidates.__getitem__, default=None)


def _refuse_names(tensors: Sequence[Tensor]) -> None:
    """Raise where two tensors have one name, as no format with flat names can have that."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise RefusedError(f"several tensors are called {tensor.name!r}, and only one can be in the new file")
        seen.add(tensor.name)


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The strings that are about the checkpoint, not about its file or its ties."""
    aliases = {tensor.name for tensor in checkpoint.tensors if tensor.alias_of is not None}
    ours = {*aliases, "ckpt.order", *(_TOTALS if checkpoint.is_set else ())}
    return {key: value for key, value in checkpoint.metadata.items() if key not in ours}


def _has_strings(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> bool:
    """True if a checkpoint has strings of its own, or of its shards, so that it says what it wants to."""
    container = checkpoint.container
    if isinstance(container, ShardSet):
        return any(format_of(shard).keeps_strings and shard.metadata for shard in container.shards)
    return format_of(checkpoint).keeps_strings and bool(metadata)


def _index_of(checkpoint: Checkpoint, metadata: Mapping[str, str]) -> dict[str, object]:
    """Those notes of an index that are among the metadata, as they stand there."""
    container = checkpoint.container
    if not isinstance(container, ShardSet) or container.index is None:
        return {}
    _, notes = read_index(container.index)
    return {key: value for key, value in notes.items() if key in metadata}


def separated(tensors: Sequence[Tensor], *, tied: bool) -> Iterator[str]:
    """The names that share bytes with others now and will not any more."""
    budget = Budget()
    if not tied:
        for group in tie_groups(tensors):
            yield from (tensor.name for tensor in group)
    for _, views in by_storage(tensors):
        if len(views) > 1:
            meeting, _rest = partly_shared(views, budget)
            yield from (tensor.name for tensor in meeting)


def not_kept_of(
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    target: Target,
    select: str,
    *,
    kept: bool,
    detached: bool = False,
) -> Iterator[str]:
    """Yield the facts about kept tensors and their state_dict that the format cannot hold, in words."""
    trained = sum(tensor.requires_grad for tensor in tensors)
    if trained and (detached or not target.keeps_requires_grad):
        yield f"requires_grad of {trained:,} {'tensor' if trained == 1 else 'tensors'}"
    keepers = sum(bool(tensor.attributes) for tensor in tensors)
    if keepers:
        yield f"tensors among the attributes of {keepers:,} {'tensor' if keepers == 1 else 'tensors'}"
    devices = sorted({tensor.device for tensor in tensors} - {"cpu"})
    if devices and not target.keeps_views:
        yield f"devices ({', '.join(devices)})"
    prefix = select.removesuffix(".")
    if not kept and (has_versions(checkpoint, prefix) or versions_of(checkpoint, prefix) is not None):
        yield "the _metadata of a state_dict (versions of its modules)"
    if "total_parameters" in checkpoint.metadata and checkpoint.is_set:
        yield "total_parameters of the old index"
    yield from checkpoint.unread


def _added(kept: Versions | None) -> Iterator[str]:
    """Yield the facts about a state_dict that was not in the file, in words."""
    if kept is not None and kept.assumed:
        names = ", ".join(kept.assumed[:_CLASSES]) + (", …" if len(kept.assumed) > _CLASSES else "")
        yield f"version 1 in _metadata for {len(kept.assumed)} classes that are not torch's ({names})"
