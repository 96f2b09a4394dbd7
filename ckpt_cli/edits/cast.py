"""The plan of `cast`: floating tensors in another dtype, with all tensors that share their bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.edits.convert_contents import Casting, cast_storage
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.tie import is_composed, moved
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, some_of
from ckpt_cli.model.changes import Changes, Content
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, Value
from ckpt_cli.ops.aliasing import all_strided, by_storage, is_array
from ckpt_cli.ops.quantization import groups_text, quantized_groups
from ckpt_cli.ops.select import close_names, excluded_names, select_to_edit

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.cast import Losses


def dtype_named(name: str) -> DType:
    """Return the floating dtype of a name, in torch's spelling or a short one; raises UsageError for any other."""
    dtype = BY_NAME.get(_SHORT.get(name.lower(), name.lower().removeprefix("torch.")))
    if dtype is not None and _is_target(dtype):
        return dtype
    known = floats()
    close = close_names(name, [*known, *_SHORT])
    raise UsageError(
        f"{name!r} is not a floating dtype to cast to",
        hint=f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}",
    )


def floats() -> list[str]:
    """Return the names of the dtypes that floating values can be cast to."""
    return [name for name, dtype in BY_NAME.items() if _is_target(dtype)]


def _is_target(dtype: DType) -> bool:
    """True if floating values can be cast to it: each takes whole bytes."""
    return dtype.is_plain_float and dtype.numpy is not None


_SHORT = {"fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "fp16": "float16",
          "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "f32": "float32",
          "f16": "float16"}  # fmt: skip
"""Short names of dtypes."""


def plan_cast(
    checkpoint: Checkpoint,
    dtype: DType,
    arguments: Sequence[str],
    *,
    exclude: Sequence[str] = (),
    lossy: bool = False,
    raw: bool = False,
    losses: Losses | None = None,
    executor: Executor | None = None,
) -> EditPlan:
    """Cast floating tensors, all or those that the arguments select, with every view of their storages.

    What `exclude` selects stays as it is.

    What is lost is counted in `losses`, where that is given, and the executor casts pieces side by side. With `raw`
    the numbers of scaled and packed weights are cast as they are stored.

    Raises UnsupportedError for a tensor that was named and is not floating, RefusedError for a storage that is viewed
    as several dtypes, and for scaled and packed weights.
    """
    from ckpt_cli.arrays.cast import Cast, Losses

    (names, storages), fixed = _wanted(checkpoint, arguments, exclude), _not_to_be_cast(checkpoint)
    if not raw:
        refuse_quantized(checkpoint, names, storages)
    losses = Losses() if losses is None else losses
    casting = Casting(dtype, losses, executor)
    made: dict[Storage | None, Storage] = {}
    contents: dict[Storage, Content] = {}
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        floating = [view for view in views if view.dtype.category == "float"]
        if storage not in storages or not floating or floating[0].dtype is dtype:
            continue
        if any(view.name in fixed for view in views):
            continue
        kinds = {view.dtype.name for view in views}
        if len(kinds) > 1:
            raise RefusedError(f"tensor {views[0].name!r} is viewed as {' and '.join(sorted(kinds))}")
        cast = Cast(views[0].dtype, dtype, views[0].name, big_endian=views[0].big_endian)
        numel = storage.nbytes // views[0].dtype.itemsize
        new = made[storage] = Storage(storage.key, numel * dtype.itemsize, storage.location)
        contents[new] = cast_storage(checkpoint, storage, numel, cast, casting)
    tensors = moved(checkpoint, lambda view: _cast_view(view, made, dtype))
    named = tuple(name for name in tensors if name in names)
    also = tuple(name for name in tensors if name not in names)
    not_cast = names - {*tensors}
    left = [tensor.name for tensor in other_floats(checkpoint.tensors, dtype) if tensor.name in not_cast]
    if not tensors and left:
        raise RefusedError(f"nothing of it can be cast to {dtype}", details=some_of(left), path=checkpoint.path)
    if not tensors:
        raise RefusedError(f"no floating tensor is of another dtype than {dtype}", path=checkpoint.path)

    def check() -> None:
        if losses and not lossy:
            raise RefusedError(
                f"{losses} in {dtype}",
                hint="--lossy casts all the same",
            )

    return EditPlan(
        Verb("cast", "cast"), named, also, Changes(tensors=tensors, contents=contents), check=check, left=left
    )


def refuse_quantized(checkpoint: Checkpoint, names: Collection[str], storages: Collection[Storage | None] = ()) -> None:
    """Raise RefusedError where scaled or packed weights, or their scales, are among names or their storages."""
    found = [
        group
        for group in quantized_groups(checkpoint.path, checkpoint.tensors)
        if any(part.name in names or part.storage in storages for part in group.tensors)
    ]
    if found:
        raise RefusedError(
            f"scaled or packed weights would lose what their numbers mean ({groups_text(found)})",
            hint="--raw casts the numbers as they are stored, whatever they mean; NAMEs choose other tensors",
        )


def other_floats(tensors: Iterable[Tensor], dtype: DType) -> Iterator[Tensor]:
    """Yield the floating and quantized tensors of other dtypes than this."""
    for tensor in tensors:
        if tensor.dtype.category in ("float", "quantized") and tensor.dtype is not dtype:
            yield tensor


def _is_castable(tensor: Tensor) -> bool:
    """True if a tensor is floating and consists of its elements alone.

    A quantized tensor's scales, or what a subclass is made of, mean something only together with what else the
    pickle says of it.
    """
    is_plain = tensor.layout == "strided" or is_composed(tensor)
    return is_plain and tensor.dtype.is_plain_float and not is_array(tensor)


def castable_views(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the strided tensors, and those in sparse ones, that may be cast; not those of attributes."""
    found: list[Tensor] = []
    for tensor in tensors:
        if _is_castable(tensor):
            found.extend([tensor] if tensor.storage is not None else all_strided([tensor]))
    return found


def _not_to_be_cast(checkpoint: Checkpoint) -> set[str]:
    """Return the names of tensors, and of parts, whose bytes must stay as they are."""
    every = {view.name for view in all_strided(checkpoint.tensors)}
    return every - {view.name for view in castable_views(checkpoint.tensors)}


def _wanted(
    checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str]
) -> tuple[set[str], set[Storage | None]]:
    """Return the names that are to be cast, and their storages; raises RefusedError where others are to stay in one."""
    chosen = [] if arguments else [entry for entry in checkpoint.own if isinstance(entry, Tensor)]
    for argument in arguments:
        for selection in select_to_edit(checkpoint, argument):
            entry = selection.entry
            if selection.index is not None:
                raise UsageError(f"{argument!r} is a part of a tensor: a dtype is one for all of it")
            if selection.exact and not (isinstance(entry, Tensor) and _is_castable(entry)):
                raise UnsupportedError(f"{entry.name!r} is {_why_not(entry)}, so it is not cast")
            if isinstance(entry, Tensor):
                chosen.append(entry)
    if not exclude:
        return {tensor.name for tensor in chosen}, {view.storage for view in castable_views(chosen)}
    excluded = excluded_names(checkpoint, exclude)
    staying = [tensor for tensor in chosen if tensor.name in excluded]
    chosen = [tensor for tensor in chosen if tensor.name not in excluded]
    storages = {view.storage for view in castable_views(chosen)}
    shared = [view.name for view in castable_views(staying) if view.storage in storages]
    if shared:
        raise RefusedError(
            "--exclude names tensors that share their bytes with others to be cast",
            details=some_of(shared),
            hint="ckpt untie FILE NAME gives one bytes of its own",
            path=checkpoint.path,
        )
    return {tensor.name for tensor in chosen}, storages


def _why_not(entry: Entry) -> str:
    if isinstance(entry, Value):
        return "not a tensor"
    if entry.dtype.category != "float":
        return f"of {entry.dtype}, which is not floating"
    if not entry.dtype.is_plain_float:
        return f"of {entry.dtype}, which packs several numbers"
    return "an array of numpy's" if is_array(entry) else f"{entry.layout}, made of parts"


def _cast_view(view: Tensor, made: Mapping[Storage | None, Storage], dtype: DType) -> Tensor:
    new = made.get(view.storage)
    return view if new is None else replace(view, dtype=dtype, storage=new, big_endian=False)
