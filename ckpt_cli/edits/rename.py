"""The plan of `rename`: new names for entries, given one by one, by prefix, by pattern or by a map."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.rename_hints import containers_of, rename_inside, strip_inside
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.formats import rewriting
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Entry
from ckpt_cli.ops.rename_rules import Renaming, Rule, by_map, in_turn, read_map
from ckpt_cli.ops.select import close_names


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that `rename` was asked for."""

    rename: Renaming
    asked: str
    """The option as it was spelled, for the message that it changes no name."""
    wanted: Sequence[str] = ()
    """Names or prefixes each of which must be there."""
    new: str | None = None
    """The new name of the one wanted name."""
    prefix: str | None = None
    """The prefix that is taken off."""


def renaming(old: str | None, new: str | None, rules: Sequence[Rule]) -> list[Step]:
    """Return the steps of `rename` by its arguments: OLD NEW first, then every option in the order given.

    Raises UsageError for half of it.
    """
    if (old is None) != (new is None):
        raise UsageError("a name is renamed to another: OLD NEW", hint="ckpt rename FILE --strip PREFIX takes one off")
    steps: list[Step] = []
    if old is not None and new is not None:
        old, new = old.removesuffix("."), new.removesuffix(".")
        steps.append(Step(by_map({old: new}), old, [old], new=new))
    steps += map(_step, rules)
    if not steps:
        raise UsageError("say what to rename: OLD NEW, --strip, --add, --sub or --map")
    return steps


def _step(rule: Rule) -> Step:
    if isinstance(rule.value, tuple):
        return Step(rule.renaming(), f"--sub {rule.value[0]}")
    known = read_map(rule.value) if rule.kind == "map" else {}
    prefix = rule.value.removesuffix(".") if rule.kind == "strip" else None
    return Step(rule.renaming(known), f"--{rule.kind} {rule.value}", list(known), prefix=prefix)


def plan_rename(checkpoint: Checkpoint, steps: Sequence[Step]) -> EditPlan:
    """The changes of a renaming, each step done to what the one before made.

    Raises NameNotFoundError where a name is not there, RefusedError where a step changes nothing or two entries would
    get the same name.
    """
    known = [entry.name for entry in checkpoint.entries]
    parts = [_parts(entry) for entry in checkpoint.entries]
    for number, step in enumerate(steps):
        asking = _Asking(checkpoint, steps, number)
        reached = _whole(parts)
        asking.require_there(reached)
        parts = _after(parts, step.rename)
        if reached == _whole(parts):
            raise asking.without_effect(reached)
    names = {old: new for old, new in zip(known, _whole(parts), strict=True) if new != old}
    _refuse_collisions(checkpoint, known, names)
    changes = Changes(names=names, rename=in_turn([step.rename for step in steps]))
    return EditPlan(Verb("renamed", "rename"), tuple(names), changes=changes)


_Part = tuple[str, str]
"""The part of a name that can change, and the rest: what an object keeps to itself has the object's name."""


def _parts(entry: Entry) -> _Part:
    """The parts of an entry's name."""
    at = len(entry.name) if entry.holder is None else len(entry.holder)
    return entry.name[:at], entry.name[at:]


def _whole(parts: Iterable[_Part]) -> list[str]:
    """The names that the parts are of."""
    return [head + rest for head, rest in parts]


def _after(parts: Iterable[_Part], rename: Renaming) -> list[_Part]:
    """The names after a step."""
    return [_renamed(head, rest, rename) for head, rest in parts]


def _renamed(head: str, rest: str, rename: Renaming) -> _Part:
    """A name after a step; the rest follows the object that it hangs on."""
    if not rest:
        return rename(head), ""
    dotted = rename(f"{head}.") if head else ""
    return (dotted[:-1] if dotted.endswith(".") else head), rest


@dataclass(frozen=True, slots=True)
class _Asking:
    """One step of a renaming, in what it is part of."""

    checkpoint: Checkpoint
    steps: Sequence[Step]
    number: int

    @property
    def step(self) -> Step:
        """The step itself."""
        return self.steps[self.number]

    def require_there(self, names: Sequence[str]) -> None:
        """Raise NameNotFoundError for the first wanted name or prefix that no entry has."""
        if not self.step.wanted:
            return
        prefixes = dict.fromkeys(name[:at] for name in names for at, char in enumerate(name) if char == ".")
        there = {*names, *prefixes}
        for name in self.step.wanted:
            if name not in there:
                raise self._not_found(name, names, prefixes)

    def _not_found(self, name: str, names: Sequence[str], prefixes: Iterable[str]) -> NameNotFoundError:
        holders = list(containers_of(name, names))
        close = [f"{holder}.{name}" for holder in holders] or close_names(name, [*names, *prefixes])
        error = NameNotFoundError(name, close, path=self.checkpoint.path)
        if holders and self.step.new is not None:
            command = rename_inside(self.checkpoint.path, name, self.step.new, holders[0], self._attempt)
            error.hint = f"{error.hint} {command}" if command else error.hint
        return error

    def without_effect(self, names: Sequence[str]) -> RefusedError:
        """Return the error for a step that changes no name, with the place of the prefix that it should take off."""
        path, prefix = self.checkpoint.path, self.step.prefix
        problem, hint = f"no name would change by {self.step.asked!r}", f"ckpt ls {shlex.quote(path)} lists the names"
        holders = containers_of(prefix, names, below=True) if prefix else {}
        if prefix and holders:
            where = ", ".join(f"behind {f'{holder}.'!r} ({count})" for holder, count in holders.items())
            problem = f"{problem}: names have {f'{prefix}.'!r} {where}"
            hint = strip_inside(path, prefix, list(holders), self._attempt, alone=len(self.steps) == 1)
        return RefusedError(problem, path=path, hint=hint)

    def _attempt(self, instead: Renaming) -> None:
        """Carry out all steps with another one in the place of this, short of writing; the checkpoint is used up."""
        renamings = [step.rename for step in self.steps]
        renamings[self.number] = instead
        known = [entry.name for entry in self.checkpoint.entries]
        parts = [_parts(entry) for entry in self.checkpoint.entries]
        for rename in renamings:
            parts = _after(parts, rename)
        names = {old: new for old, new in zip(known, _whole(parts), strict=True) if new != old}
        _refuse_collisions(self.checkpoint, known, names)
        rewriting(self.checkpoint, Changes(names=names, rename=in_turn(renamings)))


def is_name(text: str) -> bool:
    """True if a text can be a new name: not empty, no dots at its ends, and such that UTF-8 can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return bool(text) and not text.startswith(".") and not text.endswith(".")


def _refuse_collisions(checkpoint: Checkpoint, known: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise RefusedError for a new name that is not valid, or that two entries would have."""
    taken: dict[str, str] = {}
    for old in known:
        new = names.get(old, old)
        if old in names and not is_name(new):
            raise RefusedError(f"{old!r} would become {new!r}, which is not a valid name", path=checkpoint.path)
        if new in taken and (old in names or taken[new] in names):
            raise RefusedError(
                f"two entries are called {old!r}"
                if taken[new] == old
                else f"{taken[new]!r} and {old!r} would both be called {new!r}",
                path=checkpoint.path,
            )
        taken[new] = old
