"""Edits as functions with the names and options of the commands; each returns what the command's JSON report says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ckpt_cli.api.checkpoint import texts
from ckpt_cli.api.request import Path, path_of, request
from ckpt_cli.api.values import Assignments, assignments_of
from ckpt_cli.edits.plan import EditOptions
from ckpt_cli.errors import UsageError, about
from ckpt_cli.render.edits import to_json
from ckpt_cli.render.json import json_text

if TYPE_CHECKING:
    from ckpt_cli.edits.plan import Planner
    from ckpt_cli.ops.match_states import State
    from ckpt_cli.ops.rename_rules import Rule

Report = dict[str, Any]
"""What a command prints with `--json`, as docs/json.md describes it."""


def report_of(facts: object) -> Report:
    """Return facts as JSON has them: lists for tuples, no NaN."""
    report: Report = json.loads("".join(json_text(facts)))
    return report


def options_of(output: Path | None, dry_run: bool, backup: bool, weights_only: bool) -> EditOptions:
    """Return the options that every edit has."""
    where = None if output is None else os.fspath(output)
    return EditOptions(where, dry_run, backup, weights_only=weights_only)


def edit_with(path: Path, plan: Planner, options: EditOptions) -> Report:
    """Carry out an edit, all or nothing."""
    from ckpt_cli.edits.transaction import transaction

    with request():
        return report_of(to_json(transaction(path_of(path), plan, options)))


def set(  # noqa: A001
    path: Path,
    assignments: Assignments,
    *,
    cast: bool = False,
    new: bool = False,
    dtype: str | None = None,
    replace: Mapping[str, float] | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Set elements, slices or whole tensors, and other values, as `ckpt set` with these options.

    `assignments` maps `NAME` or `NAME[INDEX]` to numbers, lists, arrays, tensors, texts or None; a key that ends in
    `+=`, `-=`, `*=` or `/=` changes what is there. A list has them as on the command line: `["2.weight[0,0]=100"]`,
    or with `new` an expression, `["qkv.weight=cat(q.weight, k.weight, v.weight)"]`.
    With `replace`, such as `{"nan": 0}`, `assignments` is a list of names. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.expression_tensors import sources
    from ckpt_cli.edits.set import plan_set
    from ckpt_cli.edits.set_new import dtype_of_new
    from ckpt_cli.edits.set_replace import plan_replace, replacements_of
    from ckpt_cli.parallel.map import workers

    options = options_of(output, dry_run, backup, weights_only)
    if replace is not None:
        if new or cast or dtype is not None or isinstance(assignments, Mapping | str):
            raise UsageError("replace takes a list of names, and goes with none of new, cast and dtype")
        names, values = [*assignments], replacements_of([f"{kind}={value}" for kind, value in replace.items()])
        with workers(0) as executor:
            return edit_with(path, lambda checkpoint: plan_replace(checkpoint, names, values, executor), options)
    if dtype is not None and not new:
        raise UsageError("dtype is that of new tensors: it goes with new=True")
    wanted = None if dtype is None else dtype_of_new(dtype)
    with assignments_of(assignments) as made, workers(0) as executor, sources(executor) as of:
        return edit_with(
            path,
            lambda checkpoint: plan_set(checkpoint, made, cast=cast, new=new, dtype=wanted, of=of),
            options,
        )


def rename(
    path: Path,
    old: str | None = None,
    new: str | None = None,
    *,
    strip: str | Sequence[str] = (),
    add: str | Sequence[str] = (),
    sub: Sequence[tuple[str, str]] = (),
    map: Path | Mapping[str, str] | None = None,  # noqa: A002
    pattern: str | Sequence[str] = (),
    like: Path | None = None,
    guess: bool = False,
    of: str | None = None,
    other_of: str | None = None,
    optimizer: str | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Rename entries, as `ckpt rename` with these options: `old` to `new`, then `strip`, `add`, `sub`, `map`
    and `pattern`, of which several (`layers.{n}.*=layers.{n+2}.*`) go at once.

    `sub` has pairs of a regular expression and its replacement; `map` is a dict of names or prefixes, or a JSON file.
    `like` takes the names that load_state_dict of another checkpoint needs. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.optimizer import carrying
    from ckpt_cli.edits.rename import plan_rename, renaming
    from ckpt_cli.edits.rename_like import plan_rename_like
    from ckpt_cli.ops.rename_rules import Rule

    rules = _rules(texts(strip), texts(add), sub, map)
    rules += [Rule("pattern", text) for text in texts(pattern)]
    options = options_of(output, dry_run, backup, weights_only)
    if like is not None:
        if old is not None or rules:
            raise UsageError("like finds the new names by itself: give no others")
        model = _model_at(os.fspath(like), other_of)
        plan = carrying(lambda checkpoint: plan_rename_like(checkpoint, model, of, guess=guess), optimizer)
        return edit_with(path, plan, options)
    if guess or of is not None or other_of is not None:
        raise UsageError("guess, of and other_of go with like")
    steps = renaming(old, new, rules)
    return edit_with(path, carrying(lambda checkpoint: plan_rename(checkpoint, steps), optimizer), options)


def _rules(
    strip: Sequence[str], add: Sequence[str], sub: Sequence[tuple[str, str]], names: Path | Mapping[str, str] | None
) -> list[Rule]:
    from ckpt_cli.ops.rename_rules import Rule

    rules = [Rule("strip", prefix) for prefix in strip] + [Rule("add", prefix) for prefix in add]
    rules += [Rule("sub", (pattern, replacement)) for pattern, replacement in sub]
    if names is not None:
        rules.append(Rule("map", names if isinstance(names, Mapping) else os.fspath(names)))
    return rules


def _model_at(path: str, prefix: str | None) -> State:
    """Return the names that the model in a file has, or those of what `ckpt ls --json` printed."""
    from ckpt_cli.formats import open_checkpoint
    from ckpt_cli.ops.match_states import listing_of, state_of

    with request(), about(path := path_of(path)):
        listing = listing_of(path, prefix)
        if listing is not None:
            return listing
        with closing(open_checkpoint(path)) as checkpoint:
            return state_of(checkpoint, prefix, aliases=True)


def rm(
    path: Path,
    *names: str,
    exclude: str | Sequence[str] = (),
    optimizer: str | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Take entries out, as `ckpt rm` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.optimizer import carrying
    from ckpt_cli.edits.rm import plan_rm

    _require(names, "rm")
    options = options_of(output, dry_run, backup, weights_only)
    return edit_with(path, carrying(lambda checkpoint: plan_rm(checkpoint, names, texts(exclude)), optimizer), options)


def keep(
    path: Path,
    *names: str,
    exclude: str | Sequence[str] = (),
    root: str | None = None,
    optimizer: str | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Take all entries out but some, as `ckpt keep` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.optimizer import carrying
    from ckpt_cli.edits.rm import plan_keep, plan_root

    options = options_of(output, dry_run, backup, weights_only)
    if (root is None) == (not names and not exclude):
        raise UsageError("keep takes names or exclude, or root")
    if root is not None:
        prefix = root
        return edit_with(path, lambda checkpoint: plan_root(checkpoint, prefix), options)
    plan = carrying(lambda checkpoint: plan_keep(checkpoint, names, texts(exclude)), optimizer)
    return edit_with(path, plan, options)


def cast(
    path: Path,
    dtype: str,
    *names: str,
    exclude: str | Sequence[str] = (),
    lossy: bool = False,
    raw: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Give floating tensors another dtype, as `ckpt cast` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.cast import dtype_named, plan_cast
    from ckpt_cli.parallel.map import workers

    target = dtype_named(dtype)
    with workers(0) as executor:
        return edit_with(
            path,
            lambda checkpoint: plan_cast(
                checkpoint, target, names, exclude=texts(exclude), lossy=lossy, raw=raw, executor=executor
            ),
            options_of(output, dry_run, backup, weights_only),
        )


def resize(
    path: Path,
    sizes: Mapping[str, int | str],
    *,
    std: float = 0.02,
    seed: int = 0,
    optimizer: str | None = None,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Give tensors more or fewer rows, as `ckpt resize` with these options.

    `sizes` has the rows of each name, `32064` or `"32064:zero"`. Raises CkptError, OSError.
    """
    from ckpt_cli.edits.resize import ResizeOptions, plan_resize, resize_of
    from ckpt_cli.parallel.map import workers

    asked = [resize_of(f"{name}={rows}") for name, rows in sizes.items()]
    with workers(0) as executor:
        options = ResizeOptions(std, seed, optimizer, executor)
        return edit_with(
            path,
            lambda checkpoint: plan_resize(checkpoint, asked, options),
            options_of(output, dry_run, backup, weights_only),
        )


def tie(
    path: Path,
    *names: str,
    force: bool = False,
    new: bool = False,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Make several names one tensor, as `ckpt tie` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.tie import plan_tie

    _require(names, "tie")
    options = options_of(output, dry_run, backup, weights_only)
    return edit_with(path, lambda checkpoint: plan_tie(checkpoint, names, force=force, new=new), options)


def untie(
    path: Path,
    *names: str,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Give tensors storages of their own, as `ckpt untie` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.tie import plan_untie

    _require(names, "untie")
    return edit_with(
        path,
        lambda checkpoint: plan_untie(checkpoint, names),
        options_of(output, dry_run, backup, weights_only),
    )


def _require(names: Sequence[str], command: str) -> None:
    if not names:
        raise UsageError(f"{command} takes names")


def to(
    path: Path,
    device: str,
    *,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Change the device that torch.load puts tensors on, as `ckpt to`. Raises CkptError, OSError."""
    from ckpt_cli.edits.to import device_named, plan_to

    wanted = device_named(device)
    options = options_of(output, dry_run, backup, weights_only)
    return edit_with(path, lambda checkpoint: plan_to(checkpoint, wanted), options)


def compact(
    path: Path,
    *,
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Write each storage no larger than its tensors need, as `ckpt compact`. Raises CkptError, OSError."""
    from ckpt_cli.edits.tie import plan_compact

    return edit_with(path, plan_compact, options_of(output, dry_run, backup, weights_only))


def meta(
    path: Path,
    changes: Mapping[str, str] | None = None,
    *,
    delete: str | Sequence[str] = (),
    output: Path | None = None,
    dry_run: bool = False,
    backup: bool = False,
    weights_only: bool = False,
) -> Report:
    """Set and remove strings of a safetensors file's metadata, as `ckpt meta`; without changes, return the strings.

    Raises CkptError, OSError.
    """
    from ckpt_cli.edits.meta import metadata_of, plan_meta, require_texts, strings_of_set
    from ckpt_cli.formats import open_checkpoint
    from ckpt_cli.render.meta import to_json as strings_json

    pairs, gone = dict(changes or {}), texts(delete)
    if pairs or gone:
        require_texts(pairs)
        options = options_of(output, dry_run, backup, weights_only)
        return edit_with(path, lambda checkpoint: plan_meta(checkpoint, pairs, gone), options)
    with request(), about(place := path_of(path)), closing(open_checkpoint(place)) as checkpoint:
        return report_of(strings_json(metadata_of(checkpoint, ()), strings_of_set(checkpoint)))


def undo(path: Path, *, force: bool = False, dry_run: bool = False) -> Report:
    """Restore the newest backup that an edit kept, as `ckpt undo` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.undo import undo as restore

    with request():
        return report_of(to_json(restore(os.fspath(path), force=force, dry_run=dry_run)))


def apply(
    path: Path,
    recipe: Path | Mapping[str, Any],
    output: Path,
    *,
    dry_run: bool = False,
    weights_only: bool = False,
) -> Report:
    """Carry out a recipe, a TOML file or what one parses to, as `ckpt apply`. Raises CkptError, OSError."""
    from ckpt_cli.edits.apply import plan_apply
    from ckpt_cli.edits.expression_sources import sources
    from ckpt_cli.edits.recipe import read_recipe, recipe_of
    from ckpt_cli.parallel.map import workers

    steps = recipe_of(recipe) if isinstance(recipe, Mapping) else read_recipe(os.fspath(recipe))
    with workers(0) as executor, sources(executor) as of:
        options = options_of(output, dry_run, False, weights_only)
        return edit_with(path, lambda checkpoint: plan_apply(checkpoint, steps, of), options)


def index(folder: Path, *, dry_run: bool = False, backup: bool = False) -> Report:
    """Write the index of a folder of shards, as `ckpt index` with these options. Raises CkptError, OSError."""
    from ckpt_cli.edits.index import index as write

    with request():
        return report_of(to_json(write(os.fspath(folder), EditOptions(dry_run=dry_run, backup=backup))))
