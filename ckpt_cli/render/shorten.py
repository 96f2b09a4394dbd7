"""Names shortened in the middle, so that they fit into some columns and no two of a table become the same.

A name is a row of tokens: runs of letters, runs of digits, signs. In the tree of all names of a table some tokens tell
a name from another one that begins alike: `11` and `q` in `model.layers.11.self_attn.q_proj.weight`. These are always
shown; the others as far as there is room for them, and `…` for each run of tokens that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

from ckpt_cli.facts import dataclass
from ckpt_cli.render.screen import width_of

_GAP = "…"

_TOKEN = re.compile("[0-9]{1,8}|[-./_]|[^-0-9./_][^-0-9./_\u0300-\u036f]{0,7}[\u0300-\u036f]*")

_WHOLE = 4_000
"""Characters of a name in which tokens are looked for; the middle of a longer one is never shown."""


_PART = re.compile("[^./]*[./]|[^./]+", re.DOTALL)
"""What is between dots and slashes, with the sign that ends it."""


@dataclass(slots=True)
class _Name:
    """The tokens of a name, by their widths, and those of them that are shown."""

    widths: list[int]
    shown: list[bool]
    parts: list[tuple[int, int]]
    """The ranges of tokens of each part."""
    width: int = 0
    """Columns of the shown tokens, with one for each gap."""

    def local(self, begin: int, end: int) -> int:
        """Return what a range of tokens, and the beginning of a gap behind it, add to the width."""
        total = sum(width for width, shown in zip(self.widths[begin:end], self.shown[begin:end], strict=True) if shown)
        before = begin == 0 or self.shown[begin - 1]
        for shown in self.shown[begin : end + 1]:
            total += before and not shown
            before = shown
        return total

    def show(self, begin: int, end: int, columns: int) -> bool:
        """Show the tokens of a range too if there is room for them; False if not."""
        before = self.shown[begin:end]
        if not all(before):
            width = self.width - self.local(begin, end)
            self.shown[begin:end] = [True] * (end - begin)
            width += self.local(begin, end)
            if width > columns:
                self.shown[begin:end] = before
                return False
            self.width = width
        return True

    def fill(self, columns: int) -> None:
        """Show tokens from the end on while there is room for them."""
        room = columns - self.width
        for at in range(len(self.widths) - 1, -1, -1):
            if not self.shown[at]:
                room -= self.widths[at]
                if room < 0:
                    return
                self.shown[at] = True

    def fit(self, columns: int) -> bool:
        """Show as much as there is room for: the last part, those that tell it apart, the first, others from the end.

        False if what tells it apart is wider than that.
        """
        if self.width > columns:
            return False
        parts = self.parts
        begins = [(begin, end) for begin, end in reversed(parts) if any(self.shown[begin:end])]
        for begin, end in [parts[-1], *begins]:
            self.show(begin, end, columns)
        if self.widths[parts[0][0]] <= columns // 4:
            self.show(*parts[0], columns)
        for begin, end in reversed(parts):
            if not all(self.shown[begin:end]) and not self.show(begin, end, columns):
                break
        self.fill(columns)
        return True

    def recipe(self) -> list[tuple[int, int, int] | None]:
        """Return the shown tokens as the number of a part and a range within it, and None for each gap."""
        found: list[tuple[int, int, int] | None] = []
        for number, (begin, end) in enumerate(self.parts):
            at = begin
            while at < end:
                stop, shown = at, self.shown[at]
                while stop < end and self.shown[stop] == shown:
                    stop += 1
                if shown:
                    found.append((number, at - begin, stop - begin))
                elif not found or found[-1] is not None:
                    found.append(None)
                at = stop
        return found


@dataclass(slots=True)
class _Node:
    """A place in the tree of names, by their parts: the part after it, and whether tokens tell these apart."""

    children: dict[str, _Node] = field(default_factory=dict)
    shown: dict[str, tuple[bool, ...]] | None = None


class Shortener:
    """The names of a table, ready to be shortened to any number of columns.

    Most names of a table are alike but for numbers, so what is found for one is kept for all whose parts have tokens
    of the same widths, told apart at the same places.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._distinct = dict.fromkeys(names)
        self._widths = {name: width_of(name) for name in self._distinct}
        self._tree: _Node | None = None
        self._tokens: dict[str, tuple[list[str], tuple[int, ...]]] = {}
        """The tokens of each part, and their widths."""
        self._kinds: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
        """A number for each combination of widths and shown tokens of a part."""
        self._by_number: list[tuple[tuple[int, ...], tuple[bool, ...]]] = []
        self._keys: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        """The parts of each name and their kinds."""
        self._told: dict[tuple[int, ...], int] = {}
        """Columns that names of some kinds need."""
        self._found: tuple[int, dict[str, str] | None] = (-1, None)
        """What was found last, and for how many columns: a table asks whether names fit, and then for them."""

    def shortened(self, columns: int) -> dict[str, str] | None:
        """Return what is shown of each name in some columns; None if that cannot tell all of them apart."""
        if self._found[0] != columns:
            self._found = columns, self._shortened(columns)
        return self._found[1]

    def _shortened(self, columns: int) -> dict[str, str] | None:
        texts = {name: name for name in self._distinct}
        recipes: dict[tuple[int, ...], list[tuple[int, int, int] | None] | None] = {}
        for name, width in self._widths.items():
            if width > columns:
                parts, kinds = self._key(name)
                if kinds not in recipes:
                    short = self._name(kinds)
                    recipes[kinds] = short.recipe() if short.fit(columns) else None
                recipe = recipes[kinds]
                if recipe is None:
                    return None
                texts[name] = "".join([_GAP if run is None else self._text(parts[run[0]], *run[1:]) for run in recipe])
        return texts if len(set(texts.values())) == len(texts) else None

    def least(self, columns: int) -> int:
        """Return the columns, `columns` or more, that are enough to tell all names apart."""
        most = 0
        for name, width in self._widths.items():
            if width > columns:
                kinds = self._key(name)[1]
                if kinds not in self._told:
                    self._told[kinds] = self._name(kinds).width
                most = max(most, self._told[kinds])
        return most

    def _text(self, part: str, begin: int, end: int) -> str:
        tokens = self._tokens[part][0]
        return part if end - begin == len(tokens) else "".join(tokens[begin:end])

    def _name(self, kinds: Sequence[int]) -> _Name:
        """Return a name of parts of some kinds, of which only the tokens are shown that tell it from others."""
        widths: list[int] = []
        shown: list[bool] = []
        parts: list[tuple[int, int]] = []
        for kind in kinds:
            of_part, apart = self._by_number[kind]
            parts.append((len(widths), len(widths) + len(of_part)))
            widths += of_part
            shown += apart
        name = _Name(widths, shown, parts)
        name.width = name.local(0, len(shown))
        return name

    def _key(self, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the parts of a name and their kinds."""
        found = self._keys.get(name)
        if found is None:
            if self._tree is None:
                self._tree = self._grown()
            parts, kinds, node = tuple(_parts(name)), [], self._tree
            for part in parts:
                if node.shown is None:
                    node.shown = self._told_apart(node)
                kind = (self._tokens_of(part)[1], node.shown[part])
                number = self._kinds.setdefault(kind, len(self._by_number))
                if number == len(self._by_number):
                    self._by_number.append(kind)
                kinds.append(number)
                node = node.children[part]
            found = self._keys[name] = parts, tuple(kinds)
        return found

    def _grown(self) -> _Node:
        """Return the tree of all names."""
        root = _Node()
        for name in self._distinct:
            node = root
            for part in _parts(name):
                child = node.children.get(part)
                if child is None:
                    child = node.children[part] = _Node()
                node = child
            if node is root or part[-1] in "./":
                node.children[""] = _Node()  # the end of a name, which is one way on
        return root

    def _tokens_of(self, part: str) -> tuple[list[str], tuple[int, ...]]:
        found = self._tokens.get(part)
        if found is None:
            tokens = _TOKEN.findall(part)
            found = self._tokens[part] = tokens, tuple(map(len if part.isascii() else width_of, tokens))
        return found

    def _told_apart(self, node: _Node) -> dict[str, tuple[bool, ...]]:
        """Return for each part that may follow which of its tokens tell it from the others."""
        if len(node.children) == 1:
            (part,) = node.children
            return {part: (False,) * len(self._tokens_of(part)[0])}
        tree: dict[str, Any] = {}
        for part in node.children:
            place = tree
            for token in self._tokens_of(part)[0]:
                place = place.setdefault(token, {})
            if not part or part[-1] not in "./":
                place[""] = {}
        shown = {}
        for part in node.children:
            flags, place = [], tree
            for token in self._tokens_of(part)[0]:
                flags.append(len(place) > 1)
                place = place[token]
            shown[part] = tuple(flags)
        return shown


def _parts(name: str) -> list[str]:
    if len(name) > _WHOLE:
        name = f"{name[: _WHOLE // 2]}{_GAP}{name[-_WHOLE // 2 :]}"
    return _PART.findall(name)
