"""`ckpt set` as a function of the library, the same edit made by torch, and states of tensors compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from contract import State, bits

from ckpt_cli.edits.plan import EditOptions, EditResult
from ckpt_cli.edits.set import plan_set
from ckpt_cli.edits.transaction import transaction


def edit(
    path: Path | str, *assignments: str, output: Path | None = None, backup: bool = False, cast: bool = False
) -> EditResult:
    """Do what `ckpt set` does."""
    options = EditOptions(None if output is None else str(output), backup=backup)
    return transaction(str(path), lambda checkpoint: plan_set(checkpoint, assignments, cast=cast), options)


def same_states(a: State, b: State) -> bool:
    """Whether two states are equal name by name, NaN and sign of zero included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name])
        for name in a
    )


def edited_by_torch(tensor: torch.Tensor, index: Any, operator: str, value: Any) -> None:
    """Make the edit in place; elements that share bytes are set once."""
    dtype = tensor.dtype
    wide = torch.float32 if dtype.itemsize < 4 and dtype.is_floating_point else dtype
    if str(dtype) in ("torch.uint16", "torch.uint32", "torch.uint64"):
        wide = torch.int64
    part = indexed_by_torch(tensor, index)
    for dim in range(part.ndim):
        if part.stride(dim) == 0 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    current = part.to(wide)
    made = {
        "": lambda: torch.full_like(current, value),
        "+": lambda: current + value,
        "-": lambda: current - value,
        "*": lambda: current * value,
        "/": lambda: current / value,
    }[operator]()
    part.copy_(made.to(dtype))


def indexed_by_torch(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """Numpy's basic indexing, negative steps included: the region's own shape, stride and offset."""
    from ckpt_cli.arrays.indexing import Region

    region = Region(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
    found = region.at(index if isinstance(index, tuple) else (index,))
    # torch has no negative strides: walk these dimensions backwards, which sets the same elements to one value
    offset = found.offset + sum(
        (size - 1) * step for size, step in zip(found.shape, found.stride, strict=True) if step < 0
    )
    if not found.numel:
        offset = 0
    return tensor.as_strided(found.shape, [abs(step) for step in found.stride], offset)
