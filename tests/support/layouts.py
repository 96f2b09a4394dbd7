"""Tensors of every layout as torch makes and saves them, and checkpoints with tensors that a class wraps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders.pickles import Ops, call, named, tensor
from torch import nn


class Named(torch.Tensor):
    """A subclass that keeps its data as torch keeps it."""


def quantized(dtype: torch.dtype = torch.quint8, *shape: int, scale: float = 0.1, zero: int = 10) -> torch.Tensor:
    values = torch.linspace(-3, 7, max(int(np.prod(shape)), 1))[: int(np.prod(shape))].reshape(shape)
    return torch.quantize_per_tensor(values, scale, zero, dtype)


def by_channel(dtype: torch.dtype, axis: int, zeros: torch.dtype = torch.int64) -> torch.Tensor:
    values = torch.linspace(-3, 7, 24).reshape(4, 6)
    count = values.shape[axis]
    scales = torch.linspace(0.05, 0.4, count)
    return torch.quantize_per_channel(values, scales, torch.arange(count).to(zeros), axis, dtype)


def sparse(layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    dense = (torch.arange(24).reshape(4, 6) % 5 - 2).to(torch.float32)
    made = {
        "coo": dense.to_sparse,
        "rows": lambda: dense.to_sparse(1),
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 3)),
        "bsc": lambda: dense.to_sparse_bsc((2, 3)),
    }[layout]()
    return made.to(dtype)


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3), torch.ones(3, 3)], layout=torch.jagged)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    **{f"quantized {dtype}": lambda dtype=dtype: quantized(dtype, 2, 3) for dtype in (torch.quint8, torch.qint8)},
    "quantized qint32": lambda: quantized(torch.qint32, 3, 4, scale=1e-3, zero=-7),
    "quantized and strided": lambda: quantized(torch.qint8, 4, 6).t(),
    "quantized, large": lambda: quantized(torch.quint8, 40, 50),
    "quantized, empty": lambda: quantized(torch.quint8, 0, 3),
    "quantized, a scalar": lambda: quantized(torch.quint8)[()],
    "by channel": lambda: by_channel(torch.qint8, 0),
    "by the other channel": lambda: by_channel(torch.quint8, 1),
    "by channel of floats": lambda: by_channel(torch.quint8, 0, torch.float32),
    "four bits": lambda: by_channel(torch.quint4x2, 0, torch.float32),
    "two bits": lambda: by_channel(torch.quint2x4, 0, torch.float32),
    **{f"sparse {layout}": lambda layout=layout: sparse(layout)
       for layout in ("coo", "rows", "csr", "csc", "bsr", "bsc")},
    **{f"coo {dtype}": lambda dtype=dtype: sparse("coo", dtype)
       for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.complex64, torch.bool)},
    "csr of doubles": lambda: sparse("csr", torch.float64),
    "coo, empty": lambda: torch.zeros(3, 4).to_sparse(),
    "csr, empty": lambda: torch.zeros(3, 4).to_sparse_csr(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor([[1, 1, 0], [2, 2, 0]], [1.0, 2.0, 3.0], (2, 3)),
    "coo, large": lambda: torch.eye(1200).to_sparse(),
    "csr, a batch": lambda: torch.stack([torch.eye(3), 2 * torch.eye(3)]).to_sparse_csr(),
    "coo, a parameter": lambda: nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)]),
    "nested of doubles": lambda: torch.nested.nested_tensor([torch.ones(2).double(), torch.arange(30.0).double()]),
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "meta of halves": lambda: torch.empty(2, 3, device="meta", dtype=torch.float16),
    "meta, a parameter": lambda: nn.Parameter(torch.empty(2, 3, device="meta")),
    "uninitialized": lambda: nn.UninitializedParameter(),
    "uninitialized buffer": lambda: nn.UninitializedBuffer(),
    "a subclass": lambda: torch.arange(30.0).reshape(3, 10).as_subclass(Named),
    "a frozen parameter of a subclass": lambda: nn.Parameter(torch.ones(2).as_subclass(Named), requires_grad=False),
}  # fmt: skip


def saved(folder: Path, **state: Any) -> str:
    path = str(folder / "m.pt")
    torch.save(state, path)
    return path


def elements(made: torch.Tensor) -> torch.Tensor:
    """Something that can be compared by `torch.equal`."""
    if isinstance(made, Named):
        made = made.as_subclass(torch.Tensor)
    if made.is_quantized:
        made = made.dequantize()
    if made.layout == torch.sparse_coo:
        made = made.coalesce()
    return made.detach().to_dense() if made.layout != torch.strided else made.detach()


def wrapper(kind: str, parts: dict[str, Ops], shape: tuple[int, ...], dtype: str = "bfloat16") -> Ops:
    """A tensor subclass without data of its own, as torch/_tensor.py pickles it; torchao's are such."""
    made = named(kind)
    layout = call("torch.serialization._get_layout", "torch.strided")
    stride = tuple(int(np.prod(shape[at + 1 :])) for at in range(len(shape)))
    args = (made, named(f"torch.{dtype}"), shape, stride, 0, layout, call("torch.device", "cpu"), False)
    func = named("torch._utils._rebuild_wrapper_subclass")
    return call("torch._tensor._rebuild_from_type_v2", func, made, args, {**parts, "block_size": (1, 2)})


ROW = tensor("v", (2,))
