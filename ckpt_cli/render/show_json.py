"""Values as JSON: nested lists, a bounded piece at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_cli.model.checkpoint import Value
from ckpt_cli.render.json import tensor_json, value_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ckpt_cli.ops.show import Composed, Item, Shown, Unshown

_PIECE = 1 << 16
"""Elements turned into text at a time."""


def values_json(items: Sequence[Item]) -> Iterator[str]:
    """Yield the output of `show --json`, in bounded pieces."""
    from ckpt_cli.ops.show import require_bounded

    require_bounded(items)
    yield "["
    separator = "\n"
    for item in items:
        yield separator
        yield from _item(item)
        separator = ",\n"
    yield "]\n"


def _item(item: Item) -> Iterator[str]:
    from ckpt_cli.ops.show import Composed, Unshown

    if isinstance(item, Value):
        yield from value_row(item)
        return
    if isinstance(item, Unshown | Composed):
        facts = tensor_json(item.tensor, {})
        head = {key: facts[key] for key in ("name", "dtype", "shape", "layout", "python_type", "details")}
        yield json.dumps({**head, "name": _label(item), "values": None})[:-1] + ', "parts": ['
        for number, part in enumerate(item.parts if isinstance(item, Composed) else ()):
            yield ", " if number else ""
            yield from _item(part)
        yield "]}"
        return
    head = {"name": item.label, "dtype": item.tensor.dtype.name, "shape": list(item.shape)}
    if item.tensor.quantizer is not None:
        head["quantization"] = _quantization(item)
    yield json.dumps(head)[:-1] + ', "values": '
    if 0 in item.shape:
        yield json.dumps(_empty(item.shape))
    else:
        yield from _nested(item, (), item.region.shape)
    yield "}"


def _label(item: Unshown | Composed) -> str:
    return getattr(item, "label", item.tensor.name)


def _quantization(shown: Shown) -> dict[str, object]:
    """Return the facts of a quantized tensor; with the scale and zero point of each channel where there are several."""
    from ckpt_cli.arrays.quantized import parameters

    scales, zeros = parameters(shown.checkpoint, shown.tensor)
    quantizer = shown.tensor.quantizer
    return {
        "scheme": quantizer.scheme if quantizer else None,
        "scale": array_json(scales),
        "zero_point": array_json(zeros),
        "axis": quantizer.axis if quantizer else None,
    }


def _empty(shape: tuple[int, ...]) -> list[Any]:
    """Return an empty array of that shape as nested lists; `[]` where there would be far too many."""
    outer = shape[: shape.index(0)]
    nested: list[Any] = []
    for size in reversed(outer if math.prod(outer) <= _PIECE else ()):
        nested = [nested] * size
    return nested


def _nested(shown: Shown, prefix: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[str]:
    """Nested lists below an index, rows of bounded size at a time."""
    if math.prod(shape) <= _PIECE:
        yield json.dumps(array_json(shown.array(prefix)), allow_nan=False)
        return
    inner = math.prod(shape[1:])
    step = max(_PIECE // max(inner, 1), 1)
    separator = "["
    for begin in range(0, shape[0], step):
        yield separator
        if inner > _PIECE:
            yield from _nested(shown, (*prefix, begin), shape[1:])
        else:
            rows = shown.array((*prefix, slice(begin, begin + step)))
            yield json.dumps(array_json(rows), allow_nan=False)[1:-1]
        separator = ", "
    yield "]"


def array_json(values: NDArray[Any]) -> Any:
    """An array as nested lists of JSON's values; complex numbers as pairs."""
    import numpy as np

    if values.dtype.kind == "c":
        values = np.stack((values.real, values.imag), axis=-1)
    if values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
        named = values.astype(object)
        named[np.isnan(values)] = "NaN"
        named[np.isposinf(values)] = "Infinity"
        named[np.isneginf(values)] = "-Infinity"
        return named.tolist()
    return values.tolist()
