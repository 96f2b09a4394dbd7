"""The vocabulary of torch's rebuild calls: from a call in the graph to the facts of a tensor.

Sources: torch/_utils.py, torch/_tensor.py (`__reduce_ex__`), torch/nn/parameter.py, torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, BY_STORAGE, UINT8, DType
from ckpt_cli.errors import MalformedError
from ckpt_cli.model import Storage, Tensor, contiguous_stride
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, RawString


class StorageFinder(Protocol):
    """What a format tells about the storages that a pickle refers to."""

    big_endian: bool
    """Whether typed storages were written on a big-endian machine."""

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage called `key`, one object a key; raises FormatError where its bytes are missing or too few."""


class Rebuilder:
    """Turns calls of one pickle into tensors."""

    def __init__(self, finder: StorageFinder) -> None:
        self._finder = finder
        self._storages: dict[int, tuple[Storage, DType]] = {}
        """What each persistent id node resolved to."""
        self._dtypes: dict[str, DType] = {}
        """The dtype by which each storage is known."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a call would make, or None when it makes something else."""
        if type(node) is not Call:
            return None
        func = node.func
        if type(func) is not Global:
            return None
        rebuild = _REBUILD.get((func.module, func.name))
        if rebuild is None:
            return None
        args = node.args
        if type(args) is not tuple:
            raise _wrong(name, "its rebuild call has no arguments")
        try:
            return rebuild(self, name, args, node)
        except (TypeError, ValueError):  # too few or too many arguments, or not the kind that torch writes
            raise _wrong(name, f"{func.qualified} has arguments that it does not take") from None

    def storage(self, node: object) -> tuple[Storage, DType]:
        """The storage that a persistent id refers to, and the dtype of its class (uint8 for untyped ones)."""
        found = self._storages.get(id(node))
        if found is None:
            found = self._storages[id(node)] = self._resolve(node)
        return found

    def _resolve(self, node: object) -> tuple[Storage, DType]:
        pid = node.pid if isinstance(node, PersistentId) else None
        if not isinstance(pid, tuple) or len(pid) < 5 or text_of(pid[0]) != "storage":
            raise MalformedError("the pickle refers to a storage in a way that torch does not write")
        kind, key, location, numel = pid[1], text_of(pid[2]), text_of(pid[3]), pid[4]
        if not isinstance(kind, Global) or key is None or location is None or not _is_count(numel):
            raise MalformedError("the pickle refers to a storage in a way that torch does not write")
        dtype = storage_dtype(kind)
        if self._dtypes.setdefault(key, dtype) is not dtype:
            raise MalformedError(f"storage {key!r} is {self._dtypes[key]} in one place and {dtype} in another")
        return self._finder.find(key, numel * max(dtype.bits // 8, 1), location), dtype

    def strided(
        self,
        name: str,
        storage_node: object,
        offset: Any,
        size: object,
        stride: object,
        requires_grad: object = False,
        dtype: DType | None = None,
        meta: object = None,
    ) -> Tensor:
        """A view of a storage, checked to lie inside it; `dtype` is given for untyped storages only."""
        storage, storage_type = self.storage(storage_node)
        typed = dtype is None
        dtype = dtype or storage_type
        shape, steps = counts(name, size), counts(name, stride)
        if not _is_count(offset) or len(shape) != len(steps):
            raise _wrong(name, f"shape {list(shape)}, stride {list(steps)} and offset {offset!r} do not fit together")
        flags = _flags(meta)
        tensor = Tensor(
            name,
            dtype,
            shape,
            steps,
            storage,
            offset,
            requires_grad=requires_grad is True,
            conj="conj" in flags,
            neg="neg" in flags,
            big_endian=typed and self._finder.big_endian and dtype.bits > 8,
        )
        begin, end = tensor.span
        if end > storage.nbytes:
            raise _wrong(name, f"needs bytes {begin}–{end}, storage {storage.key!r} has {storage.nbytes}")
        return tensor


_Rebuild = Callable[[Rebuilder, str, "tuple[Any, ...]", Call], Tensor]


def text_of(node: object) -> str | None:
    """A str node, new or of Python 2, as text."""
    if isinstance(node, str):
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


def counts(name: str, node: object) -> tuple[int, ...]:
    """A shape or stride: a tuple, list or torch.Size of integers from 0."""
    if type(node) is Call and type(node.args) is tuple and len(node.args) == 1:
        node = node.args[0]
    if type(node) is list:
        node = tuple(node)
    if type(node) is not tuple or len(node) > limits.DIMENSIONS:
        raise _wrong(name, "its shape or stride is no tuple of integers")
    for item in node:
        if type(item) is not int or not 0 <= item < 1 << 63:
            raise _wrong(name, f"its shape or stride holds {item if type(item) is int else type(item).__name__}")
    return node


def _is_count(node: object) -> bool:
    return type(node) is int and 0 <= node < 1 << 63


def _wrong(name: str, problem: str) -> MalformedError:
    return MalformedError(
        f"tensor {name!r}: {problem}" if not problem.startswith("needs") else f"tensor {name!r} {problem}"
    )


def _flags(meta: object) -> set[str]:
    """The keys of `_rebuild_tensor_v2`'s metadata that are true."""
    if not isinstance(meta, Dict):
        return set()
    pairs = zip(meta.pairs[::2], meta.pairs[1::2], strict=True)
    return {key for key, value in pairs if isinstance(key, str) and value is True}


def _dtype(name: str, node: object) -> DType:
    dtype = BY_NAME.get(node.name) if isinstance(node, Global) and node.module == "torch" else None
    if dtype is None:
        raise _wrong(name, "its dtype is none of torch's")
    return dtype


# --- one function a call; each takes the call's arguments as torch writes them ----------------------------------------


def _tensor_v1(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride = args
    return r.strided(name, storage, offset, size, stride)


def _tensor_v2(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, requires_grad, _hooks, *meta = args
    return r.strided(name, storage, offset, size, stride, requires_grad, meta=meta[0] if meta else None)


def _tensor_v3(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, requires_grad, _hooks, dtype, *meta = args
    of = _dtype(name, dtype)
    return r.strided(name, storage, offset, size, stride, requires_grad, of, meta[0] if meta else None)


def _parameter(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, requires_grad, *_more = args
    return replace(_inner(r, name, data), kind="parameter", requires_grad=requires_grad is True)


def _inner(r: Rebuilder, name: str, node: object) -> Tensor:
    tensor = r.tensor(name, node)
    if tensor is None:
        raise _wrong(name, "it wraps something that is no tensor")
    return tensor


def _quantized(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride, quantizer, requires_grad, _hooks = args
    scheme = quantizer[0]
    parts: tuple[Tensor, ...] = ()
    if isinstance(scheme, Global) and scheme.name.startswith("per_channel"):
        parts = tuple(
            _inner(r, part, node) for part, node in zip(("scales", "zero_points"), quantizer[1:3], strict=True)
        )
    whole = r.strided(name, storage, offset, size, stride, requires_grad)
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
    shape = counts(name, data[len(roles)])
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
    shape, steps = counts(name, size), counts(name, stride)
    return Tensor(name, _dtype(name, dtype), shape, steps, requires_grad=requires_grad is True, layout="meta")


def _from_numpy(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, dtype, _device, requires_grad = args
    state = data.states[0] if isinstance(data, Call) and data.states else None
    shape = counts(name, state[1]) if isinstance(state, tuple) else None  # ndarray.__setstate__: (version, shape, …)
    return Tensor(name, _dtype(name, dtype), shape, requires_grad=requires_grad is True, layout="array")


def _from_cpu(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, _dtype_node, _device, requires_grad = args
    return replace(_inner(r, name, data), requires_grad=requires_grad is True)


def _wrapper(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    kind, dtype, size, stride, _offset, _layout_node, _device, requires_grad = args
    return Tensor(
        name,
        _dtype(name, dtype),
        counts(name, size),
        counts(name, stride),
        requires_grad=requires_grad is True,
        layout="wrapper",
        python_type=kind.qualified if isinstance(kind, Global) else None,
    )


def _from_type(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    func, kind, func_args, state = args
    tensor = _inner(r, name, Call("reduce", func, func_args))
    kind_name = kind.name if isinstance(kind, Global) else None
    if kind_name == "Buffer":
        return replace(tensor, kind="buffer")
    if kind_name == "Parameter":
        return replace(tensor, kind="parameter")
    if kind_name != "Tensor" and isinstance(kind, Global):
        tensor = replace(tensor, python_type=kind.qualified)
    if tensor.layout == "wrapper" and isinstance(state, Dict):
        tensor = replace(tensor, parts=tuple(_parts_of(r, state)))
    return tensor


def _parts_of(r: Rebuilder, state: Dict) -> list[Tensor]:
    """The tensors among the attributes of a wrapper subclass."""
    found = []
    for key, node in zip(state.pairs[::2], state.pairs[1::2], strict=True):
        part = r.tensor(text_of(key) or "", node)
        if part is not None:
            found.append(part)
    return found


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
    storage, offset, size, stride = state
    return r.strided(name, storage, offset, size, stride)


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
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "UninitializedParameter"): _uninitialized,
    ("torch.nn.parameter", "UninitializedBuffer"): _uninitialized,
    ("torch", "Tensor"): _set_state,
    ("torch._tensor", "Tensor"): _set_state,
    ("torch.tensor", "_rebuild_from_type"): _from_type,
    ("torch.tensor", "Tensor"): _set_state,
}
