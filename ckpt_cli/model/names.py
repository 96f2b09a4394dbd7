"""What dotted names lie in: prefixes of them, each found by bisection, as the prefixes of long names fill a memory."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Below:
    """The names below some prefixes, of which there may be as many as names."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        """Of prefixes without the dot that follows them."""
        self._begins: list[str] = []
        for begin in sorted(f"{prefix}." for prefix in prefixes):
            if not self._begins or not begin.startswith(self._begins[-1]):
                self._begins.append(begin)

    def __bool__(self) -> bool:
        return bool(self._begins)

    def __contains__(self, name: str) -> bool:
        at = bisect_right(self._begins, name)
        return at > 0 and name.startswith(self._begins[at - 1])


class Holders:
    """The containers that names lie in: the prefixes of them that end before a dot."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(names)

    def __bool__(self) -> bool:
        return bool(self._names)

    def __contains__(self, prefix: str) -> bool:
        begin = f"{prefix}."
        at = bisect_left(self._names, begin)
        return at < len(self._names) and self._names[at].startswith(begin)

    def outermost_without(self, name: str) -> str | None:
        """Return the outermost container of another name in which none of these names lies; None if there is none."""
        dots = [at for at, char in enumerate(name) if char == "."]
        at = bisect_left(dots, True, key=lambda at: name[:at] not in self)
        return name[: dots[at]] if at < len(dots) else None


_NEAR = 100
"""Containers of one name among those that are offered for a misspelt one, the outermost ones."""


def prefixes_of(names: Iterable[str]) -> Iterator[str]:
    """Yield the containers of names, as candidates for a prefix that is misspelt."""
    for name in names:
        at = name.find(".")
        for _ in range(_NEAR):
            if at < 0:
                break
            yield name[:at]
            at = name.find(".", at + 1)
