"""What `show` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model import Value
from ckpt_cli.ops.values import EDGE_ITEMS, FULL_OVER, SUMMARY_OVER, TABLE_OVER, Shown, Unshown, require_bounded
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.tensor import tensor_text
from ckpt_cli.render.text import escaped, name_text, tensor_note, value_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 1 << 18
"""Elements turned into rows at a time."""


def values_text(
    items: Sequence[Shown | Unshown | Value], *, bare: bool, precision: int, full: bool, terminal: bool
) -> Iterator[str]:
    """Each item as `NAME = VALUE`; with `bare`, values alone, and strings as they are."""
    for item in items:
        if bare and isinstance(item, Value) and isinstance(item.value, str):
            yield (escaped(item.value, keep="\n\t") if terminal else item.value) + "\n"
            continue
        if isinstance(item, Value):
            yield "" if bare else f"{_label(item)} = "
            yield from value_pieces(item.value)
            yield "\n"
            continue
        text = _text(item, precision=precision, full=full)
        yield f"{text}\n" if bare else _labelled(_label(item), text)


def _labelled(label: str, text: str) -> str:
    return f"{label} =\n{text}\n" if "\n" in text else f"{label} = {text}\n"


def _label(item: Shown | Unshown | Value) -> str:
    if isinstance(item, Shown):
        return name_text(item.label)
    return name_text(item.tensor.name if isinstance(item, Unshown) else item.name)


def _text(item: Shown | Unshown, *, precision: int, full: bool) -> str:
    if isinstance(item, Unshown):
        return tensor_note(item.tensor)
    summarized = not full and math.prod(item.shape) > SUMMARY_OVER
    _require_layable(math.prod(min(size, 2 * EDGE_ITEMS) if summarized else size for size in item.shape), [item])
    values = item.edges() if summarized else item.array() if 0 not in item.shape else None
    return tensor_text(
        [] if values is None else values.tolist(),
        shape=item.shape,
        dtype=item.tensor.dtype.name,
        summarized=summarized,
        precision=precision,
        requires_grad=item.tensor.requires_grad,
        is_parameter=item.whole and item.tensor.kind == "parameter",
    )


def _require_layable(numel: int, items: Sequence[Shown | Unshown | Value], most: int = FULL_OVER) -> None:
    """Raise UnsupportedError where text needs so many elements at once that it would take too much memory."""
    if numel > most:
        what = f"{_label(items[0])} has" if len(items) == 1 else "these have"
        raise UnsupportedError(
            f"{what} {numel:,} elements, too many to lay out as text",
            hint="--json and -o FILE.npy write any number of elements, and [...] picks some",
        )


def values_rows(items: Sequence[Shown | Unshown | Value], style: str) -> Iterator[str]:
    """One row a row of elements: its name and index, then the elements, each below its own index.

    Raises UnsupportedError for more elements than can be laid out, or in one row.
    """
    width = max((_width(item) for item in items), default=1)
    aligned = style in ("table", "markdown")
    numel = sum(math.prod(item.shape) for item in items if isinstance(item, Shown))
    _require_layable(numel if aligned else width, items, TABLE_OVER if aligned else FULL_OVER)
    require_bounded(items)
    cells = (row for item in items for row in _rows(item))
    if style != "tsv":  # whose rows have no headings to keep in step with
        cells = (row + [""] * (1 + width - len(row)) for row in cells)
    headings = ["value"] if width == 1 else map(str, range(width))
    return table_text((Column("name"), *map(Column, headings)), cells, style)


def _width(item: Shown | Unshown | Value) -> int:
    """Elements in each row of an item."""
    return item.shape[-1] if isinstance(item, Shown) and item.shape else 1


def _rows(item: Shown | Unshown | Value) -> Iterator[list[str]]:
    if isinstance(item, Value):
        text = escaped(item.value) if isinstance(item.value, str) else "".join(value_pieces(item.value))
        yield [name_text(item.name), text]
    elif isinstance(item, Unshown):
        yield [name_text(item.tensor.name), tensor_note(item.tensor)]
    else:
        yield from _tensor_rows(item)


def _tensor_rows(shown: Shown) -> Iterator[list[str]]:
    """The rows of the last dimension, each with the index of all dimensions before it."""
    from ckpt_cli.arrays.sharing import row_pieces

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
    """Each element as text, a bounded number at a time: numpy takes 128 bytes for one."""
    flat = values.reshape(-1)
    if flat.dtype == "float16":  # whose own repr is the shortest that comes back as float16: 65504 as 6.55e+04
        flat = flat.astype("float32")
    for begin in range(0, flat.size, _ROWS):
        yield from flat[begin : begin + _ROWS].astype(str).tolist()
