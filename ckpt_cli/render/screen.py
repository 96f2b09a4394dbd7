"""The terminal that an answer is printed on: its width in columns, colours, and lines broken to fit.

`current()` is the terminal of the answer in the making, None where the answer goes elsewhere. `cli/terminal.py` sets
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

from ckpt_cli.facts import dataclass

UNBOUNDED = 1 << 30
"""Columns of a screen that has no edge: text in colours that goes into a pipe."""

_COLOURS = {
    "error": "31", "warning": "33", "note": "36", "ok": "32",
    "less": "31", "more": "32", "changed": "33",
    "heading": "1", "dim": "2", "dtype": "36",
}  # fmt: skip
"""What a text is, and the parameter of the control sequence that colours it (ECMA-48 SGR)."""

_RESET = "\x1b[0m"
_SEQUENCE = r"\x1b\[[0-9;]*m"

_WORD = r" *[^ ]+| +"

_PIECE = 1 << 13
"""Characters of a line without end that are broken at a time."""

_LEAST = 20
"""Columns of a screen that is narrower than anything sensible."""


@dataclass(frozen=True, slots=True)
class Screen:
    """A terminal, or a pipe that takes colours."""

    columns: int
    """Columns of characters in a line."""
    colour: bool = False
    """True if text may be coloured."""

    def paint(self, text: str, what: str) -> str:
        """Return a text in the colour of what it is; as it is where there are no colours, or none for that."""
        code = _COLOURS.get(what) if self.colour and text else None
        return text if code is None else f"\x1b[{code}m{text}{_RESET}"


_current: ContextVar[Screen | None] = ContextVar("screen", default=None)


def current() -> Screen | None:
    """Return the terminal that the answer is made for; None if it is made for a file, a pipe or a program."""
    return _current.get()


def use(screen: Screen | None) -> None:
    """Make answers for this screen from now on."""
    _current.set(screen)


def paint(text: str, what: str) -> str:
    """Return a text in the colour of what it is, where the answer is made for a terminal that has colours."""
    screen = _current.get()
    return text if screen is None else screen.paint(text, what)


def width_of(text: str) -> int:
    """Return the columns that a text takes on a terminal: wide characters take two, combining ones none."""
    if text.isascii():
        return len(text) if "\x1b" not in text else len(re.sub(_SEQUENCE, "", text))
    return sum(map(char_width, re.sub(_SEQUENCE, "", text) if "\x1b" in text else text))


def char_width(char: str) -> int:
    """Return the columns of a character."""
    if char < "\u0300":
        return 1
    from unicodedata import category, east_asian_width

    if category(char) in ("Mn", "Me"):
        return 0
    return 2 if east_asian_width(char) in ("W", "F") else 1


def beginning(text: str, columns: int) -> str:
    """Return as much of the beginning of a text as fits into some columns, combining characters with theirs."""
    if text.isascii():
        return text[:columns]
    taken = 0
    for at, char in enumerate(text):
        taken += char_width(char)
        if taken > columns:
            return text[:at]
    return text


def ending(text: str, columns: int) -> str:
    """Return as much of the end of a text as fits into some columns; it never begins with a combining character."""
    if text.isascii():
        return text[len(text) - columns :] if columns < len(text) else text
    taken, begin = 0, len(text)
    for at in range(len(text) - 1, -1, -1):
        size = char_width(text[at])
        taken += size
        if taken > columns:
            break
        if size:
            begin = at
    return text[begin:]


def padded(text: str, columns: int, *, right: bool = False) -> str:
    """Return a text filled up with blanks, on its left side if it is to stand on the right."""
    blanks = " " * (columns - width_of(text))
    return blanks + text if right else text + blanks


# --- lines -----------------------------------------------------------------------------------------------------------


def wrapped(line: str, columns: int, indent: int | None = None, whole: Iterable[str] = ()) -> list[str]:
    """Return a line as lines that fit: broken at blanks, else behind a sign, else anywhere.

    Lines after the first begin with `indent` blanks; if it is None, with four more than the line itself. Words in
    which one of the texts in `whole` occurs are never broken.
    """
    if width_of(line) <= columns:
        return [line]
    if indent is None:
        indent = len(line) - len(line.lstrip(" ")) + 4
    hang = " " * min(indent, max(columns // 2, 0))
    keep = tuple(whole)
    lines, begin = [], ""
    for word in re.findall(_WORD, line):
        if width_of(begin + word) <= columns:
            begin += word
            continue
        if begin.strip():
            lines.append(begin)
            begin, word = hang, word.lstrip(" ")
        while width_of(begin + word) > columns and not any(text in word for text in keep):
            part = _part(word, max(columns - width_of(begin), 2))
            lines.append(begin + part)
            begin, word = hang, word[len(part) :]
        begin += word
    lines.append(begin)
    return _closed(lines) if "\x1b" in line else lines


def _part(word: str, columns: int) -> str:
    """Return the beginning of a word that is too long: up to a sign that ends a part of it, if there is a late one."""
    if "\x1b" in word:
        return _painted_part(word, columns)
    part = beginning(word, columns)
    cut = max(part.rfind(sign) for sign in "./,_-:=")
    return part[: cut + 1] if cut >= len(part) // 2 else part or word[:1]


def _painted_part(word: str, columns: int) -> str:
    """Return the beginning of a word with control sequences in it, none of which is cut."""
    taken, at = 0, 0
    pattern = re.compile(_SEQUENCE)
    while at < len(word):
        sequence = pattern.match(word, at)
        if sequence is not None:
            at = sequence.end()
            continue
        taken += char_width(word[at])
        if taken > columns:
            break
        at += 1
    return word[:at]


def _closed(lines: list[str]) -> list[str]:
    """Return lines of which each ends the colours that are in use at its end; the next one begins with them."""
    closed, opened = [], ""
    for line in lines:
        text = opened + line
        for sequence in re.findall(_SEQUENCE, line):
            opened = "" if sequence == _RESET else opened + sequence
        closed.append(text + _RESET if opened else text)
    return closed


def folded(pieces: Iterable[str], columns: int) -> Iterator[str]:
    """Yield the lines of a text, those that are too long broken; a line without end is broken a piece at a time."""
    rest, indent = "", None
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield "".join(f"{part}\n" for part in _wrapped(line, columns, indent))
            indent = None
        if len(rest) > _PIECE + columns:
            indent = len(rest) - len(rest.lstrip(" ")) + 4 if indent is None else indent
            *lines, rest = wrapped(rest, columns, indent)
            rest = " " * min(indent, columns // 2) + rest.lstrip(" ")
            yield "".join(f"{line}\n" for line in lines)
    if rest:
        yield "\n".join(_wrapped(rest, columns, indent))


def _wrapped(line: str, columns: int, indent: int | None) -> list[str]:
    """Return a line as lines that fit; tabs become blanks where it has to be broken."""
    if "\t" not in line:
        return wrapped(line, columns, indent)
    blank = line.expandtabs()
    return [line] if width_of(blank) <= columns else wrapped(blank, columns, indent)


def sensible(columns: int) -> int:
    """Return the columns of a terminal, or the least that text can be laid out in."""
    return max(columns, _LEAST)
