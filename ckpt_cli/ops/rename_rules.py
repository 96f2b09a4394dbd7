"""Ways to make new names of old ones: by prefix, by pattern or by a map."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.files.interrupts import limited_work
from ckpt_cli.files.places import head_of
from ckpt_cli.ops.rename_patterns import by_patterns

Renaming = Callable[[str], str]
"""The new name of an entry, or the old one."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One option of a command line that makes new names of old ones."""

    kind: str
    """`strip` or `add` a prefix, `sub` for a substitution, `map`, or `pattern`."""
    value: str | tuple[str, str] | Mapping[str, str]
    """The option's values: for `sub` a regular expression and its replacement, for `map` a file or the map itself."""

    def renaming(self, known: Mapping[str, str] | None = None) -> Renaming:
        """Return the function on names; for a map that was read already, `known`."""
        if isinstance(self.value, tuple):
            return by_expression(*self.value)
        if not isinstance(self.value, str):
            return by_map(plain_map(self.value))
        if self.kind == "pattern":
            return by_patterns([self.value])
        if self.kind == "map":
            return by_map(read_map(self.value) if known is None else known)
        return (without_prefix if self.kind == "strip" else with_prefix)(self.value)


def in_turn(renamings: Sequence[Renaming]) -> Renaming:
    """Several renamings, each done to what the one before made."""

    def rename(name: str) -> str:
        for one in renamings:
            name = one(name)
        return name

    return rename


def without_prefix(prefix: str) -> Renaming:
    """Names without a prefix that they begin with."""
    dotted = f"{prefix.removesuffix('.')}."
    return lambda name: name[len(dotted) :] if name.startswith(dotted) else name


def with_prefix(prefix: str) -> Renaming:
    """Every name below a prefix."""
    dotted = f"{prefix.removesuffix('.')}."
    return lambda name: f"{dotted}{name}"


def by_expression(expression: str, replacement: str) -> Renaming:
    """Names in which what matches a regular expression is replaced, as by `re.sub`; raises UsageError for a bad one."""
    try:
        pattern = re.compile(expression)
        pattern.sub(replacement, "")
    except (re.error, IndexError) as error:
        raise UsageError(f"{expression!r} with {replacement!r} is not a substitution: {error}") from None
    if not _CHOICES.intersection(expression):  # nothing to go back to; a timer takes ten times as long as such a match
        return lambda name: pattern.sub(replacement, name)
    left = limits.MATCH_SECONDS
    quick = _SHORT if _is_simple(expression) else 0

    def rename(name: str) -> str:
        nonlocal left
        if len(name) <= quick:
            return pattern.sub(replacement, name)
        begin = time.process_time()
        with limited_work(max(left, _LEAST), lambda: _too_slow(expression)):
            new = pattern.sub(replacement, name)
        left -= time.process_time() - begin
        return new

    return rename


_CHOICES = frozenset("*+?{|")
"""The characters without which an expression can match a text in one way only."""

_SHORT = 256
"""Characters of a name for which a simple expression needs no timer: it takes at most that many steps squared."""


def _is_simple(expression: str) -> bool:
    """True if an expression repeats one thing only and refers back to nothing, so that its work is bounded."""
    return sum(map(expression.count, _CHOICES)) == 1 and re.search(r"\\\d", expression) is None


_LEAST = 0.001
"""Seconds for one name after all others took their time: 0 would mean that there is no limit."""


def _too_slow(expression: str) -> UsageError:
    return UsageError(
        f"{expression!r} takes too long to match the names ({limits.MATCH_SECONDS:g} s)",
        hint="a part that can match the same text in many ways, as (a+)+ does, takes twice as long for each character",
    )


def by_map(names: Mapping[str, str]) -> Renaming:
    """Names by a map of names or prefixes; the longest one that fits counts."""
    longest = max(map(len, names), default=0)

    def rename(name: str) -> str:
        at = len(name)
        while at > 0:
            new = names.get(name[:at]) if at <= longest else None
            if new is not None:
                return new + name[at:]
            at = name.rfind(".", 0, min(at, longest + 1))
        return name

    return rename


def read_map(path: str) -> dict[str, str]:
    """Return the map in a JSON file; raise UsageError where it is not a map."""
    raw = head_of(path, limits.INDEX_JSON + 1)
    try:
        names = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", path=path) from None
    if (
        len(raw) > limits.INDEX_JSON
        or not isinstance(names, dict)
        or not all(isinstance(v, str) for v in names.values())
    ):
        raise UsageError("a map of names is a JSON object of strings: {old: new}", path=path)
    return plain_map(names)


def plain_map(names: Mapping[str, str]) -> dict[str, str]:
    """Return a map of names or prefixes without the dots that these may end in."""
    return {old.removesuffix("."): new.removesuffix(".") for old, new in names.items()}
