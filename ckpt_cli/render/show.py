"""Values as text, as rows and as JSON: nested lists, a bounded piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Value
from ckpt_cli.ops.show import (
    FULL_OVER,
    TABLE_OVER,
    Composed,
    Item,
    Shown,
    Unshown,
    require_bounded,
    require_printable,
    shown_in,
)
from ckpt_cli.render.json import LongList, entry_json, rows, tensor_json
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.tensor_repr import Layout, item_text
from ckpt_cli.render.text import escaped, name_text, tensor_note, value_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 1 << 18
"""Elements turned into rows at a time."""


_PIECE = 1 << 16
"""Elements turned into JSON at a time."""


def to_json(items: Sequence[Item]) -> LongList:
    """Return the items as docs/json.md describes them; values are read when their turn comes, a piece at a time.

    Raises UnsupportedError for more values than may be read.
    """
    require_bounded(items)
    return rows(lambda: map(_item_json, items))


def _item_json(item: Item) -> dict[str, object]:
    if isinstance(item, Value):
        return entry_json(item)
    if isinstance(item, Unshown | Composed):
        facts = tensor_json(item.tensor, {})
        head = {key: facts[key] for key in ("name", "dtype", "shape", "layout", "python_type", "details")}
        name = item.label if isinstance(item, Composed) else item.tensor.name
        parts = item.parts if isinstance(item, Composed) else ()
        return {**head, "name": name, "values": None, "parts": LongList(lambda: ([_item_json(part)] for part in parts))}
    head = {"name": item.label, "dtype": item.tensor.dtype.name, "shape": list(item.shape)}
    if item.tensor.quantizer is not None:
        head["quantization"] = _quantization(item)
    return {**head, "values": _empty(item.shape) if 0 in item.shape else _nested(item, (), item.region.shape)}


def _quantization(shown: Shown) -> dict[str, object]:
    """Return the facts of a quantized tensor; with the scale and zero point of each channel where there are several."""
    from ckpt_cli.arrays.quantized import parameters

    scales, zeros = parameters(shown.checkpoint, shown.tensor)
    quantizer = shown.tensor.quantizer
    return {
        "scheme": quantizer.scheme if quantizer else None,
        "scale": _array_json(scales),
        "zero_point": _array_json(zeros),
        "axis": quantizer.axis if quantizer else None,
    }


def _empty(shape: tuple[int, ...]) -> list[Any]:
    """Return an empty array of that shape as nested lists, or `[]` if there would be far too many of them."""
    outer = shape[: shape.index(0)]
    nested: list[Any] = []
    for size in reversed(outer if math.prod(outer) <= _PIECE else ()):
        nested = [nested] * size
    return nested


def _nested(shown: Shown, prefix: tuple[int, ...], shape: tuple[int, ...]) -> object:
    """Return the nested lists of the values at an index; those of many elements are made some rows at a time."""
    if math.prod(shape) <= _PIECE:
        return _array_json(shown.array(prefix))
    inner = math.prod(shape[1:])
    step = max(_PIECE // max(inner, 1), 1)

    def pieces() -> Iterator[Sequence[object]]:
        for begin in range(0, shape[0], step):
            if inner > _PIECE:
                yield [_nested(shown, (*prefix, begin), shape[1:])]
            else:
                yield _array_json(shown.array((*prefix, slice(begin, begin + step))))

    return LongList(pieces)


def _array_json(values: NDArray[Any]) -> Any:
    """Return an array as nested lists of values that JSON has; complex numbers as pairs."""
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


def values_text(items: Sequence[Item], *, bare: bool, precision: int, full: bool, terminal: bool) -> Iterator[str]:
    """Yield each item as `NAME = VALUE`; with `bare` only the values, and strings as they are."""
    require_printable(items, full=full)
    for item in items:
        if bare and isinstance(item, Value) and isinstance(item.value, str):
            yield (escaped(item.value, keep="\n\t") if terminal else item.value) + "\n"
            continue
        if isinstance(item, Value):
            yield "" if bare else f"{_label(item)} = "
            yield from value_pieces(item.value)
            yield "\n"
            continue
        text = item_text(item, Layout(precision, full))
        yield f"{text}\n" if bare else _labelled(_label(item), text)


def _labelled(label: str, text: str) -> str:
    return f"{label} =\n{text}\n" if "\n" in text else f"{label} = {text}\n"


def _label(item: Item) -> str:
    if isinstance(item, Shown | Composed):
        return name_text(item.label)
    return name_text(item.tensor.name if isinstance(item, Unshown) else item.name)


def _require_layable(numel: int, items: Sequence[Item], most: int = FULL_OVER) -> None:
    """Raise UnsupportedError where the text needs more elements at once than memory allows."""
    if numel > most:
        what = f"{_label(items[0])} has" if len(items) == 1 else "these have"
        raise UnsupportedError(
            f"{what} {numel:,} elements, too many to lay out as text",
            hint="--json and -o FILE.npy write any number of elements, and [...] picks some",
        )


def values_rows(items: Sequence[Item], style: str) -> Iterator[str]:
    """Yield a row for each row of elements: its name and index, then the elements, each below its own index.

    Raises UnsupportedError for more elements than can be laid out, or in one row.
    """
    width = max((_width(item) for item in items), default=1)
    aligned = style in ("table", "markdown")
    numel = sum(math.prod(item.shape) for item in shown_in(items))
    _require_layable(numel if aligned else width, items, TABLE_OVER if aligned else FULL_OVER)
    require_bounded(items)
    cells = (row for item in items for row in _rows(item))
    if style != "tsv":  # whose rows have no headings to keep in step with
        cells = (row + [""] * (1 + width - len(row)) for row in cells)
    headings = ["value"] if width == 1 else map(str, range(width))
    return table_text((Column("name"), *map(Column, headings)), cells, style)


def _width(item: Item) -> int:
    """Return the number of elements in each row of an item."""
    return max((shown.shape[-1] for shown in shown_in([item]) if shown.shape), default=1)


def _rows(item: Item) -> Iterator[list[str]]:
    if isinstance(item, Value):
        text = escaped(item.value) if isinstance(item.value, str) else "".join(value_pieces(item.value))
        yield [name_text(item.name), text]
    elif isinstance(item, Composed) and item.parts:
        for part in item.parts:
            yield from _rows(_named_in(item, part))
    elif isinstance(item, Unshown | Composed):
        yield [name_text(item.tensor.name), tensor_note(item.tensor)]
    else:
        yield from _tensor_rows(item)


def _named_in(whole: Composed, part: Shown | Composed | Unshown) -> Shown | Composed | Unshown:
    """Return a part named by the whole, `emb.values`; constituents keep their own names."""
    if whole.tensor.layout in ("nested", "jagged"):
        return part
    if isinstance(part, Unshown):
        return Unshown(replace(part.tensor, name=f"{whole.label}.{part.tensor.name}"), part.reason)
    return replace(part, label=f"{whole.label}.{part.label}")


def _tensor_rows(shown: Shown) -> Iterator[list[str]]:
    """Yield the rows of the last dimension, each with the index of all dimensions before it."""
    from ckpt_cli.arrays.indexing import row_pieces

    shape = shown.region.shape
    label = name_text(shown.label)
    for part in row_pieces(shown.region, max(_ROWS, shape[-1] if shape else 1)):
        values = shown.array(part)
        *outer, width = values.shape or (1,)
        texts = _texts(values)
        starts = [item.start for item in part] + [0] * (len(outer) - len(part))
        for index in product(*map(range, outer)):
            place = ",".join(str(start + step) for start, step in zip(starts, index, strict=False))
            yield [f"{label}[{place}]" if place else label, *islice(texts, width)]


def _texts(values: NDArray[Any]) -> Iterator[str]:
    """Yield each element as text, a bounded number at a time, because numpy takes 128 bytes for each."""
    flat = values.reshape(-1)
    if flat.dtype == "float16":  # whose own repr is the shortest that comes back as float16: 65504 as 6.55e+04
        flat = flat.astype("float32")
    for begin in range(0, flat.size, _ROWS):
        yield from flat[begin : begin + _ROWS].astype(str).tolist()
