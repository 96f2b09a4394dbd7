"""Tensors of a checkpoint as torch tensors over the file's own bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model import Checkpoint, Storage, Tensor

if TYPE_CHECKING:
    import torch


def torch_tensor(checkpoint: Checkpoint, tensor: Tensor, made: dict[object, Any]) -> torch.Tensor:
    """A torch tensor with the same dtype, shape, stride and storage offset.

    `made` keeps what was made for this checkpoint, so that ties stay ties: mapped files by number, storages, and
    tensors by view.
    """
    found = made.get(tensor.view) if tensor.view is not None else None
    if found is None or (found.requires_grad, _is_parameter(found)) != (tensor.requires_grad, _is_kind(tensor)):
        found = _make(checkpoint, tensor, made)
        if tensor.view is not None:
            made[tensor.view] = found
    return found


def _is_kind(tensor: Tensor) -> bool:
    return tensor.kind == "parameter"


def _is_parameter(value: torch.Tensor) -> bool:
    import torch

    return isinstance(value, torch.nn.Parameter)


def _make(checkpoint: Checkpoint, tensor: Tensor, made: dict[object, Any]) -> torch.Tensor:
    import torch

    dtype = getattr(torch, tensor.dtype.name, None)
    if tensor.layout == "meta" and dtype is not None:
        value = torch.empty_strided(tensor.shape or (), tensor.stride, dtype=dtype, device="meta")
        return _as_kind(value, tensor)
    if tensor.layout not in ("strided", "quantized") or tensor.storage is None:
        from ckpt_cli.arrays.torch_layouts import composed

        value = composed(checkpoint, tensor, lambda part: torch_tensor(checkpoint, part, made).detach(), made)
        return value if tensor.layout == "uninitialized" else _as_kind(value, tensor)
    if dtype is None:
        raise UnsupportedError(f"torch has no dtype for tensor {tensor.name!r}, which is {tensor.dtype}")
    if tensor.layout == "quantized":
        from ckpt_cli.arrays.torch_layouts import quantized

        return _as_kind(quantized(checkpoint, tensor, _storage(checkpoint, tensor.storage, made), dtype), tensor)
    if tensor.big_endian:
        return _as_kind(_swapped(checkpoint, tensor), tensor)
    storage = _storage(checkpoint, tensor.storage, made)
    value = torch.empty(0, dtype=dtype).set_(storage, tensor.storage_offset, tensor.shape or (), tensor.stride)
    if tensor.conj:
        value = value.conj()
    if tensor.neg:
        value = torch._neg_view(value)
    return _as_kind(value, tensor)


def _as_kind(value: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """A Parameter where the file has one, and with the same requires_grad."""
    import torch

    if tensor.kind == "parameter":
        return torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


def _storage(checkpoint: Checkpoint, storage: Storage, made: dict[object, Any]) -> torch.UntypedStorage:
    """The storage over a private mapping of the file, or a copy where its bytes are compressed or misaligned."""
    import torch

    found: torch.UntypedStorage | None = made.get(id(storage))
    if found is not None:
        return found
    if not storage.nbytes:
        found = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    else:
        try:
            (extent, *more) = checkpoint.container.extents(storage, 0, storage.nbytes)
        except UnsupportedError:
            extent, more = None, []
        if extent is None or more or extent.offset % _ALIGNMENT:
            copied = bytearray(checkpoint.container.view(storage, 0, storage.nbytes))
            found = torch.frombuffer(copied, dtype=torch.uint8).untyped_storage()
        else:
            whole = _mapped(checkpoint, extent.file, made)
            found = whole[extent.offset : extent.offset + storage.nbytes]
    made[id(storage)] = found
    return found


_ALIGNMENT = 8
"""Bytes: what the widest number, a float64, needs."""


def _mapped(checkpoint: Checkpoint, number: int, made: dict[object, Any]) -> torch.UntypedStorage:
    """A whole file, mapped copy on write."""
    import torch

    found: Any = made.get(("file", number))
    if found is None:
        file = checkpoint.container.files[number]
        found = made["file", number] = torch.UntypedStorage.from_file(file.path, shared=False, nbytes=file.size)
    whole: torch.UntypedStorage = found
    return whole


def _swapped(checkpoint: Checkpoint, tensor: Tensor) -> torch.Tensor:
    """A copy of a big-endian tensor in this machine's byte order."""
    import torch

    from ckpt_cli.arrays.codec import Codec, require_bounded, stored_of
    from ckpt_cli.arrays.regions import Region

    require_bounded(tensor, Region.of(tensor))
    stored = stored_of(checkpoint, tensor, Codec(tensor), Region.of(tensor))
    swapped = bytearray(stored.astype(stored.dtype.newbyteorder("<")).tobytes())
    dtype = getattr(torch, tensor.dtype.name)
    value = torch.frombuffer(swapped, dtype=dtype) if swapped else torch.empty(0, dtype=dtype)
    return value.reshape(tensor.shape or ())
