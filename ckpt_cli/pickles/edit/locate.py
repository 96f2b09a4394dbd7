"""The places of entries in a graph, where they can be renamed, replaced or taken out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Entry, Tensor
from ckpt_cli.pickles.attributes import GROUPS, Child, Field
from ckpt_cli.pickles.containers import Children, Containers, key_text
from ckpt_cli.pickles.graph import Call, Dict, Graph
from ckpt_cli.pickles.packed import has_parts, packed_parts
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.numpy import object_array
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.tensors.storages import StorageFinder
from ckpt_cli.pickles.walk import Frame, Walk

_Sequence = list[object] | tuple[object, ...]


class NodePlace:
    """One key or index of a container in a graph, and the node that stands there."""

    __slots__ = ("index", "is_keyed", "key", "name", "node", "parent", "sequence")

    def __init__(
        self,
        name: str,
        key: str,
        node: object,
        sequence: _Sequence | Field,
        index: int,
        parent: NodePlace | None,
        *,
        is_keyed: bool,
    ) -> None:
        self.name = name
        """The dotted name of what stands here."""
        self.key = key
        """The last part of that name, as a text."""
        self.node = node
        self.sequence = sequence
        """The pairs, items or tuple that the node is in."""
        self.index = index
        self.parent = parent
        """The place of the container; None for the root."""
        self.is_keyed = is_keyed
        """True if a key stands before the node in the sequence."""

    @property
    def prefix(self) -> str:
        """The dotted name of the container."""
        return self.parent.name if self.parent else ""

    def replace(self, node: object) -> None:
        """Put another node here; a tuple is made again, and put into the place of the old one."""
        self._refuse_packed()
        self.node = node
        if isinstance(self.sequence, Field):
            self.sequence.put(node)
            return
        if isinstance(self.sequence, list):
            self.sequence[self.index] = node
            return
        items = list(self._siblings())
        items[self.index] = node
        self._holder().replace(tuple(items))

    def remove(self) -> None:
        """Take the node out of its container; a tuple is made again. Of one container the last ones go first."""
        self._refuse_packed()
        if isinstance(self.sequence, Field) or (self.parent and isinstance(self.parent.sequence, Field)
                                                and isinstance(self.sequence, tuple)):  # fmt: skip
            raise UnsupportedError(f"{self.name!r} is a part of what an object is made of, so it cannot be removed")
        if isinstance(self.sequence, list):
            del self.sequence[self.index - self.is_keyed : self.index + 1]
            return
        items = list(self._siblings())
        del items[self.index]
        self._holder().replace(tuple(items))

    def _refuse_packed(self) -> None:
        """Raise UnsupportedError for a part of what torch packs by itself: it takes a state as it was written only."""
        at = self.parent
        while at is not None:
            if isinstance(at.node, Call) and has_parts(at.node):
                raise UnsupportedError(
                    f"{self.name!r} is a part of the state of {at.name!r}, which torch packs as it was saved: "
                    "its elements can be set, but it cannot be taken out, cast or replaced"
                )
            at = at.parent

    def _holder(self) -> NodePlace:
        if self.parent is None:
            raise UnsupportedError("the whole of the pickle cannot be changed so")
        return self.parent

    def _siblings(self) -> Sequence[object]:
        """Return the present items of the tuple: other items of it may have been changed before."""
        current = self._holder().node
        if isinstance(current, tuple) or isinstance(self.sequence, Field):
            return current if isinstance(current, tuple) else ()
        return self.sequence

    @property
    def slot(self) -> tuple[int, ...]:
        """The identity of this place in the graph; that of an object with several names is the same for all."""
        if isinstance(self.sequence, Field):
            return self.sequence.slot
        if isinstance(self.sequence, list) or self.parent is None:
            return (id(self.sequence), self.index)
        return (*self.parent.slot, self.index)

    def chain(self) -> Iterator[NodePlace]:
        """The place and all that it lies in, but for the root."""
        at: NodePlace | None = self
        while at is not None and at.parent is not None:
            yield at
            at = at.parent

    def rename(self, key: object) -> None:
        """Put another key before the node."""
        if not self.is_keyed or not isinstance(self.sequence, list):
            raise UnsupportedError(f"{self.name!r} is called by its place in a list, so it cannot get another name")
        self.sequence[self.index - 1] = key

    @property
    def key_node(self) -> object:
        """The key as the graph has it."""
        return self.sequence[self.index - 1] if not isinstance(self.sequence, Field) else None


def places_of(
    graph: Graph, finder: StorageFinder, within: PicklePlace | None = None, entries: Sequence[Entry] = ()
) -> Iterator[tuple[NodePlace, bool]]:
    """Every place from the root on in the document's order, each with whether it is that of an entry.

    `within` is where the pickle stands, where the arrays in it are entries; `entries` are those of the graph in
    order, where they are known: then no tensor is made again.
    """
    budget = WalkBudget(graph.nbytes)
    rebuilder = Rebuilder(CALLS, graph, finder, budget, within)
    walk = _Places(Containers(budget), rebuilder, graph.root, entries)
    return walk.nodes(walk.tensor)


class _Places(Walk[tuple[NodePlace, bool]]):
    """The walk that notes where each node stands: `at` of a frame is the place of the child that was met last."""

    def __init__(self, containers: Containers, rebuilder: Rebuilder, root: object, entries: Sequence[Entry]) -> None:
        super().__init__(containers, rebuilder.is_tensor, root, may_find=rebuilder.may_find)
        self._rebuilder = rebuilder
        self._known = entries
        self._met = 0
        """Entries that were met."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """Return the tensor that a node is: the next entry, where it is a tensor of that name."""
        known = self._known[self._met] if self._met < len(self._known) else None
        if isinstance(known, Tensor) and known.name == name and self._rebuilder.is_tensor(node):
            return known
        return self._rebuilder.tensor(name, node)

    def entry(
        self,
        frame: Frame | None,
        key: str,
        name: str,
        node: object,
        kind: str,  # noqa: ARG002 - as all walks have it
        tensor: Tensor | None,  # noqa: ARG002 - likewise
        *,
        is_again: bool = False,  # noqa: ARG002 - likewise
    ) -> tuple[NodePlace, bool]:
        """Return the place of an entry."""
        self._met += 1
        return _place_in(frame, key, name, node), True

    def container(self, frame: Frame | None, key: str, below: Frame) -> Iterable[tuple[NodePlace, bool]]:
        """Return the place of a container."""
        below.place = _place_in(frame, key, below.name, below.node)
        yield below.place, False

    def below(self, frame: Frame, children: Children) -> Children:
        """The children that a node opens up to, each placed before it is given."""
        node = frame.node
        if type(node) is Dict or type(node) is list or type(node) is tuple:  # which open up to all in their order
            keyed = type(node) is Dict
            sequence: _Sequence = node.pairs if isinstance(node, Dict) else node
            for number, each in enumerate(children):
                frame.at = sequence, 2 * number + 1 if keyed else number, keyed
                yield each
            return
        slots: dict[tuple[str | None, int], list[tuple[_Sequence, int, bool]]] = {}
        for sequence, index, is_keyed in _slots(node):
            key = key_text(sequence[index - 1]) if is_keyed else None
            slots.setdefault((key, id(sequence[index])), []).append((sequence, index, is_keyed))
        for key, child, child_kind in children:
            found = slots.get((key, id(child))) or slots.get((None, id(child)))
            if not found:
                raise UnsupportedError(f"{frame.name or 'the pickle'!r} has its entries in a way that cannot be edited")
            frame.at = found.pop(0) if len(found) > 1 else found[0]
            yield key, child, child_kind

    def further(self, frame: Frame, children: list[Child]) -> Children:
        """The children that it keeps to itself, placed likewise."""
        for child in children:
            frame.at = child.sequence, child.index, child.is_keyed
            yield child.key, child.node, "tensor"


def _place_in(frame: Frame | None, key: str, name: str, node: object) -> NodePlace:
    """Return the place of the child that a frame has met last; of the root, in a list of its own."""
    if frame is None:
        return NodePlace("", "", node, [node], 0, None, is_keyed=False)
    sequence, index, is_keyed = frame.at
    return NodePlace(name, key, node, sequence, index, frame.place, is_keyed=is_keyed)


def _slots(node: object) -> Iterator[tuple[_Sequence, int, bool]]:
    """Every value in a container: the sequence it is in, its index there, whether its key stands before it."""
    if isinstance(node, list | tuple):
        yield from ((node, index, False) for index in range(len(node)))
    elif isinstance(node, Dict):
        yield from _values(node.pairs)
    elif isinstance(node, Call):
        parts = packed_parts(node)
        yield from _of_call(node) if parts is None else _slots(tuple(part for _, part in parts))


def _of_call(node: Call) -> Iterator[tuple[_Sequence, int, bool]]:
    """Every value in an object: in its mapping, its sequence, its arguments and its states."""
    if isinstance(node.pairs, list):
        yield from _values(node.pairs)
    if isinstance(node.items, list):
        yield from _slots(node.items)
    yield from _listed(node.args)
    array = object_array(node)
    if array is not None:
        yield from _slots(array[1])
    for state in node.states:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Dict):
                yield from _attributes(part)


def _values(pairs: list[object]) -> Iterator[tuple[_Sequence, int, bool]]:
    return ((pairs, index, True) for index in range(1, len(pairs), 2))


def _listed(args: object) -> Iterator[tuple[_Sequence, int, bool]]:
    """The values of an `OrderedDict([[key, value], …])`."""
    if isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], list):
        yield from ((item, 1, True) for item in args[0] if isinstance(item, list) and len(item) == 2)


def _attributes(state: Dict) -> Iterator[tuple[_Sequence, int, bool]]:
    """An object's attributes; of a module also what its parameters, buffers and submodules are kept in."""
    for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True):
        if text_of(key) in GROUPS:
            yield from _slots(value)
    yield from _values(state.pairs)
