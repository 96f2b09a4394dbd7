"""The plans of `tie`, `untie` and `compact`: tensors over other storages than before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.edits.new_names import name_of_new, require_room
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import CkptError, RefusedError, UnsupportedError, UsageError
from ckpt_cli.files.copy import PIECE
from ckpt_cli.formats.registry import format_of
from ckpt_cli.model.changes import Changes, Content, Write, content_of, over
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Storage, Tensor, contiguous_stride
from ckpt_cli.ops.aliasing import (
    Companions,
    all_strided,
    are_tied,
    blocks_of,
    by_storage,
    content_digest,
    is_array,
    needed_nbytes,
)
from ckpt_cli.ops.ls import unreferenced
from ckpt_cli.ops.select import select_to_edit, selects
from ckpt_cli.parallel.tensor_chunks import TensorReader


def is_composed(tensor: Tensor) -> bool:
    """True if the elements are those of one part, and the other parts only say where they are."""
    return tensor.layout == "nested" or tensor.layout.startswith("sparse")


def moved(checkpoint: Checkpoint, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the tensors that a function changes, or whose parts it changes, by their names."""
    found = {}
    for tensor in checkpoint.tensors:
        after = _move(tensor, move)
        if after is not tensor:
            found[tensor.name] = after
    return found


def _move(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    parts = tuple(_move(part, move) for part in tensor.parts)
    if any(new is not old for new, old in zip(parts, tensor.parts, strict=True)):
        values = tensor.part("buffer" if tensor.layout == "nested" else "values") if is_composed(tensor) else None
        dtype = parts[tensor.parts.index(values)].dtype if values is not None else tensor.dtype
        tensor = replace(tensor, parts=parts, dtype=dtype)
    return move(tensor) if tensor.storage is not None else tensor


# --- ties ------------------------------------------------------------------------------------------------------------


def plan_tie(checkpoint: Checkpoint, names: Sequence[str], *, force: bool = False, new: bool = False) -> EditPlan:
    """Make every further name another name of the first one's tensor; with `new`, names that are not there are added.

    Raises RefusedError where values differ, unless forced, and where dtypes or shapes do.
    """
    added = _added(checkpoint, names) if new else {}
    names = [name for name in names if name not in added]
    if added and len(names) == 1:
        return EditPlan(Verb("tied", "tie"), (names[0], *added), changes=Changes(added=added))
    first, *others = [_one_tensor(checkpoint, name) for name in names]
    if not others:
        raise UsageError("a tie takes two names at least")
    tensors: dict[str, Tensor] = {}
    companions = Companions(checkpoint.tensors)
    digest = None
    budget = Budget.of(checkpoint)
    for other in others:
        if are_tied(first, other):
            continue
        _require_alike(first, other)
        if not force:
            digest = digest or _digest(checkpoint, first, budget)
            if _digest(checkpoint, other, budget) != digest:
                raise RefusedError(
                    f"{first.name!r} and {other.name!r} have different values",
                    hint=f"--force gives {other.name} the values of {first.name}",
                )
        tensors.update((each.name, _tied_to(first, each)) for each in (other, *companions.of(other)))
    if not tensors:
        raise RefusedError("they are tied already")
    named = dict.fromkeys(other.name for other in others if other.name in tensors)
    also = [name for name in tensors if name not in named]
    return EditPlan(Verb("tied", "tie"), (first.name, *named, *added), also, Changes(tensors=tensors, added=added))


def _require_alike(first: Tensor, other: Tensor) -> None:
    """Raise where two tensors cannot be one."""
    if not other.numel:
        raise RefusedError(f"{other.name!r} has no elements that could be shared")
    if (other.layout, other.quantizer) != (first.layout, first.quantizer):
        raise UnsupportedError(f"{other.name!r} and {first.name!r} are of other layouts or scales")
    if (other.dtype.name, other.shape) != (first.dtype.name, first.shape):
        raise RefusedError(
            f"{other.name!r} is {other.dtype} {list(other.shape or ())}, {first.name!r} is {first.dtype} "
            f"{list(first.shape or ())}: they cannot be one tensor"
        )


def _added(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, object]:
    """Return the names that are not there as new names of the tensor that the first one is."""
    first = _one_tensor(checkpoint, names[0])
    added: dict[str, object] = {}
    for name in names[1:]:
        if selects(checkpoint, name):
            continue
        require_room(checkpoint, name_of_new(name), added)
        if first.layout != "strided" or first.parts or not first.numel:
            raise UnsupportedError(f"tensor {first.name!r} cannot get a second name: it is {first.layout}, or empty")
        if format_of(checkpoint).name == "dcp":
            raise UnsupportedError("a distributed checkpoint does not record that names share their bytes")
        added[name] = replace(first, name=name, kind="tensor", holder=None, alias_of=None)
    return added


def _tied_to(first: Tensor, other: Tensor) -> Tensor:
    """Return a tensor as another name of the first one's view."""
    return replace(
        other, storage=first.storage, storage_offset=first.storage_offset, stride=first.stride,
        conj=first.conj, neg=first.neg, big_endian=first.big_endian,
    )  # fmt: skip


def _digest(checkpoint: Checkpoint, tensor: Tensor, budget: Budget) -> bytes:
    """Return a digest of all stored elements of a tensor; raises LimitError where there are too many."""
    budget.read(tensor, Region.of(tensor))
    return content_digest(checkpoint, tensor)


def plan_untie(checkpoint: Checkpoint, names: Sequence[str]) -> EditPlan:
    """Give each tensor a storage of its own, as long as its view.

    Raises RefusedError for one that has it already, LimitError for a view that repeats few bytes without end.
    """
    budget = Budget.of(checkpoint)
    tensors: dict[str, Tensor] = {}
    contents: dict[Storage, Content] = {}
    groups = (views for _, views in by_storage(all_strided(checkpoint.tensors)) if len(views) > 1)
    shared = {view.name for views in groups for view in views if not is_array(view)}
    companions = Companions(checkpoint.tensors)
    also: list[str] = []
    for name in names:
        for selection in select_to_edit(checkpoint, name):
            tensor = selection.entry
            if selection.index is not None:
                raise UsageError(f"{name!r} is a part of a tensor: a storage is one for all of it")
            if isinstance(tensor, Tensor) and tensor.name in tensors:
                continue
            together = companions.of(tensor) if isinstance(tensor, Tensor) else []
            why_not = _why_not_untied(checkpoint, tensor, together, shared)
            if why_not is None and isinstance(tensor, Tensor):
                budget.read(tensor, Region.of(tensor))
                new, content = _own(checkpoint, tensor)
                tensors[tensor.name] = new
                for each in together:
                    tensors[each.name] = replace(each, storage=new.storage, storage_offset=0, stride=new.stride)
                    also.append(each.name)
                if new.storage is not None:
                    contents[new.storage] = content
            elif selection.exact and why_not is not None:
                raise why_not
    if not tensors:
        raise RefusedError("nothing of it shares its bytes with another name")
    named = tuple(name for name in tensors if name not in also)
    return EditPlan(Verb("untied", "untie"), named, also, Changes(tensors=tensors, contents=contents))


def _why_not_untied(
    checkpoint: Checkpoint, tensor: Entry, together: Sequence[Tensor], shared: Collection[str]
) -> CkptError | None:
    """Return the reason not to untie an entry; None where it can be untied."""
    if not isinstance(tensor, Tensor) or tensor.storage is None or tensor.name not in shared:
        if isinstance(tensor, Tensor) and tensor.parts:
            return UnsupportedError(f"tensor {tensor.name!r} is made of others, which cannot be untied")
        return RefusedError(f"{tensor.name!r} shares its bytes with no other name")
    if together and _is_alone(checkpoint, [tensor, *together]):
        names = ", ".join(each.name for each in together)
        return RefusedError(f"{tensor.name!r} shares its bytes only with {names}, which the same object computes with")
    return None


def _is_alone(checkpoint: Checkpoint, together: Sequence[Tensor]) -> bool:
    """True if no other name has the storage of some tensors."""
    names = {tensor.name for tensor in together}
    views = (view for view in all_strided(checkpoint.tensors) if view.storage is together[0].storage)
    return all(view.name in names for view in views)


def _one_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    found = [selection for selection in select_to_edit(checkpoint, name) if isinstance(selection.entry, Tensor)]
    if len(found) != 1 or found[0].index is not None:
        raise UsageError(f"{name!r} names {len(found)} tensors: a tie is between whole single ones")
    tensor = found[0].entry
    if not isinstance(tensor, Tensor) or tensor.storage is None or is_array(tensor):
        raise UnsupportedError(f"tensor {name!r} has no storage that could be shared")
    return tensor


def _own(checkpoint: Checkpoint, tensor: Tensor) -> tuple[Tensor, Content]:
    """Return a tensor over a storage of its own, which holds its elements alone, and the bytes of that storage."""
    storage = tensor.storage
    if storage is None:
        raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
    begin, end = tensor.span
    if (end - begin) == tensor.nbytes:  # dense: the strides stay as they are
        new = Storage(storage.key, end - begin, storage.location)
        return over(tensor, new, tensor.stride), content_of(storage, [(begin, end)])
    new = Storage(storage.key, tensor.nbytes, storage.location)
    stride = contiguous_stride(tensor.shape or ())
    return over(tensor, new, stride), Content(tensor.nbytes, make=_gathering(checkpoint, tensor))


def _gathering(checkpoint: Checkpoint, tensor: Tensor) -> Callable[[Write], None]:
    """Return a writer of a tensor's stored elements in row-major order."""

    def make(write: Write) -> None:
        for data in TensorReader(checkpoint, tensor, Region.of(tensor)).read_all(PIECE):
            write(data)

    return make


# --- waste -----------------------------------------------------------------------------------------------------------


def plan_compact(checkpoint: Checkpoint) -> EditPlan:
    """Cut every storage down to the bytes that its views need, and leave out unreferenced ones.

    Raises RefusedError where there is nothing to cut.
    """
    from ckpt_cli.formats.torch_zip.rewrite import has_room

    placed: dict[Storage | None, tuple[Storage, list[tuple[int, int, int]]]] = {}
    contents: dict[Storage, Content] = {}
    tensors: dict[str, Tensor] = {}
    alone: dict[Storage | None, Tensor] = {}
    for storage, views in by_storage(all_strided(checkpoint.tensors)):
        if needed_nbytes(storage, views) >= storage.nbytes:
            continue
        distinct = {view.view: view for view in views if view.view is not None}
        if len(distinct) == 1 and next(iter(distinct.values())).nbytes < storage.nbytes:
            new, content = _own(checkpoint, next(iter(distinct.values())))
            alone[storage] = new
            if new.storage is not None:
                contents[new.storage] = content
            continue
        blocks = list(blocks_of(views))
        made = Storage(storage.key, sum(end - begin for begin, end, _ in blocks), storage.location)
        placed[storage] = (made, blocks)
        contents[made] = content_of(storage, [(begin, end) for begin, end, _ in blocks])
    if not contents and not has_room(checkpoint.container) and not unreferenced(checkpoint):
        raise RefusedError("no storage is larger than its tensors need", path=checkpoint.path)
    tensors = moved(checkpoint, lambda view: _compacted(view, alone, placed))
    changes = Changes(tensors=tensors, contents=contents, rewrite=True)
    return EditPlan(Verb("compacted", "compact"), tuple(tensors), changes=changes)


def _compacted(
    view: Tensor,
    alone: dict[Storage | None, Tensor],
    placed: dict[Storage | None, tuple[Storage, list[tuple[int, int, int]]]],
) -> Tensor:
    own = alone.get(view.storage)
    if own is not None:
        return (
            replace(view, storage=own.storage, storage_offset=0, stride=own.stride) if view.numel else _empty(view, own)
        )
    if view.storage not in placed:
        return view
    storage, blocks = placed[view.storage]
    begin, _ = view.span
    for first, last, at in blocks:
        if first <= begin < last:
            shift = (at - first) // view.dtype.block_nbytes * view.dtype.elements
            return replace(view, storage=storage, storage_offset=view.storage_offset + shift)
    return replace(view, storage=storage, storage_offset=0)


def _empty(view: Tensor, own: Tensor) -> Tensor:
    return replace(view, storage=own.storage, storage_offset=0)
