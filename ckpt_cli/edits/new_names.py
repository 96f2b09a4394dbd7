"""Names of new entries: whether a text can be one, and whether there is room for it in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_cli.edits.rename import is_name
from ckpt_cli.errors import RefusedError, UsageError
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Value
from ckpt_cli.ops.select import is_glob


def name_of_new(name: str) -> str:
    """Return a name that a new entry can have; raises UsageError for any other."""
    if not is_name(name) or ".." in name or is_glob(name):
        raise UsageError(f"{name!r} is not a name for a new entry")
    return name


def require_room(checkpoint: Checkpoint, name: str, added: Mapping[str, object]) -> None:
    """Raise RefusedError where a new name is there already, or is a prefix of another name or has one as its prefix.

    The prefix may be an empty container, which then is filled.
    """
    if name in added:
        raise RefusedError(f"{name!r} is given twice")
    for other in added:
        if name.startswith(f"{other}.") or other.startswith(f"{name}."):
            raise RefusedError(f"{name!r} and {other!r} cannot both be entries")
    for entry in checkpoint.entries:
        if entry.name.startswith(f"{name}."):
            raise RefusedError(f"{name!r} is what {entry.name!r} lies in", path=checkpoint.path)
        if name.startswith(f"{entry.name}.") and not _is_empty(entry):
            raise RefusedError(f"{entry.name!r} is an entry itself, so nothing can lie in it", path=checkpoint.path)


def _is_empty(entry: Entry) -> bool:
    """True for an empty mapping, which is an entry until something is put into it."""
    return isinstance(entry, Value) and (
        entry.value == {} or (isinstance(entry.value, Opaque) and entry.value.text == "OrderedDict()")
    )
