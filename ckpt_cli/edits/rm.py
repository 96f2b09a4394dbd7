"""The plans of `rm` and `keep`: take out entries, or all others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.errors import NameNotFoundError, RefusedError, UsageError
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.model.names import Below, Holders, prefixes_of
from ckpt_cli.ops.select import close_names, excluded_names, select_to_edit, split_index

_KEEP = Verb("kept", "keep", between="as")


def plan_rm(checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str] = ()) -> EditPlan:
    """Take out what the arguments select and `exclude` does not; for a prefix, with the container of that name."""
    chosen = chosen_names(checkpoint, arguments, exclude)
    if all(entry.name in chosen for entry in checkpoint.entries):
        raise RefusedError("nothing would be left", path=checkpoint.path)
    prefixes = _prefixes(arguments, chosen)
    if exclude:
        staying = Holders(entry.name for entry in checkpoint.entries if entry.name not in chosen)
        prefixes = {prefix for prefix in prefixes if prefix not in staying}
    changes = Changes(dropped=frozenset(chosen), dropped_prefixes=frozenset(prefixes))
    return EditPlan(
        Verb("removed", "remove"),
        _in_order(checkpoint, chosen),
        changes=changes,
        remaining=_remaining(checkpoint, changes),
    )


def plan_keep(checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str] = ()) -> EditPlan:
    """Take out everything that no argument selects, and what `exclude` selects; no argument selects all."""
    chosen = chosen_names(checkpoint, arguments, exclude)
    dropped = frozenset(entry.name for entry in checkpoint.entries if entry.name not in chosen)
    if not dropped:
        raise RefusedError("that keeps all of it", path=checkpoint.path)
    changes = Changes(dropped=dropped, dropped_prefixes=frozenset(whole_containers(dropped, chosen)))
    return EditPlan(_KEEP, _in_order(checkpoint, chosen), changes=changes, remaining=_remaining(checkpoint, changes))


def _remaining(checkpoint: Checkpoint, changes: Changes) -> tuple[str, ...]:
    """Return the names by which objects still have tensors that go: an LSTM has its weights in a list too."""
    below = Below(changes.dropped_prefixes)
    kept: list[Tensor] = []
    gone: set[object] = set()
    for tensor in checkpoint.tensors:
        if tensor.name in changes.dropped or tensor.name in below:
            gone.add(tensor.view)
        elif tensor.holder is not None:
            kept.append(tensor)
    return tuple(tensor.name for tensor in kept if tensor.view is not None and tensor.view in gone)


def plan_root(checkpoint: Checkpoint, prefix: str) -> EditPlan:
    """Make what is below a prefix the whole checkpoint."""
    dotted = f"{prefix.removesuffix('.')}."
    kept = {entry.name for entry in checkpoint.entries if entry.name.startswith(dotted)}
    known = [entry.name for entry in checkpoint.entries]
    if dotted[:-1] in checkpoint.names and not kept:
        raise RefusedError(
            f"{prefix!r} is an entry itself, with nothing below it",
            path=checkpoint.path,
            hint="--root takes the prefix of several entries; a name alone, without --root, keeps that entry",
        )
    if not kept:
        prefixes = dict.fromkeys(prefixes_of(known))
        raise NameNotFoundError(prefix, close_names(prefix, prefixes), path=checkpoint.path)

    def rename(name: str) -> str:
        return name[len(dotted) :] if name.startswith(dotted) else name

    changes = Changes(
        names={name: rename(name) for name in known if name in kept},
        rename=rename,
        dropped=frozenset(name for name in known if name not in kept),
        root=dotted[:-1],
    )
    return EditPlan(_KEEP, _in_order(checkpoint, kept), changes=changes)


def _in_order(checkpoint: Checkpoint, names: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.name for entry in checkpoint.entries if entry.name in names))


def chosen_names(checkpoint: Checkpoint, arguments: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """Return the names that the arguments select and `exclude` does not; raises RefusedError where none is left."""
    selected = _selected(checkpoint, arguments) if arguments else {entry.name for entry in checkpoint.entries}
    chosen = selected - excluded_names(checkpoint, exclude)
    if not chosen:
        raise RefusedError("--exclude leaves none of the entries that are named", path=checkpoint.path)
    return chosen


def _selected(checkpoint: Checkpoint, arguments: Sequence[str]) -> set[str]:
    """Return the names that the arguments select."""
    chosen: set[str] = set()
    known = {entry.name for entry in checkpoint.entries}
    for argument in arguments:
        for selection in select_to_edit(checkpoint, argument):
            if selection.index is not None or selection.entry.name not in known:
                raise UsageError(f"{argument!r} is a part of a tensor: entries are kept or removed whole")
            chosen.add(selection.entry.name)
    return chosen


def _prefixes(arguments: Iterable[str], chosen: set[str]) -> set[str]:
    """Return the arguments that are prefixes: containers of these names are removed whole."""
    names = (split_index(argument)[0].removesuffix(".") for argument in arguments)
    return {name for name in names if name not in chosen and "*" not in name and "?" not in name}


def whole_containers(dropped: Iterable[str], kept: Iterable[str]) -> set[str]:
    """Return the outermost prefixes below which nothing is kept."""
    needed = Holders(kept)
    return {outermost for name in dropped if (outermost := needed.outermost_without(name)) is not None}
