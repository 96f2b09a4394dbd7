"""Changes of names and values carried out on a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ckpt_cli.changes import Changes
from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError
from ckpt_cli.pickles.arguments import text_of
from ckpt_cli.pickles.embedded import Place as Within
from ckpt_cli.pickles.graph import Call, Dict, Graph
from ckpt_cli.pickles.places import Place, places_of
from ckpt_cli.pickles.rebuild import StorageFinder


class Editing:
    """A graph in the middle of an edit, with the place of every entry. The graph itself is changed.

    Raises RefusedError or UnsupportedError for what the graph cannot say, such as a name that would leave its
    container.
    """

    def __init__(self, graph: Graph, finder: StorageFinder, within: Within | None = None) -> None:
        self.graph = graph
        self.root = graph.root
        self._entries: dict[str, Place] = {}
        self._containers: dict[str, Place] = {}
        self._twice: set[str] = set()
        for place, is_entry in places_of(graph, finder, within):
            known = self._entries if is_entry else self._containers
            if place.name in known:
                self._twice.add(place.name)
            known[place.name] = place

    def entry(self, name: str) -> Place:
        """The place of an entry; refused where several entries have the name."""
        place = self._entries.get(name)
        if place is None:
            raise UnsupportedError(f"{name!r} is the whole of the pickle, so it cannot be changed by itself")
        if name in self._twice:
            raise RefusedError(f"several entries are called {name!r}, and it cannot be told which one is meant")
        return place

    def carry_out(self, changes: Changes) -> None:
        """Do everything but what concerns tensors."""
        for name, value in changes.values.items():
            place = self.entry(name)
            place.replace(node_of(value, like=place.node))
        for name, value in changes.added.items():
            self._add(name, value)
        root = self._containers.get(changes.root) if changes.root else None
        if root is not None:  # all else goes with what it hangs in
            self.root = root.node
            return
        self._rename(changes.names, changes.dropped)
        self._drop(changes)
        if changes.rename is not None or changes.dropped:
            self._tend_metadata(changes)

    # --- names -------------------------------------------------------------------------------------------------------

    def _rename(self, names: Mapping[str, str], dropped: frozenset[str]) -> None:
        """Give entries new keys, each in the innermost container in which that gives the new name."""
        wanted: dict[tuple[int, int], tuple[Place, str]] = {}
        for old, new in names.items():
            if old in dropped:
                continue
            place, key = _level_of(self.entry(old), old, new)
            known = wanted.setdefault((id(place.sequence), place.index), (place, key))
            if known[1] != key:
                raise RefusedError(f"{old!r} cannot become {new!r} while what it is kept in becomes {known[1]!r}")
        if any(place is not self._entries.get(place.name) for place, _ in wanted.values()):
            self._require_all_below(names, dropped, wanted)
        for place, key in wanted.values():
            place.rename(_key_like(place.key_node, key))

    def _require_all_below(
        self, names: Mapping[str, str], dropped: frozenset[str], wanted: Mapping[tuple[int, int], tuple[Place, str]]
    ) -> None:
        """Refuse to rename a container that has an entry which is to be called otherwise."""
        for name, entry in self._entries.items():
            at = entry.parent
            while at is not None and name not in dropped:
                place, key = wanted.get((id(at.sequence), at.index), (None, ""))
                renamed = f"{at.prefix}." if at.prefix else ""
                if place is not None and names.get(name, name) != f"{renamed}{key}{name[len(at.name) :]}":
                    raise _leaving(next(old for old in names if old.startswith(f"{at.name}.")), names, at.name)
                at = at.parent

    def _drop(self, changes: Changes) -> None:
        """Take entries, and containers with all that is in them, out of what they are in."""
        places = [self._containers[name] for name in changes.dropped_prefixes if name in self._containers]
        inside = tuple(f"{place.name}." for place in places)
        places += [self.entry(name) for name in changes.dropped if not name.startswith(inside)]
        by_sequence: dict[int, list[Place]] = {}
        for place in places:
            by_sequence.setdefault(id(place.sequence), []).append(place)
        for group in by_sequence.values():
            ordered = sorted(group, key=lambda place: place.index, reverse=True)
            _require_the_last(ordered)
            for place in ordered:
                _take_out(place)

    def _add(self, name: str, value: object) -> None:
        """Put a value under a new name into the innermost container that the name lies in."""
        prefix, _, key = name.rpartition(".")
        while prefix and prefix not in self._containers:
            prefix, _, outer = prefix.rpartition(".")
            key = f"{outer}.{key}"
        place = self._containers.get(prefix)
        holder = self.graph.root if place is None else place.node
        pairs = _pairs_of(holder)
        if pairs is None:
            raise UnsupportedError(
                f"{prefix!r} is no mapping that a new name could be put into" if prefix else "the pickle is no mapping"
            )
        pairs.extend((key, node_of(value)))

    # --- `_metadata` -------------------------------------------------------------------------------------------------

    def _tend_metadata(self, changes: Changes) -> None:
        """Rename and drop what state_dicts note about modules (torch/nn/modules/module.py, `_metadata`)."""
        holders = [("", self.graph.root), *((name, place.node) for name, place in self._containers.items())]
        gone, kept = set[str](), set[str]()
        for name in self._entries:
            (gone if _is_dropped(name, changes) else kept).update(_modules_of(name))
        for prefix, holder in holders:
            for pairs in _metadata_of(holder):
                _tend(pairs, f"{prefix}." if prefix else "", changes.rename, gone - kept)


def _modules_of(name: str) -> Iterable[str]:
    """Every prefix of a name: the modules that it lies in."""
    end = name.rfind(".")
    while end > 0:
        yield name[:end]
        end = name.rfind(".", 0, end)


def _is_dropped(name: str, changes: Changes) -> bool:
    return name in changes.dropped or any(name.startswith(f"{prefix}.") for prefix in changes.dropped_prefixes)


def _level_of(place: Place, old: str, new: str) -> tuple[Place, str]:
    """The place whose key must change so that `old` becomes `new`, and its new key."""
    at: Place | None = place
    while at is not None:
        prefix, rest = f"{at.prefix}." if at.prefix else "", old[len(at.name) :]
        key = new[len(prefix) : len(new) - len(rest)]
        if key and new == prefix + key + rest:
            return at, key
        at = at.parent
    raise _leaving(old, {old: new}, place.prefix)


def _leaving(old: str, names: Mapping[str, str], holder: str) -> RefusedError:
    """What is wrong with a name that another container would have."""
    return RefusedError(
        f"{old!r} would leave what it is kept in ({holder!r}) to become {names[old]!r}",
        hint=f"ckpt keep FILE --root {holder.partition('.')[0]} makes that the whole checkpoint first",
    )


def _require_the_last(places: Sequence[Place]) -> None:
    """Refuse to take places, in falling order, out of a list before others: these would get other names."""
    for number, place in enumerate(places, 1):
        if not place.is_keyed and place.index != len(place.sequence) - number:
            raise RefusedError(
                f"{place.name!r} is called by its place in a list, so that without it what follows would be called "
                "otherwise"
            )


def _key_like(old: object, key: str) -> object:
    """A key as a node, of the type that the old one has where the text allows it."""
    if isinstance(old, int) and not isinstance(old, bool) and key.lstrip("-").isdecimal():
        return int(key)
    return key


def _take_out(place: Place) -> None:
    sequence = place.sequence
    if not isinstance(sequence, list):
        if place.parent is None:
            raise UnsupportedError(f"{place.name!r} is a part of a tuple that is the whole of the pickle")
        current = place.parent.node
        items = list(current if isinstance(current, tuple) else sequence)
        del items[place.index]
        place.parent.replace(tuple(items))
    elif place.is_keyed:
        del sequence[place.index - 1 : place.index + 1]
    else:
        del sequence[place.index]


def _pairs_of(holder: object) -> list[object] | None:
    """The pairs to which a mapping's or an object's new key is added."""
    if isinstance(holder, Dict):
        return holder.pairs
    if isinstance(holder, Call):
        if isinstance(holder.pairs, list):
            return holder.pairs
        for state in holder.states:
            if isinstance(state, Dict):
                return state.pairs
    return None


def _metadata_of(holder: object) -> Iterable[list[object]]:
    """The pairs of a state_dict's `_metadata`."""
    for state in holder.states if isinstance(holder, Call) else ():
        if isinstance(state, Dict):
            for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True):
                pairs = value.pairs if isinstance(value, Call | Dict) else None
                if text_of(key) == "_metadata" and isinstance(pairs, list):
                    yield pairs


def _tend(pairs: list[object], prefix: str, rename: Callable[[str], str] | None, gone: set[str]) -> None:
    """Rename the modules in some pairs, and drop those that are gone."""
    found: dict[str, tuple[object, object]] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        module = text_of(key)
        if module is None or f"{prefix}{module}" in gone:
            continue
        new = _module_name(module, prefix, rename)
        if new in found and new == module:
            continue  # another module took its place: a wrapper gives way to what it wraps
        found[new] = (key if new == module else new, value)
    pairs[:] = [item for pair in found.values() for item in pair]


def _module_name(module: str, prefix: str, rename: Callable[[str], str] | None) -> str:
    """What a module is called once the names in it are changed."""
    if rename is None or not module:
        return module
    dotted = rename(f"{prefix}{module}.")
    if not dotted.startswith(prefix) or not (dotted.endswith(".") or dotted == prefix):
        return module
    return dotted[len(prefix) :].removesuffix(".")


def node_of(value: object, like: object = None) -> object:
    """Plain data as a node; a list is a tuple where `like` is one."""
    if isinstance(value, dict):
        return Dict([item for key, inner in value.items() for item in (key, node_of(inner))])
    if isinstance(value, list | tuple):
        items = [node_of(item) for item in value]
        return tuple(items) if isinstance(like, tuple) or isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"a {type(value).__name__} is no plain value")
