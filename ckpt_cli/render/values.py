"""What `show` prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model import Value
from ckpt_cli.ops.values import FULL_OVER, SUMMARY_OVER, Shown, Unshown
from ckpt_cli.render.table import Column, table_text
from ckpt_cli.render.tensor import tensor_text
from ckpt_cli.render.text import escaped, name_text, tensor_note, value_text

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
        text = _text(item, precision=precision, full=full)
        yield f"{text}\n" if bare else _labelled(_label(item), text)


def _labelled(label: str, text: str) -> str:
    return f"{label} =\n{text}\n" if "\n" in text else f"{label} = {text}\n"


def _label(item: Shown | Unshown | Value) -> str:
    if isinstance(item, Shown):
        return name_text(item.label)
    return name_text(item.tensor.name if isinstance(item, Unshown) else item.name)


def _text(item: Shown | Unshown | Value, *, precision: int, full: bool) -> str:
    if isinstance(item, Value):
        return value_text(item.value)
    if isinstance(item, Unshown):
        return tensor_note(item.tensor)
    numel = math.prod(item.shape)
    if full and numel > FULL_OVER:
        raise UnsupportedError(
            f"{item.label} has {numel:,} elements, too many to lay out as text in full",
            path=item.checkpoint.path,
            hint="--json, -f tsv and -o FILE.npy write any number of elements",
        )
    summarized = not full and numel > SUMMARY_OVER
    return tensor_text(
        (item.edges() if summarized else item.array()).tolist(),
        shape=item.shape,
        dtype=item.tensor.dtype.name,
        summarized=summarized,
        precision=precision,
        requires_grad=item.tensor.requires_grad,
        is_parameter=item.whole and item.tensor.kind == "parameter",
    )


def values_rows(items: Sequence[Shown | Unshown | Value], style: str) -> Iterator[str]:
    """One row a row of elements: its name and index, then the elements."""
    cells = (row for item in items for row in _rows(item))
    return table_text((Column("name"), Column("values")), cells, style)


def _rows(item: Shown | Unshown | Value) -> Iterator[list[str]]:
    if isinstance(item, Value):
        yield [name_text(item.name), escaped(item.value) if isinstance(item.value, str) else value_text(item.value)]
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
        texts = shown.array(part).astype(str)
        outer = texts.shape[:-1]
        starts = [item.start for item in part] + [0] * (len(outer) - len(part))
        for index in product(*map(range, outer)):
            place = ",".join(str(start + step) for start, step in zip(starts, index, strict=False))
            yield [f"{label}[{place}]" if place else label, *(texts[index].tolist() if texts.shape else [str(texts)])]
