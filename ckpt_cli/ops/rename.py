"""What `rename` does: new names for entries, given one by one, by prefix, by pattern or by a map."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_cli import limits
from ckpt_cli.changes import Changes
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.names import close_names
from ckpt_cli.ops.rewrite import Planned

Renaming = Callable[[str], str]
"""The new name of an entry, or the old one."""


def exactly(old: str, new: str) -> Renaming:
    """One name, or a prefix with all that is below it."""
    return by_map({old: new})


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
        raise UsageError(f"{expression!r} with {replacement!r} is no substitution: {error}") from None
    return lambda name: pattern.sub(replacement, name)


def by_map(names: Mapping[str, str]) -> Renaming:
    """Names by a map of names or prefixes; the longest one that fits counts."""

    def rename(name: str) -> str:
        at = len(name)
        while at > 0:
            new = names.get(name[:at])
            if new is not None:
                return new + name[at:]
            at = name.rfind(".", 0, at)
        return name

    return rename


def read_map(path: str) -> dict[str, str]:
    """The map in a JSON file; raises UsageError where it is none."""
    with open(path, "rb") as file:
        raw = file.read(limits.INDEX_JSON + 1)
    try:
        names = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}", path=path) from None
    if (
        len(raw) > limits.INDEX_JSON
        or not isinstance(names, dict)
        or not all(isinstance(v, str) for v in names.values())
    ):
        raise UsageError("a map of names is a JSON object of strings: {old: new}", path=path)
    return names


@dataclass(frozen=True, slots=True)
class Step:
    """One renaming of several that are carried out one after another."""

    rename: Renaming
    told: str
    """What was asked for, as an error names it."""
    wanted: Sequence[str] = ()
    """Names or prefixes each of which must be there."""


def renaming(
    *,
    old: str | None,
    new: str | None,
    names: str | None,
    strip: str | None,
    sub: tuple[str, str] | None,
    add: str | None,
) -> list[Step]:
    """What the arguments of `rename` ask for, in the order in which it is done; raises UsageError for half of it."""
    if (old is None) != (new is None):
        raise UsageError("a name is renamed to another: OLD NEW", hint="ckpt rename FILE --strip PREFIX takes one off")
    steps: list[Step] = []
    if old is not None and new is not None:
        name = old.removesuffix(".")
        steps.append(Step(exactly(name, new.removesuffix(".")), f"{old} {new}", (name,)))
    if names is not None:
        known = {name.removesuffix("."): value.removesuffix(".") for name, value in read_map(names).items()}
        steps.append(Step(by_map(known), f"--map {names}", tuple(known)))
    if strip is not None:
        steps.append(Step(without_prefix(strip), f"--strip {strip}"))
    if sub is not None:
        steps.append(Step(by_expression(*sub), f"--sub {sub[0]} {sub[1]}"))
    if add is not None:
        steps.append(Step(with_prefix(add), f"--add {add}"))
    if not steps:
        raise UsageError("say what to rename: OLD NEW, --strip, --add, --sub or --map")
    return steps


def plan_rename(checkpoint: Checkpoint, steps: Sequence[Step]) -> Planned:
    """The changes of some renamings, each of what the one before made.

    Raises NameNotFoundError for a name that is not there, RefusedError where a step changes nothing, where two entries
    would get the same name, or one that is none.
    """
    known = [entry.name for entry in checkpoint.entries]
    now = {name: name for name in known}
    for step in steps:
        _require_there(step.wanted, list(now.values()), checkpoint.path)
        after = {old: step.rename(name) for old, name in now.items()}
        if after == now:
            raise RefusedError(
                f"no name would change by {step.told}", path=checkpoint.path, hint="ckpt ls FILE lists the names"
            )
        now = after
    names = {old: new for old, new in now.items() if new != old}
    if not names:
        raise RefusedError("no name would change", path=checkpoint.path, hint="ckpt ls FILE lists the names")
    taken: dict[str, str] = {}
    for old in known:
        new = names.get(old, old)
        if old in names and not is_name(new):
            raise RefusedError(f"{old!r} would become {new!r}, which is no name", path=checkpoint.path)
        if new in taken and (old in names or taken[new] in names):
            raise RefusedError(f"{taken[new]!r} and {old!r} would both be called {new!r}", path=checkpoint.path)
        taken[new] = old
    return Planned(Changes(names=names, rename=_all_of(steps)), "renamed", tuple(names))


def _require_there(wanted: Sequence[str], names: Sequence[str], path: str) -> None:
    """Raise NameNotFoundError for the first of some names or prefixes that nothing is called."""
    if not wanted:
        return
    there = set(names)
    for name in names:
        there.update(name[:at] for at, char in enumerate(name) if char == ".")
    for name in wanted:
        if name not in there:
            raise NameNotFoundError(name, close_names(name, names), path=path)


def _all_of(steps: Sequence[Step]) -> Renaming:
    def rename(name: str) -> str:
        for step in steps:
            name = step.rename(name)
        return name

    return rename


def is_name(text: str) -> bool:
    """Whether a text can be a new name: not empty, no empty parts, and such that UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text) and not text.startswith(".") and not text.endswith(".") and ".." not in text
