"""Hints of `rename` for a name or prefix that is not at the top of a checkpoint but inside one of its containers.

Training checkpoints keep the names of a model behind that of a container: Lightning's `state_dict.model.layer.weight`.
A command is offered only after it was tried, short of writing.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ckpt_cli.errors import CkptError
from ckpt_cli.ops.rename_rules import Renaming, Rule, by_map, in_turn

Attempt = Callable[[Renaming], object]
"""Raises CkptError where the entries cannot get the names that a renaming gives them."""

_MOST = 3
"""Containers that are named."""


def containers_of(prefix: str, names: Iterable[str], *, below: bool = False) -> dict[str, int]:
    """Return what precedes a prefix inside the names of entries, with the number of them, the most frequent first.

    Unless something must stand `below` it, a name may also end there.
    """
    counts: Counter[str] = Counter()
    for name in names:
        at = (name if below else f"{name}.").find(f".{prefix}.")
        if at > 0:
            counts[name[:at]] += 1
    return dict(counts.most_common(_MOST))


def strip_inside(path: str, prefix: str, holders: Sequence[str], attempt: Attempt, *, alone: bool) -> str:
    """The command that strips a prefix inside containers: all of them, or the first that allows it.

    `alone` says that nothing else is renamed. Where containers nest, so that no name can move up, it is the command
    that writes the innermost one as a checkpoint of its own.
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
    """The command that renames within a container what was looked for at the top; None where it cannot."""
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
