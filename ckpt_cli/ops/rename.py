"""What `rename` does: new names for entries, given one by one, by prefix, by pattern or by a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckpt_cli.changes import Changes
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.model import Checkpoint, Entry
from ckpt_cli.ops.names import close_names
from ckpt_cli.ops.renamings import Renaming, by_expression, by_map, read_map, with_prefix, without_prefix
from ckpt_cli.ops.rewrite import Planned


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that `rename` was asked for."""

    rename: Renaming
    asked: str
    """It, as it was spelled; told where it changes no name."""
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
        old, new = old.removesuffix("."), new.removesuffix(".")
        steps.append(Step(by_map({old: new}), old, [old]))
    if names is not None:
        known = read_map(names)
        steps.append(Step(by_map(known), f"--map {names}", list(known)))
    if strip is not None:
        steps.append(Step(without_prefix(strip), f"--strip {strip}"))
    if sub is not None:
        steps.append(Step(by_expression(*sub), f"--sub {sub[0]}"))
    if add is not None:
        steps.append(Step(with_prefix(add), f"--add {add}"))
    if not steps:
        raise UsageError("say what to rename: OLD NEW, --strip, --add, --sub or --map")
    return steps


def plan_rename(checkpoint: Checkpoint, steps: Sequence[Step]) -> Planned:
    """The changes of a renaming, each step done to what the one before made.

    Raises NameNotFoundError where a name is not there, RefusedError where a step changes nothing or two entries would
    get the same name.
    """
    known = [entry.name for entry in checkpoint.entries]
    parts = [_parts(entry) for entry in checkpoint.entries]
    for step in steps:
        reached = [head + rest for head, rest in parts]
        _require_there(step.wanted, reached, checkpoint.path)
        parts = [_renamed(step, head, rest) for head, rest in parts]
        if reached == [head + rest for head, rest in parts]:
            raise RefusedError(
                f"no name would change by {step.asked!r}",
                path=checkpoint.path,
                hint=f"ckpt ls {checkpoint.path} lists the names",
            )
    names = {old: head + rest for old, (head, rest) in zip(known, parts, strict=True) if head + rest != old}
    _refuse_collisions(checkpoint, known, names)

    def rename(name: str) -> str:
        for step in steps:
            name = step.rename(name)
        return name

    return Planned(Changes(names=names, rename=rename), "renamed", tuple(names))


def _parts(entry: Entry) -> tuple[str, str]:
    """The part of a name that can change, and the rest: what an object keeps to itself has the object's name."""
    at = len(entry.name) if entry.holder is None else len(entry.holder)
    return entry.name[:at], entry.name[at:]


def _renamed(step: Step, head: str, rest: str) -> tuple[str, str]:
    """A name after a step."""
    if not rest:
        return step.rename(head), ""
    dotted = step.rename(f"{head}.") if head else ""
    return (dotted[:-1] if dotted.endswith(".") else head), rest


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


def is_name(text: str) -> bool:
    """Whether a text can be a new name: not empty, no dots at its ends, and such that UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text) and not text.startswith(".") and not text.endswith(".")


def _refuse_collisions(checkpoint: Checkpoint, known: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise RefusedError for a new name that is none, or that two entries would have."""
    taken: dict[str, str] = {}
    for old in known:
        new = names.get(old, old)
        if old in names and not is_name(new):
            raise RefusedError(f"{old!r} would become {new!r}, which is no name", path=checkpoint.path)
        if new in taken and (old in names or taken[new] in names):
            raise RefusedError(
                f"two entries are called {old!r}"
                if taken[new] == old
                else f"{taken[new]!r} and {old!r} would both be called {new!r}",
                path=checkpoint.path,
            )
        taken[new] = old
