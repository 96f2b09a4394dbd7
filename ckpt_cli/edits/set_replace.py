"""The plan of `set --replace`: NaN and infinities in bulk, of which only the blocks that have some are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.budget import Budget
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError, about
from ckpt_cli.files.patches import Overlay
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.ops.aliasing import is_array
from ckpt_cli.ops.select import select_to_edit
from ckpt_cli.parallel.map import buffer, run

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ckpt_cli.arrays.codec import Codec
    from ckpt_cli.files.source import Extent

KINDS = ("nan", "inf", "-inf")

_PIECE = 1 << 20
"""Bytes that are looked at together."""

_BLOCK = 4096
"""Bytes that are written together where one element of them changes."""


def replacements_of(texts: Sequence[str]) -> dict[str, float]:
    """Parse `nan=0` and the like; raises UsageError for anything else, or for one of them twice."""
    found: dict[str, float] = {}
    for text in texts:
        kind, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if kind not in KINDS or number != number or kind in found:
            raise UsageError(
                f"--replace {text}: it is nan=VALUE, inf=VALUE or -inf=VALUE, each once", hint="--replace nan=0"
            )
        found[kind] = number
    return found


def plan_replace(
    checkpoint: Checkpoint, names: Sequence[str], values: Mapping[str, float], executor: Executor | None = None
) -> EditPlan:
    """Replace NaN and infinities among the elements of floating tensors.

    The report notes how many there were, by dtype. Raises UnsupportedError for a tensor that was named and is not
    floating, or has gaps between its elements; ValueRefusedError for a value that a dtype cannot hold.
    """
    tensors = _wanted(checkpoint, names)
    budget = Budget.of(checkpoint)
    pieces = [_whole(checkpoint, group[0], budget) for group in tensors.values()]
    codes = {dtype.name: _codes(tensor, values) for tensor in pieces for dtype in [tensor.dtype]}
    changed: list[str] = []
    also: list[str] = []
    notes: list[str] = []

    def patch(opened: Checkpoint, overlay: Overlay) -> None:
        counts: dict[tuple[str, str], int] = {}
        for tensor, group in zip(pieces, tensors.values(), strict=True):
            with about(opened.path):
                found = _patch(overlay, tensor, values, codes[tensor.dtype.name], executor)
            if found:
                changed.extend(each.name for each in group)
                named = {each.name for each in group}
                also.extend(each.name for each in opened.tensors if _meets(each, tensor) and each.name not in named)
            for kind, count in found.items():
                key = tensor.dtype.name, kind
                counts[key] = counts.get(key, 0) + count
        also[:] = [name for name in dict.fromkeys(also) if name not in changed]
        notes[:] = [f"{count:,} {kind} in {dtype}" for (dtype, kind), count in counts.items()]

    return EditPlan(Verb("replaced values of", "replace values of"), changed, also, patch=patch, notes=notes)


def _wanted(checkpoint: Checkpoint, names: Sequence[str]) -> dict[object, list[Tensor]]:
    """Return the floating tensors that names select, in groups of those that are one."""
    tensors: dict[object, list[Tensor]] = {}
    for name in names:
        for selection in select_to_edit(checkpoint, name):
            tensor = selection.entry
            if selection.index is not None:
                raise UsageError(f"{name!r} is a part of a tensor: values are replaced in whole ones")
            if not isinstance(tensor, Tensor) or not _is_floating(tensor):
                if selection.exact:
                    raise UnsupportedError(f"{tensor.name!r} is not a floating tensor, so it has no NaN or infinities")
                continue
            group = tensors.setdefault(tensor.view or tensor.name, [])
            if all(other.name != tensor.name for other in group):
                group.append(tensor)
    if not tensors:
        raise RefusedError("nothing that is named is a floating tensor", path=checkpoint.path)
    return tensors


def _is_floating(tensor: Tensor) -> bool:
    is_plain = tensor.layout == "strided" and tensor.storage is not None and not is_array(tensor)
    return is_plain and tensor.dtype.is_plain_float


def _meets(other: Tensor, tensor: Tensor) -> bool:
    """True if another view of the same storage has bytes in common with a tensor's span."""
    if other.storage is not tensor.storage or not other.numel:
        return False
    (begin, end), (low, high) = other.span, tensor.span
    return begin < high and low < end


def _whole(checkpoint: Checkpoint, tensor: Tensor, budget: Budget) -> Tensor:
    """Return all elements of a tensor in the order in which they are stored, as one dimension."""
    from ckpt_cli.arrays.indexing import Region

    budget.read(tensor, Region.of(tensor))
    begin, end = tensor.span
    if end - begin != tensor.nbytes:
        raise UnsupportedError(
            f"the elements of {tensor.name!r} have gaps between them, or repeat",
            path=checkpoint.path,
            hint="ckpt untie FILE NAME gives a view bytes of its own",
        )
    return replace(tensor, shape=(tensor.numel,), stride=(1,), storage_offset=begin // tensor.dtype.itemsize)


def _codes(tensor: Tensor, values: Mapping[str, float]) -> dict[str, bytes]:
    """Return each value as a stored element; raises ValueRefusedError where the dtype cannot hold one."""
    import numpy as np

    codec = _codec(tensor)
    return {kind: codec.encode(np.array(value)).tobytes() for kind, value in values.items()}


def _codec(tensor: Tensor) -> Codec:
    from ckpt_cli.arrays.codec import Codec

    return Codec(replace(tensor, shape=(0,), stride=(1,), storage=Storage("", 0), storage_offset=0))


_Job = tuple[Tensor, "Extent", "Mapping[str, bytes]"]
_Found = tuple["list[tuple[int, bytes]]", "dict[str, int]"]


def _patch(
    overlay: Overlay, tensor: Tensor, values: Mapping[str, float], codes: Mapping[str, bytes], executor: Executor | None
) -> dict[str, int]:
    """Put the blocks that change into the overlay; returns how many elements of each kind there were."""
    if tensor.storage is None or not tensor.numel:
        return {}
    del values
    size = tensor.dtype.itemsize
    begin, end = tensor.span
    facts = replace(tensor, shape=(0,), storage=Storage("", 0), storage_offset=0, parts=())

    def jobs() -> Iterator[tuple[_Job, Extent]]:
        assert tensor.storage is not None
        for extent in tensor.storage.extents(begin, end - begin):
            for at in range(0, extent.nbytes, _PIECE):
                part = extent.cut(at, min(_PIECE, extent.nbytes - at))
                yield (facts, part, codes), part

    counts: dict[str, int] = {}
    made = (job for job, _ in jobs())
    answers = map(_job, made) if executor is None else run(made, _job, executor)
    for (_, part), (blocks, found) in zip(jobs(), answers, strict=True):
        if part.nbytes % size:
            raise UnsupportedError(f"elements of {tensor.name!r} are cut in two by its chunks")
        for offset, data in blocks:
            overlay.write(part.file, part.offset + offset, data)
        for kind, count in found.items():
            counts[kind] = counts.get(kind, 0) + count
    return counts


def _job(job: _Job) -> _Found:
    """Look at one piece: the blocks of it that change, and how many elements of each kind there are."""
    import numpy as np

    tensor, extent, codes = job
    data = buffer(extent.nbytes)
    extent.file.read_into(data, extent.offset)
    codec = _codec(tensor)
    stored = np.frombuffer(data, codec.stored)
    values = codec.decode(stored)
    if bool(np.isfinite(values).all()):
        return [], {}
    masks = {"nan": np.isnan(values), "inf": values == np.inf, "-inf": values == -np.inf}
    counts = {kind: int(np.count_nonzero(masks[kind])) for kind in codes}
    new, hit = stored.copy(), np.zeros(stored.size, bool)
    for kind, code in codes.items():
        new[masks[kind]] = np.frombuffer(code, codec.stored)[0]
        hit |= masks[kind]
    per_block = _BLOCK // tensor.dtype.itemsize
    blocks = [
        (number * _BLOCK, new[number * per_block : (number + 1) * per_block].tobytes())
        for number in np.unique(np.flatnonzero(hit) // per_block).tolist()
    ]
    return blocks, {kind: count for kind, count in counts.items() if count}
