"""The plan of `graft`: the tensors of one checkpoint in the places of those of another, or of a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Region
from ckpt_cli.budget import Budget
from ckpt_cli.edits.convert_contents import elements, is_as_stored
from ckpt_cli.edits.plan import EditPlan, Verb
from ckpt_cli.edits.set_tensors import also_changed
from ckpt_cli.edits.taken import Taken
from ckpt_cli.errors import NameNotFoundError, RefusedError, UnsupportedError, UsageError, about, listed, some_of
from ckpt_cli.files.copy import PIECE
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.places import exists
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.aliasing import all_strided, by_storage, content_digest, partly_shared, tied_names

if TYPE_CHECKING:
    from concurrent.futures import Executor

GRAFT = Verb("grafted", "graft")

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Each tensor that gets other elements, and the tensor that these are from."""


def source_of(argument: str) -> tuple[str, str]:
    """Return the path and the prefix of `FILE:PREFIX`; a path that is there wins."""
    path, colon, prefix = argument.rpartition(":")
    if colon and path and "/" not in prefix and not exists(argument):
        return path, prefix.removesuffix(".")
    return argument, ""


def plan_graft(
    base: Checkpoint,
    other: Checkpoint,
    prefix: str,
    at: str | None,
    *,
    add: bool = False,
    partial: bool = False,
    executor: Executor | None = None,
) -> EditPlan:
    """Put the tensors of another checkpoint, or those below `prefix` in it, in the places of those below `at`.

    They are patched in where dtypes are the same, and tied names follow. `at` is `prefix` if it is None. With `add`
    names may be new, with `partial` some may stay as they are. The other checkpoint has to stay open.

    Raises RefusedError where names or shapes differ, UnsupportedError for tensors that are not strided.
    """
    theirs = _below(other, prefix or other.weights)
    place = (prefix if at is None else at.removesuffix(".")) or base.weights
    ours = _below(base, place, required=not add)
    inside = f"{place}." if place else ""
    _require_names(base, other, ours, theirs, add=add, partial=partial)
    pairs = [(ours[rest], tensor) for rest, tensor in theirs.items() if rest in ours]
    _require_shapes(other, pairs)
    _require_ties(base, other, pairs)
    added = {inside + rest: tensor for rest, tensor in theirs.items() if rest not in ours}
    changed = (*(tensor.name for tensor, _ in pairs), *added)
    also = also_changed(base, [(tensor, Region.of(tensor)) for tensor, _ in pairs if tensor.storage], changed)
    if not added and all(_fits(target, tensor) for target, tensor in pairs):
        budget = Budget.of(other)
        for _, tensor in pairs:
            budget.read(tensor, Region.of(tensor))

        def patch(opened: Checkpoint, overlay: Overlay) -> None:
            del opened  # nothing is rewritten, so it is the one that was planned for
            for target, tensor in pairs:
                _patch(overlay, target, other, tensor)

        return EditPlan(GRAFT, changed, also, patch=patch)
    return EditPlan(GRAFT, changed, also, changes=_changes(base, other, pairs, added, executor))


def _below(checkpoint: Checkpoint, prefix: str, *, required: bool = True) -> dict[str, Tensor]:
    """Return the tensors below a prefix by the rest of their names; raises NameNotFoundError where there are none."""
    inside = f"{prefix}." if prefix else ""
    found = {
        tensor.name[len(inside) :]: tensor
        for tensor in checkpoint.tensors
        if tensor.name.startswith(inside) and tensor.holder is None
    }
    if found or not required:
        return found
    if not prefix:
        raise RefusedError("it has no tensors", path=checkpoint.path)
    from ckpt_cli.model.names import prefixes_of
    from ckpt_cli.ops.select import close_names

    known = dict.fromkeys(prefixes_of(entry.name for entry in checkpoint.entries))
    raise NameNotFoundError(prefix, close_names(prefix, known), path=checkpoint.path)


def _require_names(
    base: Checkpoint,
    other: Checkpoint,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    add: bool,
    partial: bool,
) -> None:
    new = [rest for rest in theirs if rest not in ours]
    if new and not add:
        raise RefusedError(
            f"it lacks {len(new)} of the {len(theirs)} names of {other.path}",
            path=base.path,
            details=some_of(new),
            hint="--add adds them; --at PREFIX says where they belong",
        )
    staying = [rest for rest in ours if rest not in theirs]
    if staying and not partial:
        raise RefusedError(
            f"it has {len(staying)} of {len(ours)} names that {other.path} lacks",
            path=base.path,
            details=some_of(staying),
            hint="--partial leaves them as they are",
        )


def _require_shapes(other: Checkpoint, pairs: Pairs) -> None:
    differ = [
        f"{target.name} is {list(target.shape or ())}, and {list(tensor.shape or ())} in {other.path}"
        for target, tensor in pairs
        if target.shape != tensor.shape or target.layout != tensor.layout
    ]
    if differ:
        raise RefusedError(f"{len(differ)} of its tensors have other shapes", details=some_of(differ))


def _require_ties(base: Checkpoint, other: Checkpoint, pairs: Pairs) -> None:
    """Raise RefusedError where bytes that tensors have in common would have to be two things at once."""
    sources = {target.name: tensor for target, tensor in pairs}
    digests: dict[object, tuple[str, object]] = {}
    budget = Budget.of(base)
    for _, views in by_storage(all_strided(base.tensors)):
        if len(views) < 2 or sources.keys().isdisjoint(view.name for view in views):
            continue
        met, _rest = partly_shared(views, budget)
        if not sources.keys().isdisjoint(view.name for view in met):
            raise RefusedError(
                f"{listed([view.name for view in met], 3)} share some of their bytes",
                path=base.path,
                hint="ckpt untie gives each bytes of its own",
            )
        for view in views:
            tensor = sources.get(view.name)
            if tensor is None or tensor.storage is None:
                continue
            digest = tensor.view or content_digest(other, tensor)
            name, known = digests.setdefault(view.view, (view.name, digest))
            if known != digest and content_digest(other, sources[name]) != content_digest(other, tensor):
                raise RefusedError(
                    f"{name} and {view.name} are tied, and differ in {other.path}",
                    path=base.path,
                    hint="ckpt untie gives each bytes of its own",
                )


def _fits(target: Tensor, tensor: Tensor) -> bool:
    """True if the elements of a tensor can be written over those of another one, where they lie."""
    if target.dtype is not tensor.dtype or target.layout != "strided" or target.storage is None:
        return False
    if tensor.storage is None or not is_as_stored(target):
        return False
    with suppress(UnsupportedError):
        begin, end = target.span
        target.storage.extents(begin, end - begin)
        return True
    return False


def _patch(overlay: Overlay, target: Tensor, other: Checkpoint, tensor: Tensor) -> None:
    """Put the elements of a tensor into an overlay over those of another one, a piece at a time."""
    if target.storage is None or not target.numel:
        return
    place, _ = target.span
    with about(other.path):
        for piece in elements(other, tensor, PIECE):
            overlay.scatter(target.storage.extents(place, len(piece)), bytes(piece))
            place += len(piece)


def _changes(
    base: Checkpoint, other: Checkpoint, pairs: Pairs, added: Mapping[str, Tensor], executor: Executor | None
) -> Changes:
    """Return new tensors for old ones and all that are tied to these, and those that are added."""
    if base.fixed:
        raise UsageError(base.fixed, path=base.path)
    taken = Taken(other, executor)
    tied = tied_names(base.tensors)
    by_name = {tensor.name: tensor for tensor in base.tensors}
    tensors: dict[str, Tensor] = {}
    for target, tensor in pairs:
        for name in tied.get(target.name, [target.name]):
            tensors[name] = taken.tensor(tensor, name, like=by_name[name])
    new = {name: taken.tensor(tensor, name) for name, tensor in added.items()}
    return Changes(tensors=tensors, added=new, contents=taken.contents())
