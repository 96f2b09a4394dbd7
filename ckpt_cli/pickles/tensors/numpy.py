"""Arrays, scalars and dtypes as numpy pickles them, read without numpy.

Sources: numpy/_core/src/multiarray/methods.c (`array_reduce`, `array_reduce_ex_picklebuffer`), descriptor.c
(`arraydescr_reduce`), scalartypes.c.src (`gentype_reduce`), numpy/_core/numeric.py (`_frombuffer`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import product
from math import prod

from ckpt_cli.dtypes import BY_NAME, BY_NUMPY, DType
from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Global
from ckpt_cli.pickles.tensors.arguments import is_count, text_of
from ckpt_cli.pickles.tensors.inline_bytes import buffer_of

MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
"""The modules that arrays and scalars are made by, before and since numpy 2."""

ARRAYS = frozenset(["_reconstruct", "_frombuffer"])
"""The functions there that make arrays, of numbers or of anything else."""


@dataclass(frozen=True, slots=True)
class NumpyDType:
    """A dtype of numpy, as far as its pickle says."""

    code: str
    """Such as `f4`, `U5` or `O8`; a dtype of another package by its name."""
    order: str = "<"
    """`<`, `>`, or `|` where there is none."""
    dtype: DType | None = None
    """The dtype of one element; None where elements are no plain numbers."""
    fields: tuple[object, ...] | None = None
    """The names of a structured dtype's fields."""

    @property
    def big_endian(self) -> bool:
        """True if elements of several bytes begin with the highest."""
        return self.order == ">" and self.dtype is not None and self.dtype.bits > 8

    def __str__(self) -> str:
        if self.fields is not None:
            return f"fields {describe(self.fields)}"
        return {"O": "object", "M": "datetime64", "m": "timedelta64"}.get(self.code[:1], self.code)


def numpy_dtype(node: object) -> NumpyDType | None:
    """Return the dtype that a call would make; None for any other node."""
    if not isinstance(node, Call) or not _is(node.func, ("numpy",), "dtype"):
        return None
    args, state = node.args, node.states[-1] if node.states else ()
    if type(args) is not tuple or not args or type(state) is not tuple:
        return None
    named = args[0]
    order = (text_of(state[1]) if len(state) > 1 else None) or "<"
    if isinstance(named, Global):  # a class: those of ml_dtypes are called as torch's dtypes
        known = BY_NAME.get(named.name) if named.module == "ml_dtypes" else None
        return NumpyDType(named.qualified, order, known if known and known.numpy and not known.bits % 8 else None)
    code = text_of(named) or "?"
    if len(state) > 3 and isinstance(state[3], tuple):
        return NumpyDType(code, order, None, state[3])
    plain = len(state) < 3 or state[2] is None
    return NumpyDType(code, order, BY_NUMPY.get(code) if plain else None)


_FORMATS = {"float16": "e", "float32": "f", "float64": "d", "bool": "?", "int8": "b", "int16": "h", "int32": "i",
            "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q", "complex64": "ff",
            "complex128": "dd"}  # fmt: skip
"""The format with which `struct` reads each dtype."""


def scalar_parts(node: Call) -> tuple[object, object] | None:
    """The dtype and the bytes of the call that a scalar of numpy is made by; None for any other call."""
    if not _is(node.func, MULTIARRAY, "scalar") or type(node.args) is not tuple or len(node.args) != 2:
        return None
    return node.args[0], node.args[1]


def packing_of(found: NumpyDType) -> str | None:
    """Return how `struct` packs one element of a real dtype, byte order included; None for any other dtype."""
    layout = _FORMATS.get(found.dtype.name) if found.dtype else None
    return f"{'>' if found.order == '>' else '<'}{layout}" if layout and len(layout) == 1 else None


def numpy_scalar(node: Call, data: bytes | memoryview) -> object:
    """Return the Python number or text of one of numpy's scalars; None for any other call."""
    parts = scalar_parts(node)
    if parts is None:
        return None
    found, buffer = numpy_dtype(parts[0]), buffer_of(parts[1], data)
    if found is None or buffer is None or buffer.codec or len(buffer.data) > _SCALAR_BYTES:
        return None
    raw = bytes(buffer.data)
    order = ">" if found.order == ">" else "<"
    if found.code[:1] == "U" and not len(raw) % 4:
        return raw.decode(f"utf-32-{'be' if order == '>' else 'le'}", "replace").rstrip("\0")
    layout = _FORMATS.get(found.dtype.name) if found.dtype else None
    if layout is None or struct.calcsize(order + layout) != len(raw):
        return None
    numbers = struct.unpack(order + layout, raw)
    return numbers[0] if len(numbers) == 1 else complex(*numbers)


_SCALAR_BYTES = 4096
"""Bytes of a scalar that is spelled out: a text of a thousand characters."""


def is_array(node: Call) -> bool:
    """True if a call makes an array of numbers; one of objects, text or dates is not a tensor."""
    if node.func.name == "_reconstruct":  # type: ignore[attr-defined]  # a call of the table below
        state = node.states[-1] if node.states else ()
        found = numpy_dtype(state[-3]) if isinstance(state, tuple) and len(state) in (4, 5) else None
    else:
        found = numpy_dtype(node.args[1]) if isinstance(node.args, tuple) and len(node.args) > 1 else None
    return found is not None and found.dtype is not None


def object_array(node: object) -> tuple[tuple[int, ...], list[object]] | None:
    """The shape and the items, in row-major order, of an array of objects; None for any other call."""
    if not isinstance(node, Call) or not node.states or not _is(node.func, MULTIARRAY, "_reconstruct"):
        return None
    state = node.states[-1]
    if type(state) is not tuple or len(state) not in (4, 5) or not isinstance(state[-1], list):
        return None
    shape, items = state[-4], state[-1]
    if type(shape) is not tuple or not all(is_count(size) for size in shape) or prod(shape) != len(items):
        return None
    return shape, items


def item_names(shape: tuple[int, ...]) -> Iterator[str]:
    """The names of the items of an array, in row-major order: `2.0`; nothing, where there are no dimensions."""
    return (".".join(map(str, index)) for index in product(*map(range, shape)))


def array_text(node: Call) -> str | None:
    """Return the text of an array that is not a tensor: `numpy.ndarray(shape=(3,), dtype=object)`."""
    state, args = node.states[-1] if node.states else None, node.args
    if _is(node.func, MULTIARRAY, "_reconstruct") and type(state) is tuple and len(state) in (4, 5):
        shape, dtype = state[-4:-2]
    elif _is(node.func, NUMERIC, "_frombuffer") and type(args) is tuple and len(args) > 2:
        dtype, shape = args[1:3]
    else:
        return None
    return f"numpy.ndarray(shape={describe(shape)}, dtype={numpy_dtype(dtype) or describe(dtype)})"


def _is(func: object, modules: tuple[str, ...], name: str) -> bool:
    return isinstance(func, Global) and func.name == name and func.module in modules
