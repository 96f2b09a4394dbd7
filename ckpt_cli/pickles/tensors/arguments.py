"""The arguments of rebuild calls: shapes, strides, dtypes and text, checked to be as torch writes them."""

from __future__ import annotations

from math import prod

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_STORAGE, UINT8, DType
from ckpt_cli.errors import MalformedError
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, RawString

COUNT_END = 1 << 63
"""The bound of sizes, strides and offsets: torch has them in 64 bits with a sign."""


def text_of(node: object) -> str | None:
    """A str node, new or of Python 2, as text."""
    if isinstance(node, str):
        return str(node)  # a Letter too
    return node.text if isinstance(node, RawString) else None


def storage_dtype(kind: Global) -> DType:
    """The dtype of a storage class: torch maps any class named `<X>Storage`, whatever its module."""
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return UINT8
    dtype = BY_STORAGE.get(kind.name.removesuffix("Storage"))
    if dtype is None or not kind.name.endswith("Storage"):
        raise MalformedError(f"{kind.qualified!r} is not a storage class of torch")
    return dtype


def geometry(name: str, size: object, stride: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a shape, and a stride of as many dimensions; raises MalformedError for anything else."""
    shape, steps = counts(name, size), counts(name, stride)
    if len(shape) != len(steps):
        raise wrong(name, f"its shape {shape} and its stride {steps} have different lengths")
    _require_countable(name, shape)
    return shape, steps


def sizes(name: str, node: object) -> tuple[int, ...]:
    """Return a shape; raises MalformedError for anything else."""
    shape = counts(name, node)
    _require_countable(name, shape)
    return shape


def _require_countable(name: str, shape: tuple[int, ...]) -> None:
    """Refuse a shape whose elements torch cannot count, were there no empty dimension."""
    if (prod(shape) or prod(size or 1 for size in shape)) >= COUNT_END:
        raise wrong(name, f"its shape {shape} has more elements than 64 bits can count")


def counts(name: str, node: object) -> tuple[int, ...]:
    """Return a shape or stride: a tuple, list or torch.Size of integers from 0; raises MalformedError otherwise."""
    if type(node) is not tuple:
        if type(node) is Call and type(node.args) is tuple and len(node.args) == 1:
            node = node.args[0]
        if type(node) is list:
            node = tuple(node)
    if type(node) is not tuple or len(node) > limits.DIMENSIONS:
        raise wrong(name, "its shape or stride is not a tuple of integers")
    for item in node:
        if type(item) is not int or not 0 <= item < COUNT_END:
            raise wrong(name, f"its shape or stride holds {describe(item)}")
    return node


def is_count(node: object) -> bool:
    """True if a node is a number of things."""
    return type(node) is int and 0 <= node < COUNT_END


def odd_storage() -> MalformedError:
    """Return the error for a persistent id that is not one of torch's."""
    return MalformedError("the pickle refers to a storage in a way that torch does not write")


def wrong(name: str, problem: str) -> MalformedError:
    """Return the error for a tensor, with its name."""
    return MalformedError(f"tensor {describe(name)}{' ' if problem.startswith('needs') else ': '}{problem}")


def flags_of(name: str, meta: object) -> set[str]:
    """The keys of `_rebuild_tensor_v2`'s metadata; torch does not look at the values."""
    if not isinstance(meta, Dict):
        return set()
    if len(meta.pairs) > 16:  # torch writes two at most; a long dict could be shared by every tensor
        raise wrong(name, f"has {len(meta.pairs) // 2} flags")
    return {key for key in meta.pairs[::2] if isinstance(key, str)}


def dtype_of(name: str, node: object) -> DType:
    """A dtype, which is pickled as a global of torch."""
    dtype = BY_NAME.get(node.name) if isinstance(node, Global) and node.module == "torch" else None
    if dtype is None:
        raise wrong(name, "its dtype is not one of torch's")
    return dtype
