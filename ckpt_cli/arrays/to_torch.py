"""Torch tensors of layouts other than strided, made of their parts over the file's own bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt_cli import limits
from ckpt_cli.arrays.quantized import parameters
from ckpt_cli.arrays.sparse_and_nested import check_sparse, constituents, count_constituents
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor

if TYPE_CHECKING:
    import torch


_Part = Callable[[Tensor], "torch.Tensor"]
"""Makes the torch tensor of a part."""


def quantized(
    checkpoint: Checkpoint, tensor: Tensor, storage: torch.UntypedStorage, dtype: torch.dtype
) -> torch.Tensor:
    """A quantized tensor over a storage, as torch/_utils.py `_rebuild_qtensor` makes it."""
    import torch

    quantizer = tensor.quantizer
    if quantizer is None or (tensor.big_endian and tensor.dtype.bits > 8):
        raise UnsupportedError(f"tensor {tensor.name!r} is quantized in a way that cannot be made without torch.load")
    shape = tensor.shape or ()
    if quantizer.axis is None:
        made = torch._empty_affine_quantized(
            shape, scale=quantizer.scale, zero_point=quantizer.zero_point, dtype=dtype, device="cpu"
        )
    else:
        is_float = quantizer.scheme.endswith("float_qparams")
        scales, zeros = (torch.tensor(values.tolist()) for values in parameters(checkpoint, tensor))
        made = torch._empty_per_channel_affine_quantized(
            shape,
            scales=scales.to(torch.float32 if is_float else torch.float64),
            zero_points=zeros.to(torch.float32 if is_float else torch.int64),
            axis=quantizer.axis,
            dtype=dtype,
            device="cpu",
        )
    typed: Any = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]  # as torch has it
    return made.set_(typed, tensor.storage_offset, shape, tensor.stride)


def composed(checkpoint: Checkpoint, tensor: Tensor, part: _Part, made_before: dict[object, Any]) -> torch.Tensor:
    """A sparse, nested, jagged or uninitialized tensor; raises UnsupportedError for other layouts.

    `made_before` is what `torch_tensor` keeps; here it counts constituents, so that hostile ones cannot multiply.
    """
    make = _MAKERS.get("sparse" if tensor.layout.startswith("sparse") else tensor.layout)
    if make is None:
        raise UnsupportedError(
            f"tensor {tensor.name!r} is {_what(tensor)}, which cannot be made without torch.load",
            hint=f"its parts can: .parts[{tensor.parts[0].name!r}]" if tensor.parts else None,
        )
    if tensor.layout in ("nested", "jagged"):
        count = made_before["constituents"] = made_before.get("constituents", 0) + count_constituents(tensor)
        if count > limits.CONSTITUENTS:
            raise LimitError("its nested tensors have too many constituents to go through")
    with warnings.catch_warnings():  # torch warns each user once that sparse and nested tensors are in beta
        warnings.simplefilter("ignore")
        try:
            made: torch.Tensor = make(checkpoint, tensor, part)
        except (RuntimeError, ValueError, IndexError) as error:
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MalformedError(f"torch does not take the parts of tensor {tensor.name!r}: {problem}") from None
    return made


def _what(tensor: Tensor) -> str:
    return f"a {tensor.python_type}" if tensor.python_type else tensor.layout


def _sparse(_: Checkpoint, tensor: Tensor, part: _Part) -> torch.Tensor:
    import torch

    check_sparse(tensor)
    shape = tensor.shape or ()
    first, second, *more = (part(inner) for inner in tensor.parts[: 2 if tensor.layout == "sparse_coo" else 3])
    if not more:
        return torch.sparse_coo_tensor(first, second, shape, check_invariants=True, is_coalesced=tensor.coalesced)
    layout = getattr(torch, tensor.layout)
    return torch.sparse_compressed_tensor(first, second, more[0], shape, layout=layout, check_invariants=True)


def _nested(checkpoint: Checkpoint, tensor: Tensor, part: _Part) -> torch.Tensor:
    import torch

    for _constituent in constituents(checkpoint, tensor):  # each is checked to lie in the buffer: torch does not
        pass
    made: torch.Tensor = torch._nested_view_from_buffer(*map(part, tensor.parts[:4]))
    return made


def _jagged(checkpoint: Checkpoint, tensor: Tensor, part: _Part) -> torch.Tensor:
    import torch

    for _constituent in constituents(checkpoint, tensor):
        pass
    values, offsets, lengths = (tensor.part(role) for role in ("values", "offsets", "lengths"))
    if values is None or offsets is None:
        raise UnsupportedError(f"tensor {tensor.name!r} has no offsets in the file")
    made: torch.Tensor = torch.nested.nested_tensor_from_jagged(
        part(values), part(offsets), None if lengths is None else part(lengths), jagged_dim=tensor.ragged_dim
    )
    return made


def _uninitialized(_: Checkpoint, tensor: Tensor, _part: _Part) -> Any:
    from torch import nn

    made = nn.UninitializedBuffer if tensor.kind == "buffer" else nn.UninitializedParameter
    return made(requires_grad=tensor.requires_grad)


_MAKERS: dict[str, Callable[[Checkpoint, Tensor, _Part], Any]] = {
    "sparse": _sparse,
    "nested": _nested,
    "jagged": _jagged,
    "uninitialized": _uninitialized,
}


def torch_tensor(checkpoint: Checkpoint, tensor: Tensor, made: dict[object, Any]) -> torch.Tensor:
    """A torch tensor with the same dtype, shape, stride and storage offset.

    `made` keeps what was made for this checkpoint, so that ties stay ties: mapped files, storages, and
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
        value = composed(checkpoint, tensor, lambda part: torch_tensor(checkpoint, part, made).detach(), made)
        return value if tensor.layout == "uninitialized" else _as_kind(value, tensor)
    if dtype is None:
        raise UnsupportedError(f"torch has no dtype for tensor {tensor.name!r}, which is {tensor.dtype}")
    if tensor.layout == "quantized":
        return _as_kind(quantized(checkpoint, tensor, _storage(tensor.storage, made), dtype), tensor)
    if tensor.big_endian:
        return _as_kind(_swapped(tensor), tensor)
    storage = _storage(tensor.storage, made)
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


def _storage(storage: Storage, made: dict[object, Any]) -> torch.UntypedStorage:
    """Return the storage over a private mapping of the file, or a copy where that cannot be: misaligned, elsewhere."""
    import torch

    found: torch.UntypedStorage | None = made.get(storage)
    if found is not None:
        return found
    if not storage.nbytes:
        found = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    else:
        try:
            (extent, *more) = storage.extents(0, storage.nbytes)
        except UnsupportedError:
            extent, more = None, []
        if extent is None or more or extent.offset % _ALIGNMENT or extent.file.fd < 0:
            copied = _copied(storage) if extent is None or more else _read(extent)
            found = torch.frombuffer(copied, dtype=torch.uint8).untyped_storage()
        else:
            whole = _mapped(extent.file, made)
            found = whole[extent.offset : extent.offset + storage.nbytes]
    made[storage] = found
    return found


def _copied(storage: Storage) -> bytearray:
    return bytearray(storage.view(0, storage.nbytes))


def _read(extent: Extent) -> bytearray:
    """Return a copy of the bytes that are stored unencoded, also from a file that cannot be mapped."""
    copied = bytearray(extent.nbytes)
    extent.file.read_into(memoryview(copied), extent.offset)
    return copied


_ALIGNMENT = 8
"""Bytes: what the widest number, a float64, needs."""


def _mapped(file: SourceFile, made: dict[object, Any]) -> torch.UntypedStorage:
    """A whole file, mapped copy on write."""
    import torch

    found: Any = made.get(file)
    if found is None:
        found = made[file] = torch.UntypedStorage.from_file(file.path, shared=False, nbytes=file.size)
    whole: torch.UntypedStorage = found
    return whole


def _swapped(tensor: Tensor) -> torch.Tensor:
    """A copy of a big-endian tensor in this machine's byte order."""
    import torch

    from ckpt_cli.arrays.codec import Codec, stored_of
    from ckpt_cli.arrays.indexing import Region
    from ckpt_cli.budget import require_bounded

    require_bounded(tensor, Region.of(tensor))
    stored = stored_of(tensor, Codec(tensor), Region.of(tensor))
    swapped = bytearray(stored.astype(stored.dtype.newbyteorder("<")).tobytes())
    dtype = getattr(torch, tensor.dtype.name)
    value = torch.frombuffer(swapped, dtype=dtype) if swapped else torch.empty(0, dtype=dtype)
    return value.reshape(tensor.shape or ())
