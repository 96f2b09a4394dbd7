"""The rebuild calls of tensors that are no plain views: quantized, sparse, nested, meta and uninitialized ones.

Sources: torch/_utils.py, torch/_tensor.py (`_reduce_ex_internal`), torch/nn/parameter.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.model import Tensor, contiguous_stride
from ckpt_cli.pickles.arguments import dtype_of, geometry, sizes, text_of, wrong
from ckpt_cli.pickles.graph import Call, Global

if TYPE_CHECKING:
    from ckpt_cli.pickles.rebuild import Rebuild, Rebuilder


def _quantized(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, quantizer, requires_grad, _hooks = args
    parts: tuple[Tensor, ...] = ()
    if len(quantizer) == 4 and not isinstance(quantizer[1], list):  # per channel: (scheme, scales, zero_points, axis)
        roles = zip(("scales", "zero_points"), quantizer[1:3], strict=True)
        parts = tuple(r.inner(role, node) for role, node in roles)
    whole = r.strided(name, storage, offset, size, stride, requires_grad, None)
    return replace(whole, layout="quantized", parts=parts)


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
        raise wrong(name, f"{layout!r} is no sparse layout")
    parts = tuple(r.inner(role, node) for role, node in zip(roles, data, strict=False))
    shape = sizes(name, data[len(roles)])
    return Tensor(name, parts[-1].dtype, shape, contiguous_stride(shape), layout=layout, parts=parts)


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


LAYOUTS: dict[tuple[str, str], Rebuild] = {
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    ("torch.nn.parameter", "UninitializedParameter"): _uninitialized,
    ("torch.nn.parameter", "UninitializedBuffer"): _uninitialized,
}
"""The calls of this module, by the module and name of what is called."""
