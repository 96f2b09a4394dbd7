"""Names, shapes, sizes and values as text that is safe for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import isfinite

from ckpt_cli.model.checkpoint import Opaque, Tensor

_SHORT = 80
"""Characters of a value in a table."""

_ITEMS = 100
"""Items of a list that are turned into text at a time."""

_PIECE = 1 << 12
"""Characters escaped at a time."""


def escaped(text: str, keep: str = "") -> str:
    """Return text of a file with everything escaped that a terminal would act on, except the characters in `keep`.

    That is what Unicode calls control, format, surrogate and unassigned characters, and white space other than blanks.
    """
    if text.isprintable():
        return text
    if len(text) > _PIECE:  # piece by piece, because joining takes many times the memory of what is joined
        return "".join(escaped(text[at : at + _PIECE], keep) for at in range(0, len(text), _PIECE))
    return "".join(char if char.isprintable() or char in keep else _escape(char) for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def name_text(name: str) -> str:
    """Return a name for a row; the empty name as quotes."""
    return escaped(name) if name else "''"


_LONG = 200
"""Characters of a name that are spelled out in a report; `--json` and tables have all of them."""


def brief_name(name: str) -> str:
    """Return a name for a report, in which a long one would bury the rest: its beginning and its end."""
    text = name_text(name)
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]}…{text[-_LONG // 4 :]} ({len(text):,} characters)"


def shape_text(shape: Sequence[int] | None) -> str:
    """Return a shape as `[8,4]`, without blanks so that it stays one word; `?` where it is not known yet."""
    return "?" if shape is None else _counts_text(tuple(shape))


@lru_cache(1 << 10)
def _counts_text(counts: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, counts))}]"


def bytes_text(nbytes: int) -> str:
    """Return bytes in the decimal unit that keeps the number short: `832 B`, `1.2 GB`."""
    if nbytes < 1000:
        return f"{nbytes} B"
    number = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} EB"


def count_text(count: int, thing: str) -> str:
    """Return a number with its noun: `1 tensor`, `12 tensors`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def value_text(value: object) -> str:
    """Return the repr of a non-tensor value, on one line and safe for a terminal."""
    if isinstance(value, Opaque):
        return escaped(value.text)
    try:
        return escaped(repr(value))
    except ValueError:  # an integer of over 4300 digits
        return "<an integer of thousands of digits>"


def value_pieces(value: object) -> Iterator[str]:
    """Yield the text of a value, a bounded piece of a long list at a time."""
    if not isinstance(value, list | tuple) or len(value) <= _ITEMS:
        yield value_text(value)
        return
    begin, end = "[]" if isinstance(value, list) else "()"
    for at in range(0, len(value), _ITEMS):
        yield begin + value_text(list(value[at : at + _ITEMS]))[1:-1]
        begin = ", "
    yield end


def value_beginning(value: object) -> str:
    """Return as much of the text of a value as a row of a table shows."""
    if isinstance(value, str | list | tuple):
        value = value[: _SHORT + 1]
    return short(value_text(value))


def short(text: str, most: int = _SHORT) -> str:
    """Return a text, or the beginning of one that is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def tensor_note(tensor: Tensor) -> str:
    """Return the text in place of values that cannot be shown."""
    parts = f" made of {', '.join(escaped(part.name) for part in tensor.parts)}" if tensor.parts else ""
    layout = "" if tensor.layout == "strided" else f"{tensor.layout} "
    return f"<{layout}tensor, {tensor.dtype}, {shape_text(tensor.shape)}{parts}>"


_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_-=+*#%@"
"""Bars of a drawing, the lowest first; the second ones for a terminal that is not UTF-8."""

_SPARKS = 60
"""Bars of a course of values; of more values, the greatest of each few is drawn."""


def bars(counts: Sequence[int], *, ascii_only: bool = False) -> str:
    """Draw counts as bars; a count that is not 0 has at least the smallest bar."""
    drawn = _ASCII_BARS if ascii_only else _BARS
    most = max(counts, default=0)
    if not most:
        return ""
    return "".join(drawn[-(-count * (len(drawn) - 1) // most)] if count else " " for count in counts).rstrip()


def sparkline(values: Sequence[float | None], *, ascii_only: bool = False) -> str:
    """Draw the course of values between the least and the greatest: a dot for None, `!` for one that is not finite.

    Values that are all equal have the lowest bar.
    """
    drawn = _ASCII_BARS if ascii_only else _BARS
    known = [value for value in values if value is not None and isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    line = []
    for few in _evenly(values, _SPARKS):
        here = [value for value in few if value is not None]
        if not here:
            line.append("." if ascii_only else "·")
        elif not all(map(isfinite, here)):
            line.append("!")
        else:
            share = max(here) / 2 - low / 2
            line.append(drawn[int(share / (high / 2 - low / 2) * (len(drawn) - 1) + 0.5)] if high > low else drawn[0])
    return "".join(line)


def _evenly(values: Sequence[float | None], most: int) -> Iterator[Sequence[float | None]]:
    """Yield runs of values, about equally long and `most` of them at most."""
    count = min(len(values), most)
    for number in range(count):
        yield values[number * len(values) // count : (number + 1) * len(values) // count]
