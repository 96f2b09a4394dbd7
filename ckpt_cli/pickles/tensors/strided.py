"""The rebuild calls of strided tensors, of parameters, and of arrays of numpy.

Each function takes the arguments of a call as torch or numpy writes them.
Sources: torch/_utils.py, torch/nn/parameter.py; of arrays, those that tensors/numpy.py names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.model.checkpoint import Tensor, contiguous_stride
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global, OutOfBand
from ckpt_cli.pickles.tensors.arguments import counts, dtype_of, sizes, text_of, wrong
from ckpt_cli.pickles.tensors.inline_bytes import buffer_of
from ckpt_cli.pickles.tensors.numpy import MULTIARRAY, NUMERIC, numpy_dtype
from ckpt_cli.pickles.tensors.rebuild import Calls, Rebuilder
from ckpt_cli.pickles.tensors.subclasses import with_attributes


def _tensor_v1(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride = args
    return r.strided(name, storage, offset, size, stride, False, None)


def _tensor_v2(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    return r.strided(name, *args)


def _tensor_v3(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    as_v2 = (*args[:6], *args[7:])
    return r.strided(name, *as_v2, dtype=dtype_of(name, args[6]))


def _parameter(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    data, requires_grad = args[:2]  # no copy of all: hostile arguments are many, and shared
    if type(data) is Call and type(data.args) is tuple and r.rebuild_of(data.func) is _tensor_v2:
        as_v2 = (*data.args[:4], requires_grad, *data.args[5:])  # nearly every parameter: made at once, not made over
        tensor: Tensor | None = r.strided(name, *as_v2, kind="parameter")
    elif (tensor := r.part(name, data)) is not None:
        tensor = replace(tensor, kind="parameter", requires_grad=requires_grad is True)
    if tensor is None or len(args) < 4:  # the hooks, and the state of a parameter that has attributes
        return tensor
    return with_attributes(r, tensor, args[3])


def _from_cpu(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, _dtype_node, _device, requires_grad = args
    return replace(r.inner(name, data), requires_grad=requires_grad is True)


def _set_state(r: Rebuilder, name: str, _: tuple[Any, ...], node: Call) -> Tensor:
    """`torch.Tensor()` whose state is (storage, offset, size, stride), or the 5-tuple of a Variable before 0.4."""
    if not node.states:
        return Tensor(name, BY_NAME["float32"], (0,), (1,))
    state: Any = node.states[-1]
    if len(state) == 5:
        return replace(r.inner(name, state[0]), requires_grad=state[3] is True)
    return _tensor_v1(r, name, state, node)


def _variable(r: Rebuilder, name: str, args: tuple[Any, ...], node: Call) -> Tensor:
    """A Variable or Parameter of before 0.4: its data, then whether it takes a gradient, as arguments or as state."""
    given: Any = args[1:2] or (node.states[-1] if node.states else ())
    kind = "parameter" if isinstance(node.func, Global) and node.func.name == "Parameter" else "tensor"
    return replace(r.inner(name, args[0]), kind=kind, requires_grad=given[:1] == (True,))


# --- arrays of numpy -------------------------------------------------------------------------------------------------


def _array(r: Rebuilder, name: str, args: tuple[Any, ...], node: Call) -> Tensor | None:
    """An array whose state is (version, shape, dtype, is_fortran, bytes); before numpy 1.0 there was no version."""
    state = node.states[-1] if node.states else None
    if type(state) is not tuple or len(state) not in (4, 5):
        return None
    shape, dtype, is_fortran, content = state[-4:]
    found = numpy_dtype(dtype)
    if found is None or found.dtype is None:
        return None
    size = sizes(name, shape)
    stride = contiguous_stride(size[::-1])[::-1] if is_fortran is True or is_fortran == 1 else contiguous_stride(size)
    kind = args[0].qualified if args and isinstance(args[0], Global) else "numpy.ndarray"
    return _over(r, Tensor(name, found.dtype, size, stride, big_endian=found.big_endian, python_type=kind), content)


def _from_buffer(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    """`_frombuffer(buffer, dtype, shape, order[, axis_order])` of protocol 5."""
    content, dtype, shape, order = args[:4]
    found = numpy_dtype(dtype)
    if found is None or found.dtype is None:
        return None
    size = sizes(name, shape)
    stride = contiguous_stride(size)
    axes = counts(name, args[4]) if len(args) > 4 and args[4] is not None else ()
    if text_of(order) == "F":
        stride = contiguous_stride(size[::-1])[::-1]
    elif text_of(order) == "K" and axes:  # the shape is that of the bytes, before the axes were put in their order
        if sorted(axes) != list(range(len(size))):
            raise wrong(name, f"its axes are ordered as {axes}")
        size, stride = tuple(size[axis] for axis in axes), tuple(stride[axis] for axis in axes)
    whole = Tensor(name, found.dtype, size, stride, big_endian=found.big_endian, python_type="numpy.ndarray")
    return _over(r, whole, content)


def _over(r: Rebuilder, array: Tensor, content: object) -> Tensor:
    """The array over the storage that its bytes are; without one where they are kept outside of the pickle."""
    storage = None
    if not isinstance(content, OutOfBand):
        buffer = buffer_of(content, r.data)
        if buffer is None or not buffer.may_hold(array.nbytes):
            given = describe(content) if buffer is None else f"{len(buffer.data)} bytes"
            raise wrong(array.name, f"needs {array.nbytes} bytes, its pickle has {given}")
        storage = r.storages.embedded(content, buffer, 0, array.nbytes)
    return replace(array, storage=storage) if storage is not None else replace(array, layout="array")


def _on_device(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    """A tensor of a device that torch pickles as an array; one of a dtype that numpy lacks comes as another dtype."""
    data, dtype_node, device, requires_grad = args
    array, dtype = r.inner("array", data), dtype_of(name, dtype_node)
    needs_grad = requires_grad is True
    if array.dtype is not dtype:
        shape = array.shape or ()
        return Tensor(name, dtype, shape, contiguous_stride(shape), requires_grad=needs_grad, layout="array",
                      parts=(array,))  # fmt: skip
    storage = array.storage
    if storage is not None and (location := _location(device)):
        storage = replace(storage, location=location)
    return replace(array, name=name, storage=storage, requires_grad=needs_grad, python_type=None)


def _location(device: object) -> str | None:
    """`xla:0` of a device, or of the text of one."""
    if isinstance(device, Call) and isinstance(device.args, tuple):
        kind, *index = device.args
        return ":".join([text_of(kind) or "", *map(str, filter(lambda part: type(part) is int, index))])
    return text_of(device)


STRIDED: Calls = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _from_cpu,
    ("torch", "Tensor"): _set_state,
    ("torch._tensor", "Tensor"): _set_state,
    ("torch.tensor", "Tensor"): _set_state,
    ("torch.nn.parameter", "Parameter"): _variable,
    ("torch.autograd.variable", "Variable"): _variable,
    **{(module, "_reconstruct"): _array for module in MULTIARRAY},
    **{(module, "_frombuffer"): _from_buffer for module in NUMERIC},
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _on_device,
    ("torch._utils", "_rebuild_xla_tensor"): _on_device,
}
"""The calls of this module, by the module and name of what is called."""
