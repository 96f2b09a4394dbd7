"""The rebuild calls of tensors of subclasses, and of tensors with attributes.

Sources: torch/_tensor.py (`_rebuild_from_type_v2`, `__reduce_ex__`), torch/_utils.py (`_rebuild_wrapper_subclass`),
torch/nested/_internal/nested_tensor.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global
from ckpt_cli.pickles.tensors.arguments import dtype_of, geometry, wrong
from ckpt_cli.pickles.tensors.distributed import sharded, sharding_of
from ckpt_cli.pickles.tensors.rebuild import Calls, Rebuilder


def _wrapper(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    kind, dtype, size, stride, _offset, _layout_node, _device, requires_grad = args
    shape, steps = geometry(name, size, stride)
    return Tensor(
        name,
        dtype_of(name, dtype),
        shape,
        steps,
        requires_grad=requires_grad is True,
        layout="wrapper",
        python_type=kind.qualified if isinstance(kind, Global) else None,
    )


def _jagged(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    """A nested tensor of the jagged layout, from the keywords of its class."""
    keywords = dict(r.attributes(args[0]))
    parts = [r.part(role, keywords.get(role)) for role in ("values", "offsets", "lengths")]
    found = tuple(part for part in parts if part is not None)
    if parts[0] is None:
        return None
    ragged = keywords.get("_ragged_idx", 1)
    if type(ragged) is not int or not 1 <= ragged <= len(parts[0].shape or ()):
        raise wrong(name, f"its ragged dimension is {describe(ragged)}")
    requires_grad = keywords.get("requires_grad") is True
    return Tensor(name, found[0].dtype, None, requires_grad=requires_grad, layout="jagged", parts=found,
                  ragged_dim=ragged)  # fmt: skip


def _from_type(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    """A tensor of another class, or with attributes; subclasses of parameters and buffers are known by these."""
    func, kind, func_args, state = args
    tensor = r.part(name, Call("reduce", func, func_args))
    if tensor is None:
        return None
    flags = {key for key, value in r.attributes(state) if value is True}
    qualified = kind.qualified if isinstance(kind, Global) else None
    if "_is_buffer" in flags or qualified == "torch.nn.parameter.Buffer":
        tensor = replace(tensor, kind="buffer")
    elif "_is_param" in flags or qualified == "torch.nn.parameter.Parameter":
        tensor = replace(tensor, kind="parameter")
    if qualified not in _OWN_TYPES:
        tensor = replace(tensor, python_type=qualified)
    if tensor.layout == "jagged":  # whose attributes are what its call has had
        return tensor
    if type(state) is tuple and state and isinstance(state[0], list):
        return sharded(r, tensor, state[0])
    return with_attributes(r, tensor, state)


def with_attributes(r: Rebuilder, tensor: Tensor, state: object) -> Tensor:
    """A tensor with those of its attributes that are tensors among its parts, and with what a DTensor says."""
    attributes = list(r.attributes(state))
    parts = [(key, node, r.part(key, node)) for key, node in attributes]
    found = tuple(part for key, _, part in parts if part is not None and key)
    spec = next((node for key, node in attributes if key == "_spec"), None)
    if tensor.layout == "wrapper" and spec is not None:
        tensor = replace(tensor, sharding=sharding_of(r, spec, tensor.shape or (), found))
    nested = tuple(inner for key, node, part in parts if part is None for inner in r.nested(key, node))
    return replace(tensor, parts=tensor.parts + found + nested) if found or nested else tensor


_OWN_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
"""The types of tensors that are of no subclass."""


SUBCLASSES: Calls = {
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _jagged,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.tensor", "_rebuild_from_type"): _from_type,
}
"""The calls of this module, by the module and name of what is called."""
