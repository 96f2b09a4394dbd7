"""The plan of `set` for tensors: values into elements, as patches over their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.budget import Budget
from ckpt_cli.edits.assignment import Assignment, parse_value
from ckpt_cli.errors import UnsupportedError, UsageError, ValueRefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import PIECE
from ckpt_cli.files.patches import Overlay
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor, Value
from ckpt_cli.ops.aliasing import all_strided
from ckpt_cli.ops.select import Selection, part_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckpt_cli.arrays.codec import Codec

    Array = NDArray[Any]

_ENCODED_AT_ONCE = 1 << 20
"""Values up to which they are encoded before they are spread over a region."""


@dataclass(frozen=True, slots=True)
class ElementEdit:
    """One assignment to elements of tensors, with its values parsed."""

    assignment: Assignment
    values: Array
    cast: bool
    """True if values that a dtype cannot hold are converted."""


@dataclass(frozen=True, slots=True)
class Target:
    """Elements of one tensor that an assignment changes."""

    tensor: Tensor
    region: Region
    index: Index
    """The index of the region in the tensor."""
    edit: ElementEdit
    is_repeated: bool
    """True if the assignment has the very same elements under another name before, so that `*+=1` adds 1, not 2."""


def element_edit(
    assignment: Assignment, selections: Sequence[Selection], *, cast: bool, keeps_values: bool = False
) -> ElementEdit:
    """Parse the values of an assignment; raises UnsupportedError where some of what it selects is not a tensor.

    `keeps_values` is True if the checkpoint can have other entries than tensors, for a hint.
    """
    value = next((selection.entry for selection in selections if isinstance(selection.entry, Value)), None)
    if value is not None:
        raise _not_all_tensors(value, assignment)
    if assignment.value.strip() in ("None", "null") and all(selection.index is None for selection in selections):
        raise _nothing(assignment, keeps_values=keeps_values)
    return ElementEdit(assignment, parse_value(assignment.value), cast)


def targets_of(checkpoint: Checkpoint, edit: ElementEdit, selections: Sequence[Selection]) -> list[Target]:
    """Find the elements that an assignment changes, in the tensors that it selects.

    Raises CkptError where one has no such elements, LimitError where the values are too many to go through.
    """
    budget = Budget.of(checkpoint)
    found: list[Target] = []
    views: set[object] = set()
    for selection in selections:
        if isinstance(selection.entry, Tensor):
            tensor, index = _place_of(checkpoint, selection.entry, selection.index, budget)
            region = part_of(tensor, index)
            is_repeated = tensor.view is not None and tensor.view in views
            if not is_repeated:
                budget.read(tensor, region)
                views.add(tensor.view)
            found.append(Target(tensor, region, index, edit, is_repeated))
    return found


def patch_elements(checkpoint: Checkpoint, overlay: Overlay, targets: Sequence[Target]) -> None:
    """Put the new bytes of targets into an overlay, one after another: each sees what those before it changed.

    Raises a CkptError for the first one that cannot be done; the overlay is then to be thrown away.
    """
    for target in targets:
        if not target.is_repeated:
            _write(checkpoint, overlay, target)


def _nothing(assignment: Assignment, *, keeps_values: bool) -> UsageError:
    """Return the error for None in place of tensors, with the commands that take these out or put it there."""
    from shlex import quote

    target = assignment.target
    hint = f"ckpt rm FILE {quote(target)} takes it out"
    if keeps_values and not any(char in target for char in "*?"):
        hint = f"ckpt rm FILE {quote(target)}, then ckpt set FILE {quote(f'{target}=None')} --new"
    return UsageError(f"{target!r} is made of tensors, whose elements cannot be None", hint=hint)


def _not_all_tensors(entry: Value, assignment: Assignment) -> UnsupportedError:
    """Return the error for one value to tensors and other entries together, or in place of a whole container."""
    from shlex import quote

    target = assignment.target
    return UnsupportedError(
        f"{target!r} has tensors and other values below it ({entry.name!r} is not a tensor), "
        "which cannot all be set to one value",
        hint="name its entries one by one; to put a value in place of all of it, run "
        f"ckpt rm FILE {quote(target)}, then ckpt set FILE {quote(f'{target}={assignment.value}')} --new",
    )


def _place_of(checkpoint: Checkpoint, tensor: Tensor, index: Index | None, budget: Budget) -> tuple[Tensor, Index]:
    """Return the tensor, or its part, whose elements are to change; raises UnsupportedError where it has none."""
    from ckpt_cli.arrays.codec import require_plain
    from ckpt_cli.arrays.sparse_and_nested import place

    budget.read_parts(tensor, Region.of)
    if tensor.layout == "quantized":
        if tensor.dtype.bits < 8:
            raise UnsupportedError(f"tensor {tensor.name!r} packs several integers into a byte: it cannot be set")
        return tensor, index or ()
    if index is None:
        require_plain(tensor)
        return tensor, ()
    placed = place(checkpoint, tensor, index)
    if not placed.stored:
        raise UnsupportedError(
            f"sparse tensor {tensor.name!r} does not store this element, which is zero: only stored ones can be set",
        )
    return replace(placed.part, name=tensor.name), placed.index


def _write(checkpoint: Checkpoint, overlay: Overlay, target: Target) -> None:
    """Patch one region, a bounded piece of the file at a time."""
    from ckpt_cli.arrays.codec import value_shape
    from ckpt_cli.arrays.quantized import codec_of

    codec = codec_of(checkpoint, target.tensor).at(target.index)
    tensor, region, values = target.tensor, target.region, target.edit.values
    operator = target.edit.assignment.operator
    if tensor.storage is None or not region.numel:
        _broadcast(values, value_shape(tensor.dtype, region.shape), tensor.name)
        return
    if not _is_one_to_one(region) and (operator or values.size != 1):
        raise UnsupportedError(
            f"elements of tensor {tensor.name!r} share bytes with each other: only one value for all can be set"
        )
    encoded = not operator and not codec.paired and codec.uniform and values.size <= _ENCODED_AT_ONCE
    if encoded:
        values = _broadcast(_encode(codec, values, target), region.shape, tensor.name)
    else:
        values = _broadcast(values, value_shape(tensor.dtype, region.shape), tensor.name)
    most = min(PIECE, tensor.dtype.itemsize << 20)  # at most a million elements
    for part in region.pieces(tensor.dtype.itemsize, most):
        low, high = region.at(part).span()
        size = tensor.dtype.itemsize
        extents = tensor.storage.extents(low * size, (high - low) * size)
        data = bytearray(overlay.gather(extents))
        elements = codec.array(data, region.at(part), low)
        place: tuple[Any, ...] = (*part, ...)  # the ellipsis keeps a lone Python number an array
        given = values[place]
        elements[...] = given if encoded else _result(codec.at(part), elements, given, target)
        overlay.scatter(extents, bytes(data))


def _result(codec: Codec, elements: Array, values: Array, target: Target) -> Array:
    """Return the new stored elements for some old ones."""
    if target.edit.assignment.operator:
        values = _compute(codec, target, codec.decode(elements), values)
    return _encode(codec, values, target)


def _encode(codec: Codec, values: Array, target: Target) -> Array:
    try:
        return codec.encode(values, cast=target.edit.cast)
    except OverflowError:  # a Python integer beyond every float
        raise ValueRefusedError(
            f"{target.tensor.dtype} cannot hold so large an integer (tensor {target.tensor.name!r})"
        ) from None


def _compute(codec: Codec, target: Target, current: Array, operand: Array) -> Array:
    """`current OP operand` in the precision that torch uses; refused where the result leaves its range."""
    import operator

    import numpy as np

    sign = target.edit.assignment.operator
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign]
    kind: np.dtype[Any] = codec.arithmetic()
    if kind.kind == "O":
        return _compute_exactly(apply, current, operand, target)
    if operand.dtype.kind == "c" and kind.kind != "c":
        raise ValueRefusedError(f"{target.tensor.dtype} cannot hold a complex number (tensor {target.tensor.name!r})")
    wide = np.dtype(np.complex128 if kind.kind == "c" else np.float64)
    with np.errstate(all="ignore"):
        result: Array = np.asarray(apply(current.astype(kind), operand.astype(kind)))
        if target.edit.cast:
            return result
        exact = np.asarray(apply(current.astype(wide), operand.astype(wide)))
        finite = np.isfinite(current) & np.isfinite(operand.astype(wide))
    if bool((finite & (~np.isfinite(result) | ((exact != 0) & (result == 0)))).any()):
        raise ValueRefusedError(
            f"the result of {sign}= is out of the range of {target.tensor.dtype} (tensor {target.tensor.name!r})",
            hint="--cast keeps infinities and zeros that come of it",
        )
    return result


def _compute_exactly(apply: Any, current: Array, operand: Array, target: Target) -> Array:
    """Integer arithmetic without a wrap: in Python's integers, or in int64 where nothing can leave it."""
    import numpy as np

    if operand.dtype.kind in "fc" and bool((operand == np.floor(operand.real)).all()):
        operand = _integers(operand)
    elif operand.dtype.kind in "biu":
        operand = operand.astype(object)
    small = target.tensor.dtype.bits <= 32 and operand.dtype.kind == "O" and _fits_31_bits(operand)
    try:
        if small and target.edit.assignment.operator != "/":
            return np.asarray(apply(current.astype(np.int64), operand.astype(np.int64)))
        return np.asarray(apply(current.astype(object), operand), dtype=object)
    except ZeroDivisionError:
        raise ValueRefusedError(f"division by zero (tensor {target.tensor.name!r})") from None


def _integers(values: Array) -> Array:
    """Whole real numbers as Python integers."""
    import numpy as np

    exact = np.empty(values.shape, object)
    exact[...] = np.vectorize(lambda value: int(value.real), otypes=[object])(values)
    return exact


def _fits_31_bits(values: Array) -> bool:
    return bool(((values < 1 << 31) & (values > -(1 << 31))).all())


def _broadcast(values: Array, shape: tuple[int, ...], name: str) -> Array:
    """Values stretched to a region's shape by numpy's rules of assignment: leading ones are dropped."""
    import numpy as np

    while values.ndim > len(shape) and values.shape[0] == 1:
        values = values[0, ...]  # not [0], which takes a Python number out of its array
    try:
        return np.broadcast_to(values, shape)
    except (ValueError, OverflowError):
        raise ValueRefusedError(
            f"values of shape {list(values.shape)} do not fit shape {list(shape)} (tensor {name!r})"
        ) from None


def _is_one_to_one(region: Region) -> bool:
    """True if no two elements share bytes, judged by strides; a rare interleaved layout counts as sharing."""
    reach = 0
    for step, size in sorted((abs(step), size) for size, step in zip(region.shape, region.stride, strict=True)):
        if size > 1:
            if step <= reach:
                return False
            reach += (size - 1) * step
    return True


class _Changed:
    """The regions of one storage that were assigned to."""

    def __init__(self) -> None:
        self.regions: list[tuple[Tensor, Region]] = []
        self.begin = self.end = 0
        """The first byte of the storage in any of them, and the byte after the last."""

    def add(self, tensor: Tensor, region: Region) -> None:
        bits = tensor.dtype.bits
        begin, end = (element * bits // 8 for element in region.span())
        self.begin = min(self.begin, begin) if self.regions else begin
        self.end = max(self.end, end)
        self.regions.append((tensor, region))

    def meets(self, view: Tensor, budget: Budget) -> bool:
        """True if a view shares a byte with one of them; once comparisons run out, with anything between them."""
        from ckpt_cli.arrays.indexing import regions_meet

        begin, end = view.span
        if end <= self.begin or self.end <= begin:
            return False
        if not budget.allow_pairs(len(self.regions)):
            return True
        return any(regions_meet(tensor, view, region) for tensor, region in self.regions)


def also_changed(checkpoint: Checkpoint, targets: Iterable[tuple[Tensor, Region]], changed: Sequence[str]) -> list[str]:
    """Return the names besides `changed` whose bytes meet those of a region: tied or overlapping ones."""
    by_storage: dict[Storage | None, _Changed] = {}
    for tensor, region in targets:
        if region.numel:
            by_storage.setdefault(tensor.storage, _Changed()).add(tensor, region)
    named = set(changed)
    budget = Budget()
    return [
        entry.name
        for entry in checkpoint.tensors
        if entry.name not in named
        and any(
            by_storage[view.storage].meets(view, budget)
            for view in all_strided([entry])
            if view.numel and view.storage in by_storage
        )
    ]
