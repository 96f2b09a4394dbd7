"""Many names of an edit as few: the containers that are meant as a whole, and numbered names together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from ckpt_cli.edits.plan import MANY
from ckpt_cli.errors import some_of
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor


@dataclass(frozen=True, slots=True)
class Folded:
    """Several names as one."""

    name: str
    """A container all of whose entries are meant, or a name with `[N]` for numbers that differ; or one entry."""
    tensors: int
    others: int
    """Non-tensor entries."""
    nbytes: int
    """Bytes of the elements of the tensors."""


def fold_names(checkpoint: Checkpoint, names: Collection[str]) -> list[Folded]:
    """Return the names of entries, in their order, folded by outermost container or else by number."""
    changed = set(names)
    missing = {_outermost(entry.name) for entry in checkpoint.entries if entry.name not in changed}
    inside = Counter(_outermost(name) for name in checkpoint.names)
    tensors: dict[str, int] = {}
    others: set[str] = set()
    for entry in checkpoint.entries:
        if isinstance(entry, Tensor):
            tensors[entry.name] = entry.nbytes
        else:
            others.add(entry.name)
    groups: dict[str, list[str]] = {}
    for name in names:
        outermost = _outermost(name)
        whole = inside[outermost] > 1 and outermost not in missing
        groups.setdefault(outermost if whole else _numbered(name), []).append(name)
    return [
        Folded(
            name if len(group) > 1 else group[0],
            sum(each in tensors for each in group),
            sum(each in others for each in group),
            sum(tensors.get(each, 0) for each in group),
        )
        for name, group in groups.items()
    ]


def _outermost(name: str) -> str:
    return name.partition(".")[0]


def _numbered(name: str) -> str:
    return ".".join("[N]" if part.isdecimal() else part for part in name.split("."))


def reason_lines(reasons: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines for an error: each name with its reason; of many, those of one reason and one container together."""
    for fold in (str, _numbered, _container, _outermost):
        groups: dict[tuple[str, str], list[str]] = {}
        for name, why in reasons:
            groups.setdefault((fold(name), why), []).append(name)
        if len(groups) <= MANY:
            break
    below = ".*" if fold in (_container, _outermost) else ""
    lines = [
        f"{group[0]}: {why}" if len(group) == 1 else f"{name}{below} ({len(group):,} entries): {why}"
        for (name, why), group in groups.items()
    ]
    return some_of(lines)


def _container(name: str) -> str:
    """Return the container that a name lies in, with `[N]` for numbers; an outermost name itself."""
    return _numbered(name.rpartition(".")[0] or name)
