"""Patterns of names with the numbers of layers in them: `layers.{n}.*=layers.{n+2}.*`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.interrupts import limited_work

_FIELD = re.compile(r"\{([A-Za-z_]\w*)(?::(\d{0,9})-(\d{0,9})(?:/(\d{1,9}))?)?\}|\*|[{}]")
"""`{n}`, `{n:4-7}`, `{n:0-30/2}`, a star, or a brace that is none of these."""

_TERM = re.compile(r"\{([A-Za-z_]\w*)(?:\s*\*\s*(\d{1,9}))?(?:\s*//\s*(\d{1,9}))?(?:\s*([+-])\s*(\d{1,9}))?\}|\*|[{}]")
"""`{n}`, `{n+2}`, `{n*2+1}`, `{n//2}`, a star, or a brace that is none of these."""

_STARS = 8
"""Stars and numbers of one pattern."""

_SHORT = 256
"""Characters of a name that needs no timer."""


@dataclass(frozen=True, slots=True)
class _Number:
    """The numbers that a field of a pattern takes."""

    first: int
    last: int | None
    step: int

    def takes(self, number: int) -> bool:
        """True for one of them."""
        return number >= self.first and (self.last is None or number <= self.last) and not (
            number - self.first
        ) % self.step  # fmt: skip


class Pattern:
    """One `OLD=NEW`: `{n}` is a number of decimal digits, `*` a part of a name, and at the end all of the rest."""

    def __init__(self, text: str) -> None:
        """Parse it; raises UsageError for what is not a pattern."""
        self.text = text
        old, equals, new = text.partition("=")
        if not (equals and old.strip() and new.strip()):
            raise UsageError(f"{text!r} is not OLD=NEW", hint="'layers.{n}.*=layers.{n+2}.*'")
        self._numbers: dict[str, _Number] = {}
        self._stars = 0
        self._regex = re.compile(self._expression(old.strip()))
        self._parts = self._replacement(new.strip())

    def _expression(self, old: str) -> str:
        found, at, count = "", 0, 0
        for field in _FIELD.finditer(old):
            found += re.escape(old[at : field.start()])
            at, word, count = field.end(), field.group(), count + 1
            if word == "*":
                found += "(.*)" if at == len(old) else "([^.]*)"
                self._stars += 1
            elif field[1] is None:
                raise UsageError(f"{old!r}: a number is {{n}}, {{n:4-7}} or {{n:0-30/2}}, not {word!r}")
            elif field[1] in self._numbers:
                found += f"(?P={field[1]})"
            else:
                found += f"(?P<{field[1]}>0|[1-9][0-9]{{0,8}})"
                step = int(field[4] or 1)
                if not step:
                    raise UsageError(f"{word!r} has a step of 0")
                self._numbers[field[1]] = _Number(int(field[2] or 0), int(field[3]) if field[3] else None, step)
        if count > _STARS:
            raise UsageError(f"{old!r} has more than {_STARS} stars and numbers")
        return found + re.escape(old[at:])

    def _replacement(self, new: str) -> Sequence[str | Callable[[dict[str, int], Sequence[str]], str]]:
        """Return the parts of the new name: texts, and functions of the numbers and stars of the old one."""
        parts: list[str | Callable[[dict[str, int], Sequence[str]], str]] = []
        at = stars = 0
        for term in _TERM.finditer(new):
            parts.append(new[at : term.start()])
            at = term.end()
            if term.group() == "*":
                parts.append(lambda _, texts, number=stars: texts[number])  # type: ignore[misc]
                stars += 1
            elif term[1] in self._numbers:
                parts.append(_term(term, self.text))
            else:
                known = ", ".join(f"{{{key}}}" for key in self._numbers) or "a star"
                raise UsageError(f"{new!r}: {term.group()!r} is not one of {known}, with +k, -k, *k or //k")
        if stars != self._stars:
            raise UsageError(f"{self.text!r} has {self._stars} stars on the left, and {stars} on the right")
        return [*parts, new[at:]]

    def match(self, name: str) -> str | None:
        """Return the new name of one that matches; raises UsageError for a number below 0."""
        found = self._regex.fullmatch(name)
        if found is None:
            return None
        numbers = {key: int(found[key]) for key in self._numbers}
        if not all(self._numbers[key].takes(number) for key, number in numbers.items()):
            return None
        places = {self._regex.groupindex[key] for key in self._numbers}
        texts = [text for place, text in enumerate(found.groups(), 1) if place not in places]
        return "".join(part if isinstance(part, str) else part(numbers, texts) for part in self._parts)


def _term(term: re.Match[str], text: str) -> Callable[[dict[str, int], Sequence[str]], str]:
    """Return the function that computes one number of a new name."""
    key, times, over = term[1], int(term[2] or 1), int(term[3] or 1)
    more = int(f"{term[4] or '+'}{term[5] or 0}")
    if not over:
        raise UsageError(f"{text!r} divides by 0")

    def compute(numbers: dict[str, int], _: Sequence[str]) -> str:
        found = numbers[key] * times // over + more
        if found < 0:
            raise UsageError(
                f"{term.group()!r} would be {found} for {numbers[key]}", hint=f"{{{key}:{-more}-}} leaves it"
            )
        return str(found)

    return compute


def is_pattern(text: str) -> bool:
    """True for an argument that is a pattern rather than a name."""
    old, equals, _ = text.partition("=")
    return bool(equals) and _FIELD.search(old) is not None


def by_patterns(texts: Sequence[str]) -> Callable[[str], str]:
    """Names by the first of several patterns that matches, all at once; raises UsageError for a bad one."""
    patterns = [Pattern(text) for text in texts]
    left = limits.MATCH_SECONDS

    def renamed(name: str) -> str:
        for pattern in patterns:
            new = pattern.match(name)
            if new is not None:
                return new
        return name

    def rename(name: str) -> str:
        nonlocal left
        if len(name) <= _SHORT:
            return renamed(name)
        begin = time.process_time()
        with limited_work(max(left, 0.001), lambda: UsageError(f"{texts[0]!r} takes too long on long names")):
            new = renamed(name)
        left -= time.process_time() - begin
        return new

    return rename
