"""A graph flattened to named entries: dicts, lists and objects open up, everything else is a leaf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Protocol

from ckpt_cli.budget import WalkBudget
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.model.checkpoint import AGAIN, Entry, Opaque, Tensor, Value
from ckpt_cli.pickles.containers import SCALARS, SETTING, Children, Containers, is_ordered_dict, key_text
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.numpy import array_text, numpy_scalar
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.tensors.storages import StorageFinder
from ckpt_cli.pickles.walk import Frame, Walk

_CHECK_EVERY = 1 << 12

_NUMBERS = frozenset([int, float, bool, type(None)])
"""The types of values that are themselves and cost nothing."""


class Opening(Protocol):
    """The ways of a pickler other than Python's."""

    def unwrap(self, node: Call) -> object:
        """Return what a call only wraps to say its type, or the call itself."""

    def kinds(self, node: Call) -> Mapping[str, str]:
        """Return the kinds of those attributes of an object that its class declares to be parameters or buffers."""


_PLAIN_GLOBALS = frozenset(
    ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch.Size",
     "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage"]
)  # fmt: skip
"""Globals that say nothing of what a checkpoint holds: plain tensors and dicts need them."""


def entries_of(
    graph: Graph,
    finder: StorageFinder,
    opening: Opening | None = None,
    *,
    place: PicklePlace | None = None,
    rebuilder: type[Rebuilder] = Rebuilder,
) -> list[Entry]:
    """Every leaf of the graph under its dotted name, in the document's order; `opening` is a pickler's own manner.

    `place` is where the pickle stands, for the storages whose bytes are within it.
    Raises MalformedError for tensors that do not fit their storages, LimitError where shared containers multiply.
    """
    budget = WalkBudget(graph.nbytes)
    made = rebuilder(CALLS, graph, finder, budget, place)
    leaves = _Leaves(_OpenedBy(budget, opening) if opening else Containers(budget), made, graph.root, opening)
    entries = leaves.nodes(made.tensor)
    found: list[Entry] = []
    while more := list(islice(entries, _CHECK_EVERY)):
        found += more
        budget.check(len(found))
    return found


def objects_of(graph: Graph) -> list[str]:
    """The names that the pickle would import, without those that every plain state_dict needs."""
    return [node.qualified for node in graph.globals if not _is_plain(node)]


def _is_plain(node: Global) -> bool:
    if node.module == "torch" and node.name in BY_NAME:
        return True
    return node.qualified in _PLAIN_GLOBALS or node.name.endswith("Storage")


def top_level_of(graph: Graph) -> list[str]:
    """The outermost keys, where the pickle holds a mapping."""
    if isinstance(graph.root, Dict | Call):
        return [key if type(key) is str else key_text(key) for key in graph.root.pairs[::2]]
    return []


class _OpenedBy(Containers):
    """The containers of a pickler that does some things in its own way."""

    def __init__(self, budget: WalkBudget, opening: Opening) -> None:
        super().__init__(budget)
        self._opening = opening

    def unwrapped(self, node: object) -> object:
        """Return what a node only wraps; the node itself where it wraps nothing."""
        return self._opening.unwrap(node) if isinstance(node, Call) else node

    def children(self, node: object, kind: str) -> Children | None:
        """Return what opens up below a node or what it only wraps; None for a leaf."""
        return super().children(self.unwrapped(node), kind)

    def _of_call(self, node: Call, kind: str) -> Children | None:
        below = super()._of_call(node, kind)
        kinds = self._opening.kinds(node) if below else None
        return _declared(below, kinds) if below and kinds else below


def _declared(below: Children, kinds: Mapping[str, str]) -> Children:
    """An object's attributes, where its class declares the kinds of some."""
    for key, value, kind in below:
        yield key, value, kinds.get(key, kind)


class _Leaves(Walk[Entry]):
    """The walk that makes entries of leaves."""

    def __init__(self, containers: Containers, rebuilder: Rebuilder, root: object, opening: Opening | None) -> None:
        super().__init__(containers, rebuilder.is_tensor, root, may_find=rebuilder.may_find)
        self._budget = containers.budget
        self._data = rebuilder.data
        self._opening = opening
        self._texts: dict[int, object] = {}
        """Sequences whose Python 2 strings became text."""

    def entry(
        self,
        frame: Frame | None,
        key: str,  # noqa: ARG002 - as all walks have it
        name: str,
        node: object,
        kind: str,
        tensor: Tensor | None,
        *,
        is_again: bool = False,
    ) -> Entry:
        """Make the entry of a leaf."""
        holder = frame.holder if frame is not None else None
        if tensor is None:
            return Value(name, Opaque(AGAIN) if is_again else self._plain(node), holder, kind == SETTING)
        if kind not in ("tensor", SETTING) and tensor.kind == "tensor":
            tensor = replace(tensor, kind=kind)
        return tensor if holder is None else replace(tensor, holder=holder)

    def _plain(self, node: object) -> object:
        """A leaf's value: plain data where it is that, else its text."""
        if type(node) in _NUMBERS:
            return node
        if self._opening and isinstance(node, Call):
            node = self._opening.unwrap(node)
        if type(node) is not Call and isinstance(node, str | RawString):
            text = node.text if isinstance(node, RawString) else str(node)
            self._budget.steps(len(text) >> 1)
            return text
        if type(node) is list or type(node) is tuple:
            return self._plain_items(node)
        if type(node) is Dict:
            return {}
        if type(node) is Call:
            number = numpy_scalar(node, self._data)
            if number is not None:
                return number if isinstance(number, SCALARS) else Opaque(repr(number))
            if is_ordered_dict(node):
                return Opaque("OrderedDict()")
            return Opaque(self._paid(array_text(node) or describe(node)))
        return Opaque(self._paid(describe(node)))

    def _plain_items(self, items: list[object] | tuple[object, ...]) -> object:
        """A sequence of scalars, Python 2 strings among them as text."""
        self._budget.steps(len(items))
        self._budget.steps(sum(len(text_of(item) or "") for item in items) >> 1)
        if not any(isinstance(item, RawString) for item in items):
            return items
        found = self._texts.get(id(items))
        if found is None:
            texts = [item.text if isinstance(item, RawString) else item for item in items]
            found = self._texts[id(items)] = texts if isinstance(items, list) else tuple(texts)
        return found

    def _paid(self, text: str) -> str:
        """Pay for a description: it took about as long as it is."""
        self._budget.steps(20 + len(text))
        return text
