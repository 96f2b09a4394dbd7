"""The rebuild calls of tensors that are not plain views: quantized, sparse, nested, meta and uninitialized ones.

Sources: torch/_utils.py, torch/_tensor.py (`_reduce_ex_internal`), torch/nn/parameter.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.model.checkpoint import Quantizer, Tensor, contiguous_stride
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global
from ckpt_cli.pickles.tensors.arguments import COUNT_END, dtype_of, geometry, sizes, text_of, wrong
from ckpt_cli.pickles.tensors.rebuild import Calls, Rebuilder


def _quantized(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, how, requires_grad, _hooks = args
    whole = r.strided(name, storage, offset, size, stride, requires_grad, None)
    scheme = how[0].name if isinstance(how[0], Global) else ""
    if whole.dtype.category != "quantized":
        raise wrong(name, f"its dtype {whole.dtype} is not that of a quantized tensor")
    if scheme == "per_tensor_affine":
        _scheme, scale, zero_point = how
        if type(scale) not in (int, float) or type(zero_point) is not int or abs(zero_point) >= COUNT_END:
            raise wrong(name, f"its scale is {describe(scale)} and its zero point {describe(zero_point)}")
        return replace(whole, layout="quantized", quantizer=Quantizer(scheme, float(scale), zero_point))
    if scheme not in ("per_channel_affine", "per_channel_affine_float_qparams"):
        raise wrong(name, "it is quantized in a way that torch does not write")
    return _by_channel(r, whole, scheme, *how[1:])


def _by_channel(r: Rebuilder, whole: Tensor, scheme: str, scales: Any, zeros: Any, axis: Any) -> Tensor:
    """A tensor of which each index of one dimension has its own scale; torch checks the lengths since 2.12."""
    channels = whole.shape[axis] if type(axis) is int and 0 <= axis < len(whole.shape or ()) and whole.shape else -1
    if isinstance(scales, list) and isinstance(zeros, list):  # as torch 1.3 wrote them
        r.pay(len(scales) + len(zeros))
        if not all(type(item) in (int, float) for item in (*scales, *zeros)):
            raise wrong(whole.name, "its scales and zero points are not numbers")
        lengths = (len(scales), len(zeros))
        listed = tuple(map(float, scales)), tuple(zeros)
        parts: tuple[Tensor, ...] = ()
    else:
        parts = (r.inner("scales", scales), r.inner("zero_points", zeros))
        lengths = (parts[0].numel, parts[1].numel)
        listed = (), ()
    if lengths != (channels, channels):
        raise wrong(whole.name, f"has {lengths[0]} scales and {lengths[1]} zero points for {max(channels, 0)} channels")
    if parts and parts[1].dtype.category == "float":  # torch 2.13 writes per_channel_affine for both
        scheme = "per_channel_affine_float_qparams"
    return replace(
        whole,
        layout="quantized",
        parts=parts,
        quantizer=Quantizer(scheme, axis=axis, scales=listed[0], zero_points=listed[1]),
    )


_SPARSE_PARTS = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}


def _sparse(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    layout_node, data = args
    layout = _layout(layout_node)
    roles = _SPARSE_PARTS.get(layout)
    if roles is None:
        raise wrong(name, f"{layout!r} is not a sparse layout")
    parts = tuple(r.inner(role, node) for role, node in zip(roles, data, strict=False))
    shape = sizes(name, data[len(roles)])
    said = data[3] if layout == "sparse_coo" and len(data) > 3 else None
    coalesced = said if isinstance(said, bool) else None
    stride = contiguous_stride(shape)
    return Tensor(name, parts[-1].dtype, shape, stride, layout=layout, parts=parts, coalesced=coalesced)


def _layout(node: object) -> str:
    """`sparse_coo` of a `torch.sparse_coo`, which is pickled as a call of `_get_layout` with its name."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and node.args:
        node = node.args[0]
    name = node.name if isinstance(node, Global) else text_of(node)
    return (name or "").removeprefix("torch.")


def _nested(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    parts = tuple(
        r.inner(role, node) for role, node in zip(("buffer", "sizes", "strides", "offsets"), args, strict=True)
    )
    return Tensor(name, parts[0].dtype, None, layout="nested", parts=parts)


def _meta(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    dtype, size, stride, requires_grad = args
    shape, steps = geometry(name, size, stride)
    return Tensor(name, dtype_of(name, dtype), shape, steps, requires_grad=requires_grad is True, layout="meta")


def _uninitialized(r: Rebuilder, name: str, args: tuple[Any, ...], node: Call) -> Tensor:
    kind = "buffer" if isinstance(node.func, Global) and node.func.name.endswith("Buffer") else "parameter"
    return Tensor(name, BY_NAME["float32"], None, kind=kind, requires_grad=args[:1] == (True,), layout="uninitialized")


LAYOUTS: Calls = {
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    ("torch.nn.parameter", "UninitializedParameter"): _uninitialized,
    ("torch.nn.parameter", "UninitializedBuffer"): _uninitialized,
}
"""The calls of this module, by the module and name of what is called."""
