"""Names shortened in the middle, so that they fit into some columns and no two of a table become the same.

A name is a row of tokens: runs of letters, runs of digits, signs. In the tree of all names of a table some tokens tell
a name from another one that begins alike: `11` and `q` in `model.layers.11.self_attn.q_proj.weight`. These are always
shown; the others as far as there is room for them, and `…` for each run of tokens that is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ckpt_cli.facts import dataclass
from ckpt_cli.render.screen import width_of

_GAP = "…"

_TOKEN = re.compile("[0-9]{1,8}|[-./_]|[^-0-9./_][^-0-9./_\u0300-\u036f]{0,7}[\u0300-\u036f]*")

_WHOLE = 4_000
"""Characters of a name in which tokens are looked for; the middle of a longer one is never shown."""


@dataclass(slots=True)
class _Name:
    """The tokens of a name and those of them that are shown."""

    tokens: list[str]
    widths: list[int]
    shown: list[bool]

    def width(self) -> int:
        """Return the columns of the shown tokens, with one for each gap."""
        total, gap = 0, False
        for shown, width in zip(self.shown, self.widths, strict=True):
            if shown:
                total += width
            elif not gap:
                total += 1
            gap = not shown
        return total

    def show(self, begin: int, end: int, columns: int) -> bool:
        """Show the tokens of a range too if there is room for them; False if not."""
        before = self.shown[begin:end]
        if not all(before):
            self.shown[begin:end] = [True] * (end - begin)
            if self.width() > columns:
                self.shown[begin:end] = before
                return False
        return True

    def fill(self, columns: int) -> None:
        """Show tokens from the end on while there is room for them."""
        room = columns - self.width()
        for at in range(len(self.tokens) - 1, -1, -1):
            if not self.shown[at]:
                room -= self.widths[at]
                if room < 0:
                    return
                self.shown[at] = True

    def text(self) -> str:
        """Return the shown tokens, with `…` for each gap."""
        pieces, gap = [], False
        for shown, token in zip(self.shown, self.tokens, strict=True):
            if shown:
                pieces.append(token)
            elif not gap:
                pieces.append(_GAP)
            gap = not shown
        return "".join(pieces)


class Shortener:
    """The names of a table, ready to be shortened to any number of columns."""

    def __init__(self, names: Iterable[str]) -> None:
        self._distinct = dict.fromkeys(names)
        self._widths = {name: width_of(name) for name in self._distinct}
        self._tree: dict[str, dict[str, object]] | None = None

    def shortened(self, columns: int) -> dict[str, str] | None:
        """Return what is shown of each name in some columns; None if that cannot tell all of them apart."""
        texts = {name: name for name in self._distinct}
        for name, width in self._widths.items():
            if width > columns:
                text = self._short(name, columns)
                if text is None:
                    return None
                texts[name] = text
        return texts if len(set(texts.values())) == len(texts) else None

    def least(self, columns: int) -> int:
        """Return the columns, `columns` or more, that are enough to tell all names apart."""
        return max((self._name(name).width() for name, width in self._widths.items() if width > columns), default=0)

    def _short(self, full: str, columns: int) -> str | None:
        name = self._name(full)
        if name.width() > columns:
            return None
        parts = _parts(name.tokens)
        begins = [(begin, end) for begin, end in reversed(parts) if any(name.shown[begin:end])]
        for begin, end in [parts[-1], *begins]:
            name.show(begin, end, columns)
        if name.widths[parts[0][0]] <= columns // 4:
            name.show(*parts[0], columns)
        for begin, end in reversed(parts):
            if not all(name.shown[begin:end]) and not name.show(begin, end, columns):
                break
        name.fill(columns)
        return name.text()

    def _name(self, full: str) -> _Name:
        """Return a name of which only the tokens are shown that tell it from others."""
        if self._tree is None:
            self._tree = {}
            for each in self._distinct:
                node = self._tree
                for token in _tokens(each):
                    node = node.setdefault(token, {})  # type: ignore[assignment]
                node[""] = {}
        tokens = _tokens(full)
        shown, node = [], self._tree
        for token in tokens:
            shown.append(len(node) > 1)
            node = node[token]  # type: ignore[assignment]
        return _Name(tokens, list(map(len if full.isascii() else width_of, tokens)), shown)


def _tokens(name: str) -> list[str]:
    if len(name) > _WHOLE:
        name = f"{name[: _WHOLE // 2]}{_GAP}{name[-_WHOLE // 2 :]}"
    return _TOKEN.findall(name)


def _parts(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Return the ranges of tokens between dots and slashes, each with the sign that ends it."""
    parts, begin = [], 0
    for at, piece in enumerate(tokens):
        if piece in "./" or at == len(tokens) - 1:
            parts.append((begin, at + 1))
            begin = at + 1
    return parts
