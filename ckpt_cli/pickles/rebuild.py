"""The vocabulary of torch's rebuild calls: from a call in the graph to the facts of a tensor.

Sources: torch/_utils.py, torch/_tensor.py (`__reduce_ex__`), torch/nn/parameter.py, torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_STORAGE, UINT8, DType
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.model import Storage, Tensor, contiguous_stride
from ckpt_cli.pickles.budget import Budget
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, RawString
from ckpt_cli.pickles.text import describe

_Rebuild = Callable[["Rebuilder", str, "tuple[Any, ...]", Call], "Tensor | None"]
"""Makes a tensor of a call's arguments; None where the call wraps something that is no tensor that we know."""

_COUNT_END = 1 << 63
"""What sizes, strides and offsets must stay below: torch has them in 64 bits with a sign."""


_PART_STEPS = 100
"""What making a part costs, in steps of the budget."""


class StorageFinder(Protocol):
    """What a format tells about the storages that a pickle refers to."""

    big_endian: bool
    """Whether typed storages were written on a big-endian machine."""

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage called `key`; raises FormatError where its bytes are missing or too few."""


class Rebuilder:
    """Turns calls of one pickle into tensors."""

    def __init__(self, finder: StorageFinder, budget: Budget) -> None:
        self._finder = finder
        self._budget = budget
        self._depth = 0
        """How many tensors the one that is being made is a part of."""
        self._storages: dict[str, tuple[Storage, DType]] = {}
        """What was found by each key, so that a storage is one object, with the dtype by which it is known."""
        self._calls: dict[Global, _Rebuild | None] = {}
        """The function in the table for each global that was called; nodes are hashed by identity."""
        self._kinds: dict[Global, tuple[DType, int]] = {}
        """The dtype of each storage class, and the bytes of one of its elements."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a call would make, or None when it makes something else."""
        if type(node) is not Call:
            return None
        rebuild = self.rebuild_of(node.func)
        if rebuild is None:
            return None
        if type(node.args) is not tuple:
            raise _wrong(name, "its rebuild call has no arguments")
        try:
            return rebuild(self, name, node.args, node)
        except (TypeError, ValueError, IndexError):  # too few or too many arguments, or not the kind that torch writes
            raise _wrong(name, f"{describe(node.func)} has arguments that it does not take") from None

    def part(self, name: str, node: object) -> Tensor | None:
        """The tensor that a call within another tensor's call would make, or None."""
        self._budget.steps(_PART_STEPS)
        if self._depth == limits.PARTS_WITHIN:
            raise LimitError(f"a tensor is made of tensors, and so on, more than {limits.PARTS_WITHIN} times")
        self._depth += 1
        try:
            return self.tensor(name, node)
        finally:
            self._depth -= 1

    def attributes(self, state: object) -> Iterator[tuple[str, object]]:
        """The attributes of a tensor, from its state: a dict, or a pair of that and its slots."""
        if type(state) is tuple and state:
            state = state[0]
        if not isinstance(state, Dict):
            return iter(())
        self._budget.steps(len(state.pairs))
        return zip((text_of(key) or "" for key in state.pairs[::2]), state.pairs[1::2], strict=True)

    def rebuild_of(self, func: object) -> _Rebuild | None:
        """The table's function for what a call calls."""
        if type(func) is not Global:
            return None
        try:
            return self._calls[func]
        except KeyError:
            rebuild = self._calls[func] = _REBUILD.get((func.module, func.name))
            return rebuild

    def storage(self, node: object) -> tuple[Storage, DType]:
        """The storage that a persistent id refers to, and the dtype of its class (uint8 for untyped ones)."""
        pid = node.pid if type(node) is PersistentId else None
        if type(pid) is not tuple or len(pid) < 5:
            raise _odd_storage()
        tag, kind, key, location, numel = pid[:5]
        if type(key) is not str or type(location) is not str:  # Python 2 wrote bytes
            tag, key, location = text_of(tag), text_of(key), text_of(location)
        if tag != "storage" or type(kind) is not Global or key is None or location is None or not _is_count(numel):
            raise _odd_storage()
        dtype, itemsize = self._kinds.get(kind) or self._kind(kind)
        nbytes = numel * itemsize
        found = self._storages.get(key)
        if found is None:
            found = self._storages[key] = self._finder.find(key, nbytes, location), dtype
        elif found[1] is not dtype:
            raise MalformedError(f"storage {key!r} is {found[1]} in one place and {dtype} in another")
        elif found[0].nbytes < nbytes:
            raise MalformedError(f"storage {key!r} has {found[0].nbytes} bytes in one place and {nbytes} in another")
        return found

    def _kind(self, kind: Global) -> tuple[DType, int]:
        dtype = storage_dtype(kind)
        found = self._kinds[kind] = dtype, max(dtype.bits // 8, 1)
        return found

    def strided(
        self,
        name: str,
        storage_node: object,
        offset: Any,
        size: object,
        stride: object,
        requires_grad: object,
        _hooks: object,
        meta: object = None,
        *,
        dtype: DType | None = None,
        kind: str = "tensor",
    ) -> Tensor:
        """A view of a storage, checked to lie inside it, from the arguments of `_rebuild_tensor_v2`.

        `dtype` is given for untyped storages only.
        """
        storage, storage_type = self.storage(storage_node)
        shape, steps = geometry(name, size, stride)
        if type(offset) is not int or not 0 <= offset < _COUNT_END:
            raise _wrong(name, f"its offset is {describe(offset)}")
        tensor = Tensor(name, dtype or storage_type, shape, steps, storage, offset, kind, requires_grad is True)
        if meta is not None or self._finder.big_endian:
            tensor = self._flagged(tensor, meta, typed=dtype is None)
        begin, end = tensor.span
        if end > storage.nbytes:
            raise _wrong(name, f"needs bytes {begin}–{end}, storage {storage.key!r} has {storage.nbytes}")
        return tensor

    def _flagged(self, tensor: Tensor, meta: object, *, typed: bool) -> Tensor:
        """The view with what is rarely said of one; of big-endian bytes, torch swaps those of typed storages only."""
        flags = _flags(tensor.name, meta)
        big_endian = typed and self._finder.big_endian and tensor.dtype.bits > 8
        return replace(tensor, conj="conj" in flags, neg="neg" in flags, big_endian=big_endian)


def text_of(node: object) -> str | None:
    """A str node, new or of Python 2, as text."""
    if type(node) is str:
        return node
    return node.text if isinstance(node, RawString) else None


def storage_dtype(kind: Global) -> DType:
    """The dtype of a storage class: torch maps any class named `<X>Storage`, whatever its module."""
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return UINT8
    dtype = BY_STORAGE.get(kind.name.removesuffix("Storage"))
    if dtype is None or not kind.name.endswith("Storage"):
        raise MalformedError(f"{kind.qualified!r} is no storage class of torch")
    return dtype


def geometry(name: str, size: object, stride: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape, and a stride of as many dimensions."""
    shape, steps = sizes(name, size), counts(name, stride)
    if len(shape) != len(steps):
        raise _wrong(name, f"its shape {shape} and its stride {steps} have different lengths")
    return shape, steps


def sizes(name: str, node: object) -> tuple[int, ...]:
    """A shape; torch refuses one whose elements it cannot count, were there no empty dimension."""
    shape = counts(name, node)
    if prod(size or 1 for size in shape) >= _COUNT_END:
        raise _wrong(name, f"its shape {shape} has more elements than 64 bits can count")
    return shape


def counts(name: str, node: object) -> tuple[int, ...]:
    """A shape or stride: a tuple, list or torch.Size of integers from 0."""
    if type(node) is Call and type(node.args) is tuple and len(node.args) == 1:
        node = node.args[0]
    if type(node) is list:
        node = tuple(node)
    if type(node) is not tuple or len(node) > limits.DIMENSIONS:
        raise _wrong(name, "its shape or stride is no tuple of integers")
    for item in node:
        if type(item) is not int or not 0 <= item < _COUNT_END:
            raise _wrong(name, f"its shape or stride holds {describe(item)}")
    return node


def _is_count(node: object) -> bool:
    return type(node) is int and 0 <= node < _COUNT_END


def _odd_storage() -> MalformedError:
    return MalformedError("the pickle refers to a storage in a way that torch does not write")


def _wrong(name: str, problem: str) -> MalformedError:
    return MalformedError(f"tensor {describe(name)}{' ' if problem.startswith('needs') else ': '}{problem}")


def _flags(name: str, meta: object) -> set[str]:
    """The keys of `_rebuild_tensor_v2`'s metadata; torch does not look at the values."""
    if not isinstance(meta, Dict):
        return set()
    if len(meta.pairs) > 16:  # torch writes two at most; a long dict could be shared by every tensor
        raise _wrong(name, f"has {len(meta.pairs) // 2} flags")
    return {key for key in meta.pairs[::2] if isinstance(key, str)}


def _dtype(name: str, node: object) -> DType:
    dtype = BY_NAME.get(node.name) if isinstance(node, Global) and node.module == "torch" else None
    if dtype is None:
        raise _wrong(name, "its dtype is none of torch's")
    return dtype


# --- one function a call; each takes the call's arguments as torch writes them ----------------------------------------


def _tensor_v1(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride = args
    return r.strided(name, storage, offset, size, stride, False, None)


def _tensor_v2(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    return r.strided(name, *args)


def _tensor_v3(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    as_v2 = (*args[:6], *args[7:])
    return r.strided(name, *as_v2, dtype=_dtype(name, args[6]))


def _parameter(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    data, requires_grad = args[:2]
    if type(data) is Call and type(data.args) is tuple and r.rebuild_of(data.func) is _tensor_v2:
        as_v2 = (*data.args[:4], requires_grad, *data.args[5:])  # nearly every parameter: made at once, not made over
        return r.strided(name, *as_v2, kind="parameter")
    tensor = r.part(name, data)
    return None if tensor is None else replace(tensor, kind="parameter", requires_grad=requires_grad is True)


def _inner(r: Rebuilder, name: str, node: object) -> Tensor:
    tensor = r.part(name, node)
    if tensor is None:
        raise _wrong(name, "it wraps something that is no tensor")
    return tensor


def _quantized(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, quantizer, requires_grad, _hooks = args
    parts: tuple[Tensor, ...] = ()
    if len(quantizer) == 4 and not isinstance(quantizer[1], list):  # per channel: (scheme, scales, zero_points, axis)
        roles = zip(("scales", "zero_points"), quantizer[1:3], strict=True)
        parts = tuple(_inner(r, role, node) for role, node in roles)
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
        raise _wrong(name, f"{layout!r} is no sparse layout")
    parts = tuple(_inner(r, role, node) for role, node in zip(roles, data, strict=False))
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
        _inner(r, role, node) for role, node in zip(("buffer", "sizes", "strides", "offsets"), args, strict=True)
    )
    return Tensor(name, parts[0].dtype, None, layout="nested", parts=parts)


def _meta(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    dtype, size, stride, requires_grad = args
    shape, steps = geometry(name, size, stride)
    return Tensor(name, _dtype(name, dtype), shape, steps, requires_grad=requires_grad is True, layout="meta")


def _from_numpy(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, dtype, _device, requires_grad = args
    state = data.states[0] if isinstance(data, Call) and data.states else None
    shape = sizes(name, state[1]) if isinstance(state, tuple) else None  # ndarray.__setstate__: (version, shape, …)
    steps = contiguous_stride(shape or ())
    return Tensor(name, _dtype(name, dtype), shape, steps, requires_grad=requires_grad is True, layout="array")


def _from_cpu(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, _dtype_node, _device, requires_grad = args
    return replace(_inner(r, name, data), requires_grad=requires_grad is True)


def _wrapper(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    kind, dtype, size, stride, _offset, _layout_node, _device, requires_grad = args
    shape, steps = geometry(name, size, stride)
    return Tensor(
        name,
        _dtype(name, dtype),
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
    if not found:
        return None
    return Tensor(name, found[0].dtype, None, requires_grad=keywords.get("requires_grad") is True, layout="nested",
                  parts=found)  # fmt: skip


def _from_type(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    """A tensor of another class, or with attributes; subclasses of parameters and buffers are known by these."""
    func, kind, func_args, state = args
    tensor = r.part(name, Call("reduce", func, func_args))
    if tensor is None:
        return None
    attributes = list(r.attributes(state))
    flags = {key for key, value in attributes if value is True}
    qualified = kind.qualified if isinstance(kind, Global) else None
    if "_is_buffer" in flags or qualified == "torch.nn.parameter.Buffer":
        tensor = replace(tensor, kind="buffer")
    elif "_is_param" in flags or qualified == "torch.nn.parameter.Parameter":
        tensor = replace(tensor, kind="parameter")
    if qualified not in _OWN_TYPES:
        tensor = replace(tensor, python_type=qualified)
    if tensor.layout == "wrapper":
        parts = (r.part(key, node) for key, node in attributes)
        tensor = replace(tensor, parts=tuple(part for part in parts if part is not None))
    return tensor


_OWN_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
"""What tensors are that are of no subclass."""


def _uninitialized(r: Rebuilder, name: str, args: tuple[Any, ...], node: Call) -> Tensor:
    kind = "buffer" if isinstance(node.func, Global) and node.func.name.endswith("Buffer") else "parameter"
    return Tensor(name, BY_NAME["float32"], None, kind=kind, requires_grad=args[:1] == (True,), layout="uninitialized")


def _set_state(r: Rebuilder, name: str, _: tuple[Any, ...], node: Call) -> Tensor:
    """`torch.Tensor()` whose state is (storage, offset, size, stride), or the 5-tuple of a Variable before 0.4."""
    if not node.states:
        return Tensor(name, BY_NAME["float32"], (0,), (1,))
    state: Any = node.states[-1]
    if len(state) == 5:
        return replace(_inner(r, name, state[0]), requires_grad=state[3] is True)
    return _tensor_v1(r, name, state, node)


_REBUILD: dict[tuple[str, str], _Rebuild] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _from_numpy,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _from_cpu,
    ("torch._utils", "_rebuild_xla_tensor"): _from_numpy,
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _jagged,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "UninitializedParameter"): _uninitialized,
    ("torch.nn.parameter", "UninitializedBuffer"): _uninitialized,
    ("torch", "Tensor"): _set_state,
    ("torch._tensor", "Tensor"): _set_state,
    ("torch.tensor", "_rebuild_from_type"): _from_type,
    ("torch.tensor", "Tensor"): _set_state,
}
