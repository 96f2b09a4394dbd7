"""Lay out tensor values exactly as torch prints them, without torch.

The rules were learnt from ``torch/_tensor_str.py`` (torch 2.13) at its default
options. They are three steps: every value becomes a cell, a text padded to the
common width; the cells are bracketed from the innermost dimension outwards;
the suffixes (size, dtype, requires_grad) are appended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, compress
from typing import Any, TypeAlias

from ckpt_cli.facts import dataclass

Scalar: TypeAlias = "float | int | bool | complex"
Nested: TypeAlias = "Scalar | Sequence[Nested]"

EDGE_ITEMS = 3
"""Items a summarised dimension keeps at each end."""

LINE_WIDTH = 80
"""Columns after which a row or a suffix moves to a new line."""

_PREFIX = "tensor("

# The dtypes that torch infers back from the printed values. An empty tensor has
# no values to infer from, so there only torch's default dtype goes unnamed.
_INFERRED_DTYPES = frozenset({"float32", "int64", "bool", "complex64"})
_INFERRED_DTYPES_IF_EMPTY = frozenset({"float32"})


@dataclass(frozen=True, slots=True)
class _Cells:
    """Every value of a tensor as text, in row-major order."""

    texts: list[str]
    """The values' texts, aligned to the right; some may exceed `width`."""

    width: int
    """Characters that count for a cell when a row is cut into lines."""


def tensor_text(
    values: Nested,
    *,
    shape: tuple[int, ...],
    dtype: str,
    summarized: bool = False,
    precision: int = 4,
    requires_grad: bool = False,
    is_parameter: bool = False,
    extra: Sequence[str] = (),
    prefix: str = _PREFIX,
    suffixes: Sequence[str] | None = None,
) -> str:
    """Return the text that ``repr`` gives for a torch tensor.

    `values` are nested lists (a scalar for 0-d) of the entire tensor or, if
    `summarized`, with each dimension longer than ``2 * EDGE_ITEMS`` reduced to
    its first and last ``EDGE_ITEMS``; `shape` is the true shape either way.
    `dtype` is in torch's spelling, `precision` the digits after the point, and
    `extra` holds suffixes that go first, such as ``device='cuda:0'``; `suffixes`
    stand in the place of all others. A subclass has its own `prefix`, ``Mine(``.
    The values of a float4_e2m1fn_x2 tensor are its bytes, which is what torch prints.
    """
    contents = contents_text(
        values, shape=shape, dtype=dtype, summarized=summarized, precision=precision, indent=len(prefix)
    )
    if suffixes is None:
        suffixes = [*extra, *_suffixes(shape, dtype, requires_grad)]
    text = append_suffixes(prefix + contents, suffixes, len(prefix)) + ")"
    if not is_parameter:
        return text
    return f"Parameter containing:\n{text}" if prefix == _PREFIX else f"Parameter({text})"


def contents_text(
    values: Nested, *, shape: tuple[int, ...], dtype: str, summarized: bool, precision: int, indent: int
) -> str:
    """Return the bracketed values alone; lines after the first are indented so far."""
    if 0 in shape:
        return "[]"
    cells = _cells(_flat(values, len(shape)), dtype, precision)
    return _brackets(cells, shape, summarized, indent)


def _flat(values: Nested, ndim: int) -> list[Any]:
    """Return the scalars of lists nested `ndim` deep, in row-major order."""
    flat: list[Any] = [values]
    for _ in range(ndim):
        flat = list(chain.from_iterable(flat))
    return flat


def _cells(values: Sequence[Any], dtype: str, precision: int) -> _Cells:
    """Format the scalars of a tensor by the kind of its dtype."""
    if dtype.startswith("complex"):
        return _complex_cells(values, precision)
    if "float" in dtype:
        return _float_cells(values, precision, dtype)
    return _exact_cells(values)


def _exact_cells(values: Sequence[int]) -> _Cells:
    """Format integers and bools, all of which count for the width."""
    texts = list(map(str, values))
    return _aligned(texts, max(map(len, texts)))


def _float_cells(values: Sequence[float], precision: int, dtype: str = "") -> _Cells:
    """Format floats, of which only the significant decide the notation and width."""
    is_significant = _SIGNIFICANT.get(dtype, _is_finite_nonzero)
    values = list(map(float, values))
    mask = list(map(is_significant, values))
    template = _template(list(compress(values, mask)), precision)
    texts = [(template if math.isfinite(v) else "{}").format(v) for v in values]
    return _aligned(texts, max(map(len, compress(texts, mask)), default=1))


def _complex_cells(values: Sequence[complex], precision: int) -> _Cells:
    """Format real and imaginary parts apart, then join them; only reals align."""
    real = _float_cells([v.real for v in values], precision)
    imag = _float_cells([v.imag for v in values], precision)
    signed = (t if t[0] == "-" else "+" + t for t in map(str.lstrip, imag.texts))
    texts = [r + i + "j" for r, i in zip(real.texts, signed, strict=True)]
    # torch counts the j here but not the sign between the parts.
    return _Cells(texts, real.width + imag.width + len("j"))


def _aligned(texts: list[str], width: int) -> _Cells:
    return _Cells([text.rjust(width) for text in texts], width)


def _is_finite_nonzero(value: float) -> bool:
    return value != 0 and math.isfinite(value)


def _is_above_2_to_minus_127(value: float) -> bool:
    return value != 2.0**-127


# float8_e8m0fnu has neither zero nor inf, and torch 2.13 compares within it:
# there a zero rounds to its least value, 2**-127, and a nan counts as finite.
_SIGNIFICANT = {"float8_e8m0fnu": _is_above_2_to_minus_127}


def _template(significant: Sequence[float], precision: int) -> str:
    """Choose the one format that all finite values of a tensor share."""
    if _is_scientific(significant):
        return f"{{:.{precision}e}}"
    if all(map(float.is_integer, significant)):
        return "{:.0f}."
    return f"{{:.{precision}f}}"


def _is_scientific(significant: Sequence[float]) -> bool:
    """True if the magnitudes are too far apart, too large or too small."""
    if not significant or any(map(math.isnan, significant)):
        return False
    least, most = min(map(abs, significant)), max(map(abs, significant))
    return most / least > 1000.0 or most > 1.0e8 or least < 1.0e-4


def _brackets(cells: _Cells, shape: tuple[int, ...], summarized: bool, start: int) -> str:
    """Nest the cells in brackets, from the innermost dimension outwards."""
    blocks = cells.texts
    for axis in reversed(range(len(shape))):
        elided = summarized and shape[axis] > 2 * EDGE_ITEMS
        groups = _groups(blocks, 2 * EDGE_ITEMS if elided else shape[axis])
        indent = " " * (start + axis + 1)
        if axis == len(shape) - 1:
            blocks = [_row(g, cells.width, indent, elided) for g in groups]
        else:
            glue = "," + "\n" * (len(shape) - axis - 1) + indent
            blocks = [_bracket(_elide(g, "...", elided), glue) for g in groups]
    return blocks[0]


def _groups(blocks: list[str], length: int) -> Iterator[list[str]]:
    return (blocks[i : i + length] for i in range(0, len(blocks), length))


def _row(cells: list[str], width: int, indent: str, elided: bool) -> str:
    """Bracket the cells of one innermost row, cut into lines that fit."""
    room = LINE_WIDTH - len(indent) + len("[")
    per_line = max(1, room // (width + len(", ")))
    lines = _groups(_elide(cells, " ...", elided), per_line)
    return _bracket(list(map(", ".join, lines)), ",\n" + indent)


def _elide(blocks: list[str], dots: str, elided: bool) -> list[str]:
    return [*blocks[:EDGE_ITEMS], dots, *blocks[EDGE_ITEMS:]] if elided else blocks


def _bracket(blocks: list[str], glue: str) -> str:
    return "[" + glue.join(blocks) + "]"


def _suffixes(shape: tuple[int, ...], dtype: str, requires_grad: bool) -> Iterator[str]:
    """Yield the facts that the printed values do not show, in torch's order."""
    empty = 0 in shape
    if empty and len(shape) != 1:
        yield f"size={shape}"
    if dtype not in (_INFERRED_DTYPES_IF_EMPTY if empty else _INFERRED_DTYPES):
        yield f"dtype=torch.{dtype}"
    if requires_grad:
        yield "requires_grad=True"


def append_suffixes(text: str, suffixes: Sequence[str], start: int, *, newline: bool = False) -> str:
    """Append the suffixes, each on a new line if it would pass the line's end, the first one anyway if `newline`."""
    indent = " " * start
    # torch starts counting two columns too far to the right; so do we.
    column = len(text) - text.rfind("\n") + 1
    pieces = [text]
    for suffix in suffixes:
        if not newline and column + len(", ") + len(suffix) <= LINE_WIDTH:
            pieces.append(", " + suffix)
            column += len(", ") + len(suffix)
        else:
            pieces.append(",\n" + indent + suffix)
            column = len(indent) + len(suffix)
            newline = False
    return "".join(pieces)
