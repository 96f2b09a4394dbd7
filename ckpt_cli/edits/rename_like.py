"""The plan of `rename --like`: the names under which a model would load the state_dict."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace

from ckpt_cli.edits.plan import EditPlan, Fit
from ckpt_cli.edits.rename import Step, plan_rename
from ckpt_cli.errors import RefusedError
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.match import Match, command_of, compare, match, renamed
from ckpt_cli.ops.match_cures import Cure, module_renaming
from ckpt_cli.ops.match_states import EXTRA, State, state_of
from ckpt_cli.ops.rename_rules import Renaming


def plan_rename_like(checkpoint: Checkpoint, model: State, of: str | None, *, guess: bool) -> EditPlan:
    """Plan the renaming after which the most names are those of the model.

    Raises RefusedError where there is none, where several are equally good, or where it is a guess and those are not
    wanted.
    """
    found = match(state_of(checkpoint, of), model)
    cure = _settled(found, guess=guess)
    names = {found.a.full(old): found.a.full(new) for old, new in cure.names.items()}
    after = compare(renamed(found.a, cure.names), model)
    sizes = tuple(size.name for size in after.sizes)
    fit = Fit(model.path, after.loads, tuple(after.missing), tuple(after.unexpected), sizes)
    return replace(plan_rename(checkpoint, [Step(_by_names(names), f"--like {model.path}")]), fit=fit)


def _settled(found: Match, *, guess: bool) -> Cure:
    """Return the renaming that is beyond doubt, or the best one where it may be a guess."""
    path, model = found.a.path, found.b.path
    if not found.cures:
        problem = "its names are those already" if found.loads else "no renaming makes more names fit"
        hint = None if found.loads else f"ckpt match {shlex.quote(path)} {shlex.quote(model)} says what differs"
        raise RefusedError(f"{problem}: {model}", path=path, hint=hint)
    best = found.cures[0]
    if best.equal:
        raise RefusedError(
            f"{len(found.cures)} renamings are equally good, and it is not clear which one is meant",
            path=path,
            details=[_described(found, cure) for cure in found.cures],
        )
    if best.guess and not guess:
        raise RefusedError(
            "the best renaming is a guess, by order, place and shape",
            path=path,
            details=[_described(found, cure) for cure in found.cures],
            hint="--guess carries it out; with -n it is only shown",
        )
    return best


def _described(found: Match, cure: Cure) -> str:
    """Return the command of a renaming; where that is `--like` itself, its first names."""
    words = command_of(found, cure)
    if "--like" not in words:
        return shlex.join(words)
    old, new = next(iter(cure.names.items()))
    more = f" and {len(cure.names) - 1} more" if len(cure.names) > 1 else ""
    return f"{old} to {new}{more}"


def _by_names(names: Mapping[str, str]) -> Renaming:
    """Return the renaming of entries; modules, aliases and the parts of extra states follow their tensors."""
    module = module_renaming(names)

    def rename(name: str) -> str:
        if name in names:
            return names[name]
        if name.endswith("."):
            new = module(name[:-1])
            return f"{new}." if new else ""
        at = name.find(f"{EXTRA}.")
        if at >= 0 and name[: at + len(EXTRA)] in names:
            return names[name[: at + len(EXTRA)]] + name[at + len(EXTRA) :]
        return name

    return rename
