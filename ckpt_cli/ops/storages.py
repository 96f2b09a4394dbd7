"""What `cast`, `tie`, `untie` and `compact` do: tensors over other storages than before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.changes import Changes, Content, Write
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError
from ckpt_cli.formats.torch_zip_head import has_room
from ckpt_cli.model import Checkpoint, Entry, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.ops.names import close_names, select_one
from ckpt_cli.ops.rewrite import Planned
from ckpt_cli.ops.shared import all_strided, are_tied, by_storage

if TYPE_CHECKING:
    from ckpt_cli.arrays.casting import Cast, Losses

_PIECE = 1 << 20
"""Bytes of a storage that are cast at a time: what the processor's cache holds with its results."""

_COPIED = 8 << 20
"""Bytes of a storage that are copied at a time."""


def dtype_named(name: str) -> DType:
    """The floating dtype of a name, as torch spells it or shortly; raises UsageError for any other."""
    dtype = BY_NAME.get(_SHORT.get(name.lower(), name.lower().removeprefix("torch.")))
    if dtype is not None and _is_target(dtype):
        return dtype
    floats = [known for known, its in BY_NAME.items() if _is_target(its)]
    close = close_names(name, [*floats, *_SHORT])
    raise UsageError(
        f"{name!r} is no floating dtype to cast to",
        hint=f"did you mean {close[0]}?" if close else f"one of {', '.join(floats)}",
    )


def _is_target(dtype: DType) -> bool:
    """Whether floating values can be cast to it: each takes whole bytes."""
    whole = dtype.bits % 8 == 0 and not dtype.name.endswith("_x2")
    return dtype.category == "float" and dtype.numpy is not None and whole


_SHORT = {"fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "fp16": "float16",
          "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn", "f32": "float32",
          "f16": "float16"}  # fmt: skip
"""What people call dtypes."""


def plan_cast(
    checkpoint: Checkpoint,
    dtype: DType,
    arguments: Sequence[str],
    *,
    lossy: bool = False,
    losses: Losses | None = None,
) -> Planned:
    """Cast floating tensors, all or those that the arguments select, with every view of their storages.

    What is lost is counted in `losses` too, where that is given.

    Raises UnsupportedError for a tensor that was named and is not floating, RefusedError for a storage that is viewed
    as several dtypes.
    """
    from ckpt_cli.arrays.casting import Cast, Losses

    (names, storages), left = _wanted(checkpoint, arguments), _not_to_be_cast(checkpoint)
    losses = Losses() if losses is None else losses
    made: dict[int, Storage] = {}
    contents: dict[int, Content] = {}
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        floating = [view for view in views if view.dtype.category == "float"]
        if id(storage) not in storages or not floating or floating[0].dtype is dtype:
            continue
        if any(view.name in left for view in views):
            continue
        kinds = {view.dtype.name for view in views}
        if len(kinds) > 1:
            raise RefusedError(f"tensor {views[0].name!r} is viewed as {' and '.join(sorted(kinds))}")
        cast = Cast(views[0].dtype, dtype, views[0].name, big_endian=views[0].big_endian)
        numel = storage.nbytes // views[0].dtype.itemsize
        new = made[id(storage)] = Storage(storage.key, numel * dtype.itemsize, storage.location)
        contents[id(new)] = Content(new.nbytes, make=_casting(checkpoint, storage, numel, cast, losses))
    tensors = _moved(checkpoint, lambda view: _cast_view(view, made, dtype))
    named = tuple(name for name in tensors if name in names)
    also = tuple(name for name in tensors if name not in named)
    if not tensors:
        raise RefusedError(f"no floating tensor is of another dtype than {dtype}", path=checkpoint.path)

    def check() -> None:
        if losses and not lossy:
            raise RefusedError(
                f"{losses} in {dtype}",
                hint="--lossy casts all the same",
            )

    return Planned(Changes(tensors=tensors, contents=contents), "cast", named, also, check)


def _is_array(view: Tensor) -> bool:
    """Whether it is numpy's, whose bytes are a part of the pickle: those stay as they are."""
    return view.python_type == "numpy.ndarray"


def _is_castable(tensor: Tensor) -> bool:
    """Whether a tensor is floating and no more than its elements.

    A quantized tensor's scales, or what a subclass is made of, mean something only together with what else the
    pickle says of it.
    """
    is_plain = tensor.layout == "strided" or tensor.layout.startswith("sparse")
    return is_plain and tensor.dtype.category == "float" and not _is_array(tensor)


def _castable_views(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The strided tensors, and those in sparse ones, that may be cast; not those of attributes."""
    found: list[Tensor] = []
    for tensor in tensors:
        if _is_castable(tensor):
            found.extend([tensor] if tensor.storage is not None else all_strided([tensor]))
    return found


def _not_to_be_cast(checkpoint: Checkpoint) -> set[str]:
    """The names of tensors, and of parts, whose bytes must stay as they are."""
    every = {view.name for view in all_strided(checkpoint.tensors)}
    return every - {view.name for view in _castable_views(checkpoint.tensors)}


def _wanted(checkpoint: Checkpoint, arguments: Sequence[str]) -> tuple[set[str], set[int]]:
    """The names that are to be cast, and the identities of their storages."""
    chosen: list[Tensor] = [] if arguments else checkpoint.tensors
    for argument in arguments:
        for selection in select_one(checkpoint, argument):
            entry = selection.entry
            if selection.index is not None:
                raise UsageError(f"{argument!r} is a part of a tensor: a dtype is one for all of it")
            if selection.exact and not (isinstance(entry, Tensor) and _is_castable(entry)):
                raise UnsupportedError(f"{entry.name!r} is {_why_not(entry)}, so it is not cast")
            if isinstance(entry, Tensor):
                chosen.append(entry)
    return {tensor.name for tensor in chosen}, {id(view.storage) for view in _castable_views(chosen)}


def _why_not(entry: Entry) -> str:
    if isinstance(entry, Value):
        return "no tensor"
    if entry.dtype.category != "float":
        return f"of {entry.dtype}, which is not floating"
    return "an array of numpy's" if _is_array(entry) else f"{entry.layout}, made of parts"


def _casting(
    checkpoint: Checkpoint, storage: Storage, numel: int, cast: Cast, losses: Losses
) -> Callable[[Write], None]:
    """What writes a whole storage in its new dtype."""
    itemsize = cast.itemsize
    step = max(_PIECE // itemsize, 1) * itemsize

    def make(write: Write) -> None:
        for begin in range(0, numel * itemsize, step):
            size = min(step, numel * itemsize - begin)
            write(cast.run(checkpoint.container.view(storage, begin, size), losses))

    return make


def _cast_view(view: Tensor, made: dict[int, Storage], dtype: DType) -> Tensor:
    new = made.get(id(view.storage))
    return view if new is None else replace(view, dtype=dtype, storage=new, big_endian=False)


def _moved(checkpoint: Checkpoint, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors that a function makes others of, or of parts of which it does, by their names."""
    found = {}
    for tensor in checkpoint.tensors:
        after = _move(tensor, move)
        if after is not tensor:
            found[tensor.name] = after
    return found


def _move(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    parts = tuple(_move(part, move) for part in tensor.parts)
    if any(new is not old for new, old in zip(parts, tensor.parts, strict=True)):
        dtype = parts[-1].dtype if tensor.layout.startswith("sparse") else tensor.dtype
        tensor = replace(tensor, parts=parts, dtype=dtype)
    return move(tensor) if tensor.storage is not None else tensor


# --- ties ------------------------------------------------------------------------------------------------------------


def plan_tie(checkpoint: Checkpoint, names: Sequence[str], *, force: bool = False) -> Planned:
    """Make every further name the tensor that the first one is.

    Raises RefusedError where values differ, unless forced, and where dtypes or shapes do.
    """
    from ckpt_cli.arrays.sharing import content_digest

    first, *others = [_one_tensor(checkpoint, name) for name in names]
    if not others:
        raise UsageError("a tie takes two names at least")
    tensors = {}
    digest = None
    for other in others:
        if are_tied(first, other):
            continue
        if not other.numel:
            raise RefusedError(f"{other.name!r} has no elements that could be shared")
        if (other.layout, other.quantizer) != (first.layout, first.quantizer):
            raise UnsupportedError(f"{other.name!r} and {first.name!r} are of other layouts or scales")
        if (other.dtype.name, other.shape) != (first.dtype.name, first.shape):
            raise RefusedError(
                f"{other.name!r} is {other.dtype} {list(other.shape or ())}, {first.name!r} is {first.dtype} "
                f"{list(first.shape or ())}: they cannot be one tensor"
            )
        if not force:
            digest = digest or content_digest(checkpoint, first)
            if content_digest(checkpoint, other) != digest:
                raise RefusedError(
                    f"{first.name!r} and {other.name!r} have different values",
                    hint=f"--force gives {other.name} the values of {first.name}",
                )
        tensors[other.name] = replace(
            other, storage=first.storage, storage_offset=first.storage_offset, stride=first.stride,
            conj=first.conj, neg=first.neg, big_endian=first.big_endian,
        )  # fmt: skip
    if not tensors:
        raise RefusedError("they are tied already")
    return Planned(Changes(tensors=tensors), "tied", (first.name, *tensors))


def plan_untie(checkpoint: Checkpoint, names: Sequence[str]) -> Planned:
    """Give each tensor a storage of its own, as long as its view; raises RefusedError for one that has it already."""
    tensors: dict[str, Tensor] = {}
    contents: dict[int, Content] = {}
    groups = (views for _, views in by_storage(all_strided(checkpoint.tensors)) if len(views) > 1)
    shared = {view.name for views in groups for view in views if not _is_array(view)}
    for name in names:
        for selection in select_one(checkpoint, name):
            tensor = selection.entry
            if selection.index is not None:
                raise UsageError(f"{name!r} is a part of a tensor: a storage is one for all of it")
            if not isinstance(tensor, Tensor) or tensor.storage is None or tensor.name not in shared:
                if selection.exact and isinstance(tensor, Tensor) and tensor.parts:
                    raise UnsupportedError(f"tensor {tensor.name!r} is made of others, which cannot be untied")
                if selection.exact:
                    raise RefusedError(f"{tensor.name!r} shares its bytes with no other name")
                continue
            new, content = _own(checkpoint, tensor)
            tensors[tensor.name] = new
            if new.storage is not None:
                contents[id(new.storage)] = content
    if not tensors:
        raise RefusedError("nothing of it shares its bytes with another name")
    return Planned(Changes(tensors=tensors, contents=contents), "untied", tuple(tensors))


def _one_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    found = [selection for selection in select_one(checkpoint, name) if isinstance(selection.entry, Tensor)]
    if len(found) != 1 or found[0].index is not None:
        raise UsageError(f"{name!r} names {len(found)} tensors: a tie is between whole single ones")
    tensor = found[0].entry
    if not isinstance(tensor, Tensor) or tensor.storage is None or _is_array(tensor):
        raise UnsupportedError(f"tensor {name!r} has no storage that could be shared")
    return tensor


def _own(checkpoint: Checkpoint, tensor: Tensor) -> tuple[Tensor, Content]:
    """A tensor over a storage of its own, which holds just its elements."""
    storage = tensor.storage
    if storage is None:
        raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
    begin, end = tensor.span
    if (end - begin) == tensor.nbytes:  # dense: the strides stay as they are
        new = Storage(storage.key, end - begin, storage.location)
        moved = replace(tensor, storage=new, storage_offset=0, alias_of=None)
        return moved, _ranges(checkpoint, storage, [(begin, end)])
    new = Storage(storage.key, tensor.nbytes, storage.location)
    stride = contiguous_stride(tensor.shape or ())
    moved = replace(tensor, storage=new, storage_offset=0, stride=stride, alias_of=None)
    return moved, Content(tensor.nbytes, make=_gathering(checkpoint, tensor))


def _gathering(checkpoint: Checkpoint, tensor: Tensor) -> Callable[[Write], None]:
    """What writes a tensor's stored elements in row-major order."""

    def make(write: Write) -> None:
        from ckpt_cli.arrays.codec import Codec, stored_of
        from ckpt_cli.arrays.regions import Region
        from ckpt_cli.arrays.sharing import row_pieces

        codec, region = Codec(tensor), Region.of(tensor)
        for part in row_pieces(region, max(_COPIED // tensor.dtype.itemsize, 1)):
            write(stored_of(checkpoint, tensor, codec, region.at(part)).tobytes())

    return make


def _ranges(checkpoint: Checkpoint, storage: Storage, ranges: Sequence[tuple[int, int]]) -> Content:
    """The bytes of some ranges of a storage."""

    def make(write: Write) -> None:
        for begin, end in ranges:
            for at in range(begin, end, _COPIED):
                write(bytes(checkpoint.container.view(storage, at, min(_COPIED, end - at))))

    return Content(sum(end - begin for begin, end in ranges), make=make)


# --- waste -----------------------------------------------------------------------------------------------------------


def plan_compact(checkpoint: Checkpoint) -> Planned:
    """Cut every storage down to what its views need; raises RefusedError where none is larger."""
    placed: dict[int, tuple[Storage, list[tuple[int, int, int]]]] = {}
    contents: dict[int, Content] = {}
    tensors: dict[str, Tensor] = {}
    alone: dict[int, Tensor] = {}
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        if any(map(_is_array, views)):
            continue
        distinct = {view.view: view for view in views if view.view is not None}
        if len(distinct) == 1 and next(iter(distinct.values())).nbytes < storage.nbytes:
            new, content = _own(checkpoint, next(iter(distinct.values())))
            alone[id(storage)] = new
            contents[id(new.storage)] = content
            continue
        blocks = list(_blocks(views))
        used = sum(end - begin for begin, end, _ in blocks)
        if used < storage.nbytes:
            made = Storage(storage.key, used, storage.location)
            placed[id(storage)] = (made, blocks)
            contents[id(made)] = _ranges(checkpoint, storage, [(begin, end) for begin, end, _ in blocks])
    if not contents and not has_room(checkpoint.container):
        raise RefusedError("no storage is larger than its tensors need", path=checkpoint.path)
    tensors = _moved(checkpoint, lambda view: _compacted(view, alone, placed))
    return Planned(Changes(tensors=tensors, contents=contents, anew=True), "compacted", tuple(tensors))


def _compacted(
    view: Tensor, alone: dict[int, Tensor], placed: dict[int, tuple[Storage, list[tuple[int, int, int]]]]
) -> Tensor:
    own = alone.get(id(view.storage))
    if own is not None:
        return (
            replace(view, storage=own.storage, storage_offset=0, stride=own.stride) if view.numel else _empty(view, own)
        )
    if id(view.storage) not in placed:
        return view
    storage, blocks = placed[id(view.storage)]
    begin, _ = view.span
    for first, last, at in blocks:
        if first <= begin < last:
            moved = (at - first) * 8 // view.dtype.bits
            return replace(view, storage=storage, storage_offset=view.storage_offset + moved)
    return replace(view, storage=storage, storage_offset=0)


def _empty(view: Tensor, own: Tensor) -> Tensor:
    return replace(view, storage=own.storage, storage_offset=0)


def _blocks(views: Iterable[Tensor]) -> Iterator[tuple[int, int, int]]:
    """The unions of the views' spans, as (begin, end, place in the new storage), each on a boundary of 16 bytes."""
    at = 0
    begin = end = -1
    for first, last in sorted(view.span for view in views if view.numel):
        first -= first % 16
        if begin < 0:
            begin, end = first, last
        elif first <= end:
            end = max(end, last)
        else:
            yield begin, min(end + -end % 16, first), at
            at += min(end + -end % 16, first) - begin
            begin, end = first, last
    if begin >= 0:
        yield begin, end, at
