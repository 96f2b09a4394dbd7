"""The effect of changed keys on every name of a graph, predicted before any is changed.

One object of a pickle may stand under several names: a module that is used twice, a list that two dicts hold. What is
done to it there is done to all of them, which is more than was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import field
from shlex import quote

from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.names import Below
from ckpt_cli.pickles.attributes import Field
from ckpt_cli.pickles.containers import joined
from ckpt_cli.pickles.edit.locate import NodePlace

Slot = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Every place of a graph, and what is about to be done to some of them."""

    places: list[tuple[NodePlace, bool]]
    """Each with whether it is that of an entry."""
    changes: Changes
    renamed: Mapping[Slot, tuple[NodePlace, str]]
    """The places that get other keys."""
    gone: Set[Slot]
    """Those that are taken out."""
    _containers: dict[int, tuple[str, bool]] = field(init=False, repr=False, default_factory=dict)
    """The name of each container afterwards, and whether it is gone, by the identity of its place."""

    def require_as_asked(self, entry: Callable[[str], NodePlace]) -> None:
        """Raise RefusedError where names change, go or get other content that were not to."""
        changed = {entry(name).slot: name for name in (*self.changes.values, *self.changes.tensors)}
        if not (changed or self.renamed or self.gone):
            return
        dropped_below = Below(self.changes.dropped_prefixes)
        keys: dict[tuple[int, str], NodePlace] = {}
        for place, is_entry in self.places:
            name, is_gone = after = self._after(place)
            if not is_entry:
                self._containers[id(place)] = after
            else:
                self._require_entry(place, name, dropped_below, changed, is_gone=is_gone)
            if is_gone:
                self._require_tail(place)
            elif place.parent is not None:
                self._require_one(keys, place)

    def _after(self, place: NodePlace) -> tuple[str, bool]:
        """Return the name of a place afterwards, and whether it is gone; what it lies in was asked for before."""
        if place.parent is None:
            return "", False
        slot = place.slot
        within, is_gone = self._containers.get(id(place.parent), ("", False))
        key = self.renamed[slot][1] if slot in self.renamed else place.key
        return joined(within, key), is_gone or slot in self.gone

    def _require_entry(
        self, place: NodePlace, after: str, below: Below, changed: Mapping[Slot, str], *, is_gone: bool
    ) -> None:
        changes, name = self.changes, place.name
        if is_gone != (name in changes.dropped or name in below):
            raise _shared(f"{name!r} would go as well")
        if not is_gone and after != changes.names.get(name, name):
            self._refuse_container(place)
            raise _shared(f"{name!r} would become {after!r}")
        if changed and not is_gone:
            other = changed.get(place.slot, name)
            if other != name and name not in changes.tensors and name not in changes.values:
                raise _shared(f"{name!r} would change with {other!r}")

    def _refuse_container(self, place: NodePlace) -> None:
        """Refuse to rename a container by one of its entries, where that is why another one changes."""
        for above in place.chain():
            asked = self.renamed[above.slot][0] if above is not place and above.slot in self.renamed else None
            if asked is not None and asked.name == above.name:
                old = next(old for old in self.changes.names if old.startswith(f"{asked.name}."))
                raise leaving(old, self.changes.names[old], asked.name)

    def _require_tail(self, place: NodePlace) -> None:
        """Refuse to take an item out of a list from which another one follows that stays."""
        sequence = place.sequence
        if isinstance(sequence, Field):
            return
        if place.slot not in self.gone or place.is_keyed or place.index + 1 >= len(sequence):
            return
        if (*place.slot[:-1], place.index + 1) not in self.gone:
            raise RefusedError(
                f"{place.name!r} is called by its place in a list, so that without it what follows would be called "
                "otherwise",
                hint="the last items of a list can be removed",
            )

    def _require_one(self, keys: dict[tuple[int, str], NodePlace], place: NodePlace) -> None:
        """Refuse to give two things in one container the same key."""
        slot = place.slot
        key = self.renamed[slot][1] if slot in self.renamed else place.key
        known = keys.setdefault((id(place.parent), key), place)
        if known is not place and (slot in self.renamed or known.slot in self.renamed):
            raise RefusedError(f"{known.name!r} and {place.name!r} would both be called {joined(place.prefix, key)!r}")


def leaving(old: str, new: str, holder: str, root: str = "") -> RefusedError:
    """Return the error for a name that another container would have, perhaps as `root` becomes the whole checkpoint."""
    if root.startswith(f"{holder}."):
        inner = root.removeprefix(f"{holder}.")
        return RefusedError(
            f"{root!r} is not a container of its own: {holder!r} has keys that begin with {f'{inner}.'!r}",
            hint=f"ckpt keep FILE --root {quote(holder)} -o OUT, then ckpt keep OUT --root {quote(inner)}",
        )
    return RefusedError(
        f"{old!r} would leave what it is kept in ({holder!r}) to become {new!r}",
        hint=f"ckpt keep FILE --root {quote(holder.partition('.')[0])} makes that the whole checkpoint first",
    )


def _shared(fault: str) -> RefusedError:
    return RefusedError(f"that cannot be done here, as several names are kept in one object: {fault}")
