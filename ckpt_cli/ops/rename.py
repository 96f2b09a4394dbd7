"""What `rename` does: new names for entries, given one by one, by prefix, by pattern or by a map."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.changes import Changes
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.model import Checkpoint
from ckpt_cli.ops.names import close_names
from ckpt_cli.ops.rewrite import Planned

if TYPE_CHECKING:
    from collections.abc import Iterable

Renaming = Callable[[str], str]
"""The new name of an entry, or the old one."""


def exactly(old: str, new: str) -> Renaming:
    """One name, or a prefix with all that is below it."""
    return by_map({old: new})


def without_prefix(prefix: str) -> Renaming:
    """Names without a prefix that they begin with."""
    dotted = f"{prefix.removesuffix('.')}."
    return lambda name: name[len(dotted) :] if name.startswith(dotted) and name != dotted else name


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


def one_after_another(renamings: Sequence[Renaming]) -> Renaming:
    """What several renamings do, each to what the one before made."""

    def rename(name: str) -> str:
        for each in renamings:
            name = each(name)
        return name

    return rename


def renaming(
    *,
    old: str | None,
    new: str | None,
    names: str | None,
    strip: str | None,
    sub: tuple[str, str] | None,
    add: str | None,
) -> tuple[Renaming, Sequence[str]]:
    """What the arguments of `rename` ask for, and the names that must be there; raises UsageError for half of it."""
    if (old is None) != (new is None):
        raise UsageError("a name is renamed to another: OLD NEW", hint="ckpt rename FILE --strip PREFIX takes one off")
    chosen: list[Renaming] = []
    wanted: list[str] = []
    if old is not None and new is not None:
        chosen.append(exactly(old.removesuffix("."), new.removesuffix(".")))
        wanted.append(old.removesuffix("."))
    if names is not None:
        known = read_map(names)
        chosen.append(by_map(known))
        wanted.extend(known)
    chosen += [without_prefix(strip)] if strip is not None else []
    chosen += [by_expression(*sub)] if sub is not None else []
    chosen += [with_prefix(add)] if add is not None else []
    if not chosen:
        raise UsageError("say what to rename: OLD NEW, --strip, --add, --sub or --map")
    return one_after_another(chosen), wanted


def plan_rename(checkpoint: Checkpoint, rename: Renaming, wanted: Iterable[str] = ()) -> Planned:
    """The changes of a renaming; `wanted` are names or prefixes each of which must be there.

    Raises NameNotFoundError where nothing gets a new name, RefusedError where two entries would get the same.
    """
    known = [entry.name for entry in checkpoint.entries]
    for name in wanted:
        if not any(entry == name or entry.startswith(f"{name}.") for entry in known):
            raise NameNotFoundError(name, close_names(name, known), path=checkpoint.path)
    names = {old: new for old in known if (new := rename(old)) != old}
    if not names:
        raise RefusedError("no name would change", path=checkpoint.path, hint="ckpt ls FILE lists the names")
    taken: dict[str, str] = {}
    for old in known:
        new = names.get(old, old)
        if not new or new.startswith(".") or new.endswith("."):
            raise RefusedError(f"{old!r} would become {new!r}, which is no name", path=checkpoint.path)
        if new in taken and (old in names or taken[new] in names):
            raise RefusedError(f"{taken[new]!r} and {old!r} would both be called {new!r}", path=checkpoint.path)
        taken[new] = old
    return Planned(Changes(names=names, rename=rename), "renamed", tuple(names))
