"""The plan of `rename`: new names for entries, given one by one, by prefix, by pattern or by a map."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from ckpt_cli.edits.new_names import is_name
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import CkptError, NameNotFoundError, RefusedError, UsageError
from ckpt_cli.facts import dataclass
from ckpt_cli.formats import rewriting
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Entry
from ckpt_cli.model.names import Holders, prefixes_of
from ckpt_cli.ops.rename_patterns import by_patterns, is_pattern
from ckpt_cli.ops.rename_rules import Renaming, Rule, by_map, in_turn, plain_map, read_map
from ckpt_cli.ops.select import close_names


@dataclass(frozen=True, slots=True)
class Step:
    """One option, or pair of arguments, of `rename`."""

    rename: Renaming
    asked: str
    """The option as it was spelled, for the message that it changes no name."""
    wanted: Sequence[str] = ()
    """Names or prefixes that must all be there."""
    new: str | None = None
    """The new name of the one wanted name."""
    prefix: str | None = None
    """The prefix that is taken off."""


def renaming(old: str | None, new: str | None, rules: Sequence[Rule]) -> list[Step]:
    """Return the steps of `rename` by its arguments: OLD NEW first, then every option in the order given.

    Raises UsageError for half of it.
    """
    patterns = [Rule("pattern", word) for word in (old, new) if word is not None and is_pattern(word)]
    if old is not None and len(patterns) == 1 + (new is not None):
        old, new, rules = None, None, [*patterns, *rules]
    if (old is None) != (new is None):
        raise UsageError("a name is renamed to another: OLD NEW", hint="ckpt rename FILE --strip PREFIX takes one off")
    steps: list[Step] = []
    if old is not None and new is not None:
        old, new = old.removesuffix("."), new.removesuffix(".")
        steps.append(Step(by_map({old: new}), old, [old], new=new))
    for kind, group in groupby(rules, lambda rule: rule.kind):
        if kind == "pattern":  # one after the other they would rename what the one before made
            texts = [str(rule.value) for rule in group]
            steps.append(Step(by_patterns(texts), " ".join(texts)))
        else:
            steps += map(_step, group)
    if not steps:
        raise UsageError("say what to rename: OLD NEW, --strip, --add, --sub or --map")
    return steps


def _step(rule: Rule) -> Step:
    if isinstance(rule.value, tuple):
        return Step(rule.renaming(), f"--sub {rule.value[0]}")
    if not isinstance(rule.value, str):
        known = plain_map(rule.value)
        return Step(by_map(known), "the map", list(known))
    known = read_map(rule.value) if rule.kind == "map" else {}
    prefix = rule.value.removesuffix(".") if rule.kind == "strip" else None
    return Step(rule.renaming(known), f"--{rule.kind} {rule.value}", list(known), prefix=prefix)


def plan_rename(checkpoint: Checkpoint, steps: Sequence[Step]) -> EditPlan:
    """Plan a renaming: each step renames what the step before it made.

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
"""The part of a name that can change, and the rest: a private attribute is named after its object."""


def _parts(entry: Entry) -> _Part:
    """Return the two parts of an entry's name."""
    at = len(entry.name) if entry.holder is None else len(entry.holder)
    return entry.name[:at], entry.name[at:]


def _whole(parts: Iterable[_Part]) -> list[str]:
    """Return whole names."""
    return [head + rest for head, rest in parts]


def _after(parts: Iterable[_Part], rename: Renaming) -> list[_Part]:
    """Return the names after a step."""
    return [_renamed(head, rest, rename) for head, rest in parts]


def _renamed(head: str, rest: str, rename: Renaming) -> _Part:
    """Return a name after a step; the rest follows the object that it belongs to."""
    if not rest:
        return rename(head), ""
    dotted = rename(f"{head}.") if head else ""
    return (dotted[:-1] if dotted.endswith(".") else head), rest


@dataclass(frozen=True, slots=True)
class _Asking:
    """One step of a renaming, with the others."""

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
        known, holders = set(names), Holders(names)
        for name in self.step.wanted:
            if name not in known and name not in holders:
                raise self._not_found(name, names)

    def _not_found(self, name: str, names: Sequence[str]) -> NameNotFoundError:
        holders = list(containers_of(name, names))
        close = [f"{holder}.{name}" for holder in holders] or close_names(
            name, [*names, *dict.fromkeys(prefixes_of(names))]
        )
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
        """Carry out all steps with another renaming in place of this one, short of writing.

        The checkpoint must not be used afterwards: its document has changed.
        """
        renamings = [step.rename for step in self.steps]
        renamings[self.number] = instead
        known = [entry.name for entry in self.checkpoint.entries]
        parts = [_parts(entry) for entry in self.checkpoint.entries]
        for rename in renamings:
            parts = _after(parts, rename)
        names = {old: new for old, new in zip(known, _whole(parts), strict=True) if new != old}
        _refuse_collisions(self.checkpoint, known, names)
        rewriting(self.checkpoint, Changes(names=names, rename=in_turn(renamings)))


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


# --- hints -----------------------------------------------------------------------------------------------------------
# Training checkpoints keep the names of a model behind that of a container: Lightning's
# `state_dict.model.layer.weight`. A name or prefix that is not at the top is looked for inside containers, and a
# command is offered only after it was tried, short of writing.

Attempt = Callable[[Renaming], object]
"""A function that raises CkptError where entries cannot get the names that a renaming gives them."""

_MOST = 3
"""Containers that are named."""


def containers_of(prefix: str, names: Iterable[str], *, below: bool = False) -> dict[str, int]:
    """Return what precedes a prefix inside names, with the number of names, the most frequent first.

    Unless something must stand `below` it, a name may also end there.
    """
    counts: Counter[str] = Counter()
    for name in names:
        at = (name if below else f"{name}.").find(f".{prefix}.")
        if at > 0:
            counts[name[:at]] += 1
    return dict(counts.most_common(_MOST))


def strip_inside(path: str, prefix: str, holders: Sequence[str], attempt: Attempt, *, alone: bool) -> str:
    """Return the command that strips a prefix inside containers: all of them, or the first that allows it.

    `alone` is True if nothing else is renamed. Where containers nest, so that no name can move up, the command writes
    the innermost one as a checkpoint of its own.
    """
    for some in (list(holders), *([holder] for holder in holders if len(holders) > 1)):
        rules = [
            Rule("sub", (f"^{re.escape(f'{holder}.{prefix}.')}", f"{holder}.".replace("\\", r"\\"))) for holder in some
        ]
        if _works(in_turn([rule.renaming() for rule in rules]), attempt):
            if alone and len(some) == 1:
                return _command("rename", path, f"{some[0]}.{prefix}", some[0])
            words = [word for rule in rules for word in ("--sub", *rule.value)]
            return _command("rename", path, *words) if alone else f"in its place: {shlex.join(words)}"
    return _command("keep", path, "--root", f"{holders[0]}.{prefix}", "-o", "OUT")


def rename_inside(path: str, old: str, new: str, holder: str, attempt: Attempt) -> str | None:
    """Return the command that renames within a container; None where it would be refused."""
    inner = (f"{holder}.{old}", f"{holder}.{new}")
    return _command("rename", path, *inner) if _works(by_map(dict([inner])), attempt) else None


def _works(renaming: Renaming, attempt: Attempt) -> bool:
    try:
        attempt(renaming)
    except CkptError:
        return False
    return True


def _command(command: str, path: str, *words: str) -> str:
    return shlex.join(["ckpt", command, path, *words])
