"""The walk over a graph that gives its entries their names: depth first, in the document's order, without recursion.

What is open to all is listed under each of its names. What an object keeps to itself is listed once for each name of
that object, and only as far as it is not open elsewhere, so that objects that know each other do not multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.pickles.attributes import Child, Hidden
from ckpt_cli.pickles.containers import Children, Containers
from ckpt_cli.pickles.graph import SCALARS, Call, Dict, Graph, Set

T = TypeVar("T")
"""The result of a walk for each node."""


class Frame:
    """A node that is open in a walk, with those of its children that are still to be met."""

    __slots__ = ("at", "children", "holder", "is_extra", "name", "node", "place", "seen")

    def __init__(self, name: str, node: object, seen: set[int] | None, holder: str | None) -> None:
        self.name = name
        self.node = node
        self.children: Iterator[tuple[str, Any, str]] = iter(())
        self.seen = seen
        """The nodes opened of what the same holder keeps to itself; None for what is open to all."""
        self.holder = holder
        """The name of that holder."""
        self.is_extra = False
        """True where the children are those that the node does not open up to by itself."""
        self.place: Any = None
        """The place of the node, in a walk over places."""
        self.at: Any = None
        """The place of the child that was met last, in such a walk."""


class Walk(Generic[T]):
    """One walk over a graph, with the nodes that are open in it, outermost first."""

    def __init__(
        self, containers: Containers, is_tensor: Callable[[object], bool], root: object, *, may_find: bool = True
    ) -> None:
        """Walk below `root`; `may_find` is false where there can be no tensor in the graph."""
        self._containers = containers
        self._hidden = Hidden(containers.budget, is_tensor, containers.state, containers.opened_by, possible=may_find)
        self._root = root
        self._frames: list[Frame] = []
        self._open: set[int] = set()
        self._public: set[int] | None = None

    def nodes(self, tensor_of: Callable[[str, object], Tensor | None]) -> Iterator[T]:
        """Every node from the root on, containers before what is in them, as `entry` and `container` make of it.

        `tensor_of` makes the tensor that a node is, under a name; None for a node that is not one.
        Raises LimitError where containers nest too deep, or where there are too many names.
        """
        root = self._root
        tensor = tensor_of("", root)
        below = None if tensor is not None else self._opened("", root, "tensor", None)
        if below is None:
            yield self.entry(None, "", "", root, "tensor", tensor)
            return
        yield from self.container(None, "", below)
        self._push(below)
        pay_for = self._containers.budget.name
        while self._frames:
            frame = self._frames[-1]
            prefix = frame.name
            for key, node, kind in frame.children:
                name = f"{prefix}.{key}" if prefix and key else prefix or key  # as `joined` has it
                pay_for(name)
                if type(node) in SCALARS:  # which neither open up nor make a tensor
                    yield self.entry(frame, key, name, node, kind, None)
                    continue
                tensor = tensor_of(name, node)
                if tensor is not None:
                    yield self.entry(frame, key, name, node, kind, tensor)
                elif self._is_again(node, frame):
                    yield self.entry(frame, key, name, node, kind, None, is_again=True)
                elif (below := self._opened(name, node, kind, frame)) is None:
                    yield self.entry(frame, key, name, node, kind, None)
                else:
                    yield from self.container(frame, key, below)
                    self._push(below)
                    break
            else:
                self._advance(frame)

    def entry(
        self,
        frame: Frame | None,
        key: str,
        name: str,
        node: object,
        kind: str,
        tensor: Tensor | None,
        *,
        is_again: bool = False,
    ) -> T:
        """Make something of an entry: a tensor, or a node that does not open up.

        `frame` is what it was met in, None for the root; `kind` what a tensor here is, such as `parameter`;
        `is_again` is true for what is not opened as it is open above or elsewhere.
        """
        raise NotImplementedError

    def container(self, frame: Frame | None, key: str, below: Frame) -> Iterable[T]:  # noqa: ARG002 - for some walks
        """Make something of a node that opens up, before its children are met."""
        return ()

    def below(self, frame: Frame, children: Children) -> Children:  # noqa: ARG002 - for walks over places
        """The children that a frame's node opens up to."""
        return children

    def further(self, frame: Frame, children: list[Child]) -> Children:  # noqa: ARG002 - likewise
        """The children that it keeps to itself."""
        return ((child.key, child.node, "tensor") for child in children)

    def _opened(self, name: str, node: object, kind: str, within: Frame | None) -> Frame | None:
        """Return a frame for a node; None for a leaf."""
        children = self._containers.children(node, kind)
        if children is None and type(node) is not Call and type(node) is not Set:
            return None
        frame = Frame(name, node, within.seen if within else None, within.holder if within else None)
        if children is not None:
            frame.children = self.below(frame, children)
            return frame
        return frame if self._turn(frame, opened=False) else None

    def _push(self, frame: Frame) -> None:
        if len(self._frames) > limits.NESTING:
            raise LimitError(f"its containers nest deeper than {limits.NESTING}", fixed=True)
        self._open.add(id(frame.node))
        if frame.seen is not None:
            frame.seen.add(id(frame.node))
        self._frames.append(frame)

    def _is_again(self, node: object, within: Frame) -> bool:
        """True if a node is not to be opened here, as it is open above, or elsewhere."""
        if id(node) in self._open:
            return True
        if within.seen is None or type(node) is tuple:  # a tuple is made of its items wherever it stands
            return False
        return id(node) in within.seen or id(node) in self._all_public()

    def _advance(self, frame: Frame) -> None:
        """Go on to what a frame's node keeps to itself, or leave it."""
        if frame.is_extra or not self._turn(frame, opened=True):
            self._frames.pop()
            self._open.discard(id(frame.node))

    def _turn(self, frame: Frame, *, opened: bool) -> bool:
        """Turn to the children that a frame's node does not open up to; False where there are none."""
        children = self._hidden.further(self._containers.unwrapped(frame.node), opened=opened)
        if not children:
            return False
        frame.is_extra = True
        if frame.seen is None:
            frame.seen, frame.holder = {id(frame.node)}, frame.name
        frame.children = iter(self.further(frame, children))
        return True

    def _all_public(self) -> set[int]:
        """Return the identities of all nodes that are open to all."""
        if self._public is None:
            self._public = _public_nodes(self._containers, self._hidden.is_tensor, self._root)
        return self._public


def _public_nodes(containers: Containers, is_tensor: Callable[[object], bool], root: object) -> set[int]:
    """Return the identities of the nodes below a root that open up without what any keeps to itself."""
    found: set[int] = set()
    agenda = [root]
    while agenda:
        node = agenda.pop()
        if id(node) in found or is_tensor(node):
            continue
        children = containers.children(node, "tensor")
        if children is not None:
            found.add(id(node))
            agenda.extend(child for _, child, _ in children if isinstance(child, Dict | Call | list | tuple))
    return found


def tensors_within(
    graph: Graph, is_tensor: Callable[[object], bool], budget: WalkBudget
) -> Callable[[str, object], Sequence[tuple[str, object]]]:
    """Return a function that finds the tensors in something that hangs on another tensor, with their names below that.

    What is open to all is not looked into, and each container only once for all tensors.
    """
    containers = Containers(budget)
    hidden = Hidden(budget, is_tensor, containers.state, containers.opened_by)
    public = _public_nodes(containers, is_tensor, graph.root)
    known: dict[int, list[tuple[str, object]]] = {}

    def find(key: str, root: object) -> list[tuple[str, object]]:
        found = known.setdefault(id(root), [])
        agenda = [] if found or not hidden.holds(root) else [("", root)]
        while agenda:
            name, node = agenda.pop()
            if id(node) in public:
                continue
            if type(node) is not tuple:
                public.add(id(node))
            opened = containers.children(node, "tensor")
            children = hidden.further(node, opened=opened is not None)
            below = [
                *((key, child) for key, child, _ in opened or ()),
                *((child.key, child.node) for child in children),
            ]
            deeper: list[tuple[str, object]] = []
            for key, child in below:
                if hidden.holds(child):
                    budget.name(inner := f"{name}.{key}" if key else name)
                    found_here = found if is_tensor(child) else deeper
                    found_here.append((inner, child))
            agenda.extend(reversed(deeper))
        return [(key + name, node) for name, node in found]

    return find
