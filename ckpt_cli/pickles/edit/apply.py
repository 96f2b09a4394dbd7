"""Changes of names and values carried out on a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from ckpt_cli.errors import RefusedError, UnsupportedError, UsageError
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Entry
from ckpt_cli.model.names import Below, Holders
from ckpt_cli.pickles.containers import key_text
from ckpt_cli.pickles.edit.locate import NodePlace, places_of
from ckpt_cli.pickles.edit.preflight import Outcome, leaving
from ckpt_cli.pickles.edit.retype import retyped
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph
from ckpt_cli.pickles.nn_module import notes_of, tend_notes
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.storages import StorageFinder


class Editing:
    """A graph in the middle of an edit, with the place of every entry. The graph itself is changed.

    Raises RefusedError or UnsupportedError for what the graph cannot say, such as a name that would leave its
    container.
    """

    def __init__(
        self, graph: Graph, finder: StorageFinder, within: PicklePlace | None = None, entries: Sequence[Entry] = ()
    ) -> None:
        """Begin an edit; `within` is where the pickle stands, `entries` are those of the graph where they are known."""
        self.graph = graph
        self._every: list[tuple[NodePlace, bool]] = list(places_of(graph, finder, within, entries))
        self._top = self._every[0][0]
        self._new_root: NodePlace | None = None
        self._entries: dict[str, NodePlace] = {}
        self._containers: dict[str, NodePlace] = {}
        self._twice: set[str] = set()
        self.filled: set[str] = set()
        """Entries that are none any more: mappings that were empty, and have got something."""
        for place, is_entry in self._every:
            known = self._entries if is_entry else self._containers
            if place.name in known and place is not self._top:
                self._twice.add(place.name)
            if is_entry or place is not self._top:
                known[place.name] = place

    @property
    def root(self) -> object:
        """The root by now."""
        return (self._new_root or self._top).node

    def entry(self, name: str) -> NodePlace:
        """The place of an entry; refused where several entries have the name."""
        place = self._entries.get(name)
        if place is None:
            raise UnsupportedError(f"{name!r} has its place where it cannot be changed")
        if name in self._twice:
            raise RefusedError(f"several entries are called {name!r}, and it is not clear which one is meant")
        return place

    def carry_out(self, changes: Changes, tensors: Mapping[str, Call] | None = None) -> None:
        """Do everything but what concerns tensors that are there; `tensors` are the nodes of new ones.

        Nothing is done where all of it cannot be done as asked.
        """
        root = self._containers.get(changes.root) if changes.root else None
        renamed = {} if root is not None else self._new_keys(changes)
        gone = [] if root is not None else self._taken_out(changes)
        if root is None:
            Outcome(self._every, changes, renamed, {place.slot for place in gone}).require_as_asked(self.entry)
        for name, value in changes.values.items():
            place = self.entry(name)
            node = retyped(name, value, place.node, cast=changes.cast)
            place.replace(node_of(value, like=place.node) if node is None else node)
        freed = {place.slot for place in (*(place for place, _ in renamed.values()), *gone)}
        for name, value in changes.added.items():
            tensor = tensors.get(name) if tensors is not None else None
            self._add(name, node_of(value) if tensor is None else tensor, freed, is_tensor=tensor is not None)
        if root is not None:  # all else goes with what it hangs in
            self._new_root = root
            return
        for place, key in renamed.values():
            place.rename(_key_like(place.key_node, key))
        self._drop(gone)
        holders = [("", self._top.node), *((name, place.node) for name, place in self._containers.items())]
        tend_metadata(holders, self._entries, changes)

    # --- names -------------------------------------------------------------------------------------------------------

    def _new_keys(self, changes: Changes) -> dict[tuple[int, ...], tuple[NodePlace, str]]:
        """Return the places that get other keys, each in the innermost container in which that gives the new name.

        Where such keys contradict each other, each container on the way gets the name that the renaming gives it.
        """
        try:
            return self._keys(changes, innermost=True)
        except RefusedError:
            with suppress(RefusedError):
                return self._keys(changes, innermost=False)
            raise

    def _keys(self, changes: Changes, *, innermost: bool) -> dict[tuple[int, ...], tuple[NodePlace, str]]:
        """Return the places that get other keys; raises RefusedError where two names need two keys in one place."""
        wanted: dict[tuple[int, ...], tuple[NodePlace, str]] = {}
        for old, new in changes.names.items():
            if old in changes.dropped:
                continue
            entry = self.entry(old)
            single = _single_level_of(entry, old, new) if innermost else []
            for place, key in single or _levels_of(entry, old, new, changes):
                if not place.is_keyed:
                    raise UnsupportedError(
                        f"{place.name!r} is called by its place in a list, so it cannot get another name"
                    )
                known = wanted.setdefault(place.slot, (place, key))
                if known[1] != key:
                    raise RefusedError(f"{old!r} cannot become {new!r} while what it is kept in becomes {known[1]!r}")
        return wanted

    def _taken_out(self, changes: Changes) -> list[NodePlace]:
        """The entries that go, and the containers that go with all that is in them."""
        places = [self._containers[name] for name in changes.dropped_prefixes if name in self._containers]
        whole = {place.name for place in places}
        for name in changes.dropped:
            place = self.entry(name)
            if not any(above.name in whole for above in place.chain()):
                places.append(place)
        return places

    def _drop(self, places: list[NodePlace]) -> None:
        """Take places out of what they are in, the last ones first, so that the others stay where they are."""
        for place in sorted({place.slot: place for place in places}.values(), key=lambda place: -place.index):
            holder = place.parent.node if place.parent else None
            place.remove()
            if isinstance(holder, Call) and isinstance(holder.args, tuple):  # an OrderedDict([[key, value], …])
                for listed in holder.args:
                    if isinstance(listed, list):
                        listed[:] = [item for item in listed if item != []]

    def _add(self, name: str, node: object, freed: Collection[tuple[int, ...]], *, is_tensor: bool) -> None:
        """Put a node under a new name into the innermost container that the name lies in.

        The keys of places in `freed`, whose nodes get another name or go, may be taken.
        """
        prefix, _, key = name.rpartition(".")
        while prefix and self._holder(prefix) is self._top:
            prefix, _, outer = prefix.rpartition(".")
            key = f"{outer}.{key}"
        holder = self._holder(prefix)
        if prefix in self._entries and holder is self._entries[prefix]:
            self.filled.add(prefix)
        pairs = _pairs_of(holder.node, is_tensor=is_tensor)
        if pairs is None:
            raise UnsupportedError(
                f"{prefix!r} is not a mapping that a new name could be put into"
                if prefix
                else "the pickle is not a mapping"
            )
        _refuse_attribute(holder.node, key, prefix)
        staying = [known for place, known in enumerate(pairs[::2]) if (id(pairs), 2 * place + 1) not in freed]
        pairs.extend((_new_key(staying, key, prefix), node))

    def _holder(self, prefix: str) -> NodePlace:
        """Return the place of the container of a name, maybe an empty mapping; the root's where there is none."""
        place = self._containers.get(prefix) if prefix else None
        if place is None and prefix in self._entries and _is_empty_mapping(self._entries[prefix].node):
            place = self._entries[prefix]
        return place or self._top


def tend_metadata(holders: Iterable[tuple[str, object]], names: Iterable[str], changes: Changes) -> None:
    """Rename and drop what state_dicts note about modules (torch/nn/modules/module.py, `_metadata`).

    `holders` are the containers by their names, `names` those of all entries.
    """
    if changes.rename is None and not changes.dropped:
        return
    gone, kept = list[str](), list[str]()
    below = Below(changes.dropped_prefixes)
    for name in names if changes.dropped or below else ():
        (gone if name in changes.dropped or name in below else kept).append(name)
    left, stayed = Holders(gone), Holders(kept)

    def is_gone(module: str) -> bool:
        return module != "" and module in left and module not in stayed

    for prefix, holder in holders:
        for pairs in notes_of(holder):
            tend_notes(pairs, f"{prefix}." if prefix else "", changes.rename, is_gone)


def _single_level_of(place: NodePlace, old: str, new: str) -> list[tuple[NodePlace, str]]:
    """Return the innermost place whose key alone has to change so that `old` becomes `new`, with its new key."""
    for at in place.chain():
        prefix, rest = f"{at.prefix}." if at.prefix else "", old[len(at.name) :]
        key = new[len(prefix) : len(new) - len(rest)]
        if key and new == prefix + key + rest:
            return [(at, key)]
    return []


def _levels_of(place: NodePlace, old: str, new: str, changes: Changes) -> list[tuple[NodePlace, str]]:
    """Return the places on the way whose keys change by the renaming, so that `old` becomes `new`."""
    found: list[tuple[NodePlace, str]] = []
    reached = ""
    for at in reversed(list(place.chain())):
        dotted = f"{reached}." if reached else ""
        names = (new,) if at is place else _names_of(at, changes.rename)
        key = next((name[len(dotted) :] for name in names if f"{new}.".startswith(f"{name}.")), at.key)
        reached = dotted + key
        if not key or not f"{new}.".startswith(f"{reached}."):
            raise leaving(old, new, place.prefix, changes.root)
        if key != at.key:
            found.append((at, key))
    return found


def _names_of(container: NodePlace, rename: Callable[[str], str] | None) -> tuple[str, ...]:
    """Return the names that a renaming may give a container, as the beginning of other names or by itself."""
    if rename is None:
        return ()
    return rename(f"{container.name}.").removesuffix("."), rename(container.name)


def _key_like(old: object, key: str) -> object:
    """A key as a node, of the type that the old one has where the text allows it."""
    if isinstance(old, int) and not isinstance(old, bool) and key.lstrip("-").isdecimal():
        return int(key)
    return key


def _is_empty_mapping(node: object) -> bool:
    """True if it is a mapping that has nothing in it, which is an entry itself."""
    if isinstance(node, Call):
        return isinstance(node.func, Global) and node.func.name == "OrderedDict" and not node.pairs and not node.args
    return isinstance(node, Dict) and not node.pairs


def _pairs_of(holder: object, *, is_tensor: bool = False) -> list[object] | None:
    """The pairs to which a mapping's or an object's new key is added; a module's new tensor is one of its buffers."""
    if isinstance(holder, Dict):
        return holder.pairs
    if isinstance(holder, Call):
        if _is_empty_mapping(holder):
            holder.pairs = []
        if isinstance(holder.pairs, list):
            return holder.pairs
        if isinstance(holder.func, Global) and holder.func.name == "OrderedDict":
            return None  # of Python 2, which has its pairs among the arguments
        state = next((state for state in holder.states if isinstance(state, Dict)), None)
        if state is not None:
            buffers = _value_of(state, "_buffers") if is_tensor else None
            return state.pairs if buffers is None else _pairs_of(buffers)
    return None


def _value_of(mapping: Dict, key: str) -> object:
    """Return the value of a key; None where it is not there."""
    pairs = zip(mapping.pairs[::2], mapping.pairs[1::2], strict=True)
    return next((value for known, value in pairs if text_of(known) == key), None)


def _refuse_attribute(holder: object, key: str, prefix: str) -> None:
    """Refuse a name that an object has for something else, and one with dots, which no attribute has."""
    states = [state for state in holder.states if isinstance(state, Dict)] if isinstance(holder, Call) else []
    if states and isinstance(holder, Call) and not isinstance(holder.pairs, list):
        if "." in key:
            raise RefusedError(f"{prefix or 'the whole'!r} is an object, which has no attribute called {key!r}")
        if any(key_text(known) == key for state in states for known in state.pairs[::2]):
            raise RefusedError(f"{prefix or 'the whole'!r} has an attribute {key!r} already")


def _new_key(keys: Sequence[object], key: str, prefix: str) -> object:
    """The key of something new beside others: a number where all of them are; refused where it is there already."""
    if any(key_text(known) == key for known in keys):
        raise RefusedError(f"{key!r} is in {prefix or 'the top'!r} already, though no entry is called so")
    if keys and all(isinstance(known, int) and not isinstance(known, bool) for known in keys):
        if not key.isdecimal():
            raise RefusedError(f"the keys of {prefix or 'the top'!r} are numbers, and {key!r} is not one")
        return int(key)
    return key


def node_of(value: object, like: object = None) -> object:
    """Plain data as a node; a list is a tuple where `like` is one."""
    if isinstance(value, dict):
        return Dict([item for key, inner in value.items() for item in (key, node_of(inner))])
    if isinstance(value, list | tuple):
        items = [node_of(item) for item in value]
        return tuple(items) if isinstance(like, tuple) or isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"a {type(value).__name__} is not a plain value")
