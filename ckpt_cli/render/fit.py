"""A table that fits a terminal: names are shortened, then columns left out, then each row is a block of lines.

What a column is, its role, says what becomes of it where it is too wide, and its colour:

- `name`: names, shortened in the middle; never two of them to the same text. They stay.
- `names`, `prose`: several words, broken between them into several lines. They stay.
- `digest`: shown as far as there is room for it. It stays.
- `severity`, `sign`, `dtype`: coloured.
- any other: as it is, or left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_cli.facts import dataclass
from ckpt_cli.render.screen import Screen, beginning, padded, width_of, wrapped
from ckpt_cli.render.shorten import Shortener

if TYPE_CHECKING:
    from ckpt_cli.render.table import Column

_ROLES = {
    "name": "name", "where": "name", "path": "name", "file": "name", "key": "name", "fact": "name",
    "names": "names", "message": "prose", "what to do": "prose", "value": "prose",
    "severity": "severity", "what": "sign", "dtype": "dtype", "hash": "digest",
}  # fmt: skip
"""The roles of columns by their headings."""

_LEFT_OUT = (
    "layout", "device", "kind", "requires_grad", "stride", "offset", "histogram", "storage", "first", "zeros",
    "norm", "view", "saved", "shape", "dtype", "max rel", "p50", "mean abs", "cosine", "tensors", "a", "b",
)  # fmt: skip
"""Headings of columns in the order in which they are left out, after empty ones and before those not listed."""

_LEAST = {"name": 24, "names": 24, "prose": 40, "digest": 16}
"""Columns that the cells of a role have at least, or as many as they need."""

_COLOURED = {
    "error": "error", "warning": "warning", "note": "note", "ok": "ok",
    "only in a": "less", "only in b": "more", "missing": "less", "unexpected": "more", "new": "more",
    "value": "changed", "dtype": "changed", "shape": "changed", "differs": "changed", "entry": "changed",
    "tie": "changed", "metadata": "changed",
}  # fmt: skip
"""What the words in columns of severities and signs are coloured as."""

_SIDES = ("a", "b")
"""Headings of the two sides of a comparison, which are left out together: one alone says nothing."""

_GAP = "  "

_ROOMY = 2
"""Columns that a heading has beside it where there is room, as in tables that are not on a terminal."""

_OUTLIER = 40
"""Columns up to which a name that is longer than most others widens its column."""


@dataclass(slots=True)
class _Part:
    """A column with its cells and its width."""

    column: Column
    role: str
    cells: list[str]
    natural: int
    width: int
    names: Shortener | None = None

    @property
    def stays(self) -> bool:
        """True if it is not left out: names, words, digests, and what its column says of itself."""
        return self.column.stays or (self.role in _LEAST and any(self.cells))

    def least(self) -> int:
        """Return the columns that it needs."""
        if self.role not in _LEAST:
            return self.natural
        least = min(self.natural, _LEAST[self.role])
        return least if self.names is None else max(least, self.names.least(least))


def fitted(columns: Sequence[Column], rows: Iterable[Sequence[str]], screen: Screen) -> Iterator[str]:
    """Yield the rows with their headings as a table that fits a screen, or as a block of lines for each of them."""
    table = [list(cells) for cells in zip(*rows, strict=True)]
    if not table:
        return
    parts = [_part(column, cells) for column, cells in zip(columns, table, strict=True)]
    shown, gone = _chosen(parts, screen.columns)
    if not shown:
        yield from _blocks(parts, screen)
        return
    yield from _lines(shown, screen)
    names = ", ".join(part.column.heading for part in parts if part in gone and any(part.cells))
    cut = any(part.role == "digest" and part.width < part.natural for part in shown)
    said = [f"not shown: {names}"] * bool(names) + ["hashes are cut short"] * cut
    if said:
        note = f"{'; '.join(said)}; a wider terminal, -f csv or --json shows them"
        yield "".join(f"{screen.paint(line, 'dim')}\n" for line in wrapped(note, screen.columns, 2))


def _part(column: Column, cells: list[str]) -> _Part:
    role = column.role or _ROLES.get(column.heading, "")
    natural = max(width_of(column.heading), *map(width_of, cells))
    return _Part(column, role, cells, natural, 0)


def _chosen(parts: Sequence[_Part], columns: int) -> tuple[list[_Part], list[_Part]]:
    """Return the columns that are shown, each with its width, and those that are left out; none for no table."""
    roomy = [max(part.natural, width_of(part.column.heading) + _ROOMY) for part in parts]
    if sum(roomy) + len(_GAP) * (len(parts) - 1) <= columns and all(_wanted(part) == part.natural for part in parts):
        for part, width in zip(parts, roomy, strict=True):
            part.width = width
        return list(parts), []
    shown, gone = list(parts), []
    while not _fit(shown, columns):
        leaving = [part for part in shown if not part.stays]
        if not leaving or len(shown) == 1:
            return [], []
        victim = min(reversed(leaving), key=_worth)
        pair = _SIDES if victim.column.heading in _SIDES else (victim.column.heading,)
        gone += [part for part in shown if part.column.heading in pair]
        shown = [part for part in shown if part.column.heading not in pair]
    return shown, gone


def _worth(part: _Part) -> int:
    """Return a greater number for a column that is left out later."""
    if not any(part.cells):
        return -1
    heading = part.column.heading
    return _LEFT_OUT.index(heading) if heading in _LEFT_OUT else len(_LEFT_OUT)


def _fit(parts: Sequence[_Part], columns: int) -> bool:
    """Give each column its width, and shorten names; False if they do not fit side by side."""
    room = columns - len(_GAP) * (len(parts) - 1)
    if sum(_cheap_least(part) for part in parts) > room:
        return False
    for part in parts:
        if part.role == "name" and part.natural > _LEAST["name"] and part.names is None:
            part.names = Shortener(part.cells)
    least = {id(part): part.least() for part in parts}
    room -= sum(least.values())
    if room < 0:
        return False
    for part in parts:
        part.width = least[id(part)]
    for part in sorted(parts, key=lambda part: part.role == "digest"):
        more = min(_wanted(part) - part.width, room // _growing(parts) if part.role in ("names", "prose") else room)
        part.width += max(more, 0)
        room -= max(more, 0)
    return _shortened_names(parts)


def _cheap_least(part: _Part) -> int:
    return min(part.natural, _LEAST[part.role]) if part.role in _LEAST else part.natural


def _growing(parts: Sequence[_Part]) -> int:
    """Return the number of columns of words that still want to be wider."""
    return max(sum(part.role in ("names", "prose") and part.width < part.natural for part in parts), 1)


def _wanted(part: _Part) -> int:
    """Return the width that a column should have; one long name does not widen that of many short ones."""
    if part.role != "name":
        return part.natural
    widths = sorted(map(width_of, part.cells))
    most = max(2 * widths[(len(widths) - 1) * 9 // 10], _OUTLIER)
    return min(part.natural, max(most, part.width))


def _shortened_names(parts: Sequence[_Part]) -> bool:
    """True if the names fit their columns with no two of them alike."""
    for part in parts:
        if part.names is not None and part.width < part.natural and part.names.shortened(part.width) is None:
            return False
    return True


def _lines(parts: Sequence[_Part], screen: Screen) -> Iterator[str]:
    """Yield the heading, a rule, and the lines of each row."""
    headings = [padded(part.column.heading, part.width, right=part.column.right) for part in parts]
    yield screen.paint(_GAP.join(headings).rstrip(), "heading") + "\n"
    yield screen.paint(_GAP.join("-" * part.width for part in parts), "dim") + "\n"
    texts = [_cell_texts(part) for part in parts]
    before = [""] * len(parts)
    for cells in zip(*texts, strict=True):
        high = max(map(len, cells))
        for at in range(high):
            line = []
            for number, (part, lines) in enumerate(zip(parts, cells, strict=True)):
                text = lines[at] if at < len(lines) else ""
                last = number == len(parts) - 1
                blanks = "" if last and not part.column.right else " " * (part.width - width_of(text))
                shown = _painted(part.role, text, before[number], screen) if screen.colour else text
                line.append(blanks + shown if part.column.right else shown + blanks)
                before[number] = text
            yield _GAP.join(line).rstrip() + "\n"


def _cell_texts(part: _Part) -> Iterator[list[str]]:
    """Yield the lines of each cell of a column."""
    names = part.names.shortened(part.width) if part.names is not None and part.width < part.natural else None
    for cell in part.cells:
        if part.role == "name" and names is not None:
            yield [names[cell]]
        elif width_of(cell) <= part.width:
            yield [cell]
        elif part.role == "digest":
            yield [beginning(cell, part.width - 1) + "…"]
        else:
            yield wrapped(cell, part.width, 0)


def _painted(role: str, text: str, before: str, screen: Screen) -> str:
    """Return the text of a cell in its colours; of a name, the part that stands above it as well is dimmed."""
    if role == "name":
        same = 0
        for at, (one, other) in enumerate(zip(text, before, strict=False), 1):
            if one != other:
                break
            if one in "./":
                same = at
        return screen.paint(text[:same], "dim") + text[same:]
    if role in ("severity", "sign"):
        return screen.paint(text, _COLOURED.get(text, ""))
    return screen.paint(text, role)


def _blocks(parts: Sequence[_Part], screen: Screen) -> Iterator[str]:
    """Yield each row as a line for each cell that is not empty, and an empty line between two rows."""
    width = min(max(width_of(part.column.heading) for part in parts), screen.columns // 3)
    for row in range(len(parts[0].cells)):
        if row:
            yield "\n"
        for part in parts:
            text = part.cells[row]
            if text:
                label = padded(beginning(part.column.heading, width), width)
                plain = wrapped(text, screen.columns - width - len(_GAP), 0)
                painted = [_painted(part.role, line, "", screen) for line in plain]
                lines = [screen.paint(label, "dim") + _GAP + painted[0]]
                lines += [" " * (width + len(_GAP)) + line for line in painted[1:]]
                yield "".join(f"{line}\n" for line in lines)
