"""A graph flattened to named entries: dicts, lists and objects open up, everything else is a leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Protocol

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.errors import LimitError
from ckpt_cli.model import Entry, Opaque, Tensor, Value
from ckpt_cli.pickles.arguments import text_of
from ckpt_cli.pickles.budget import Budget
from ckpt_cli.pickles.embedded import Place
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString
from ckpt_cli.pickles.numpy_calls import array_text, numpy_scalar
from ckpt_cli.pickles.packed import is_packed, packed_parts
from ckpt_cli.pickles.rebuild import Rebuilder, StorageFinder
from ckpt_cli.pickles.text import describe

Children = Iterator[tuple[str, object, str]]
"""What opens up below a node: the key, the node and the kind that tensors there have."""

_CHECK_EVERY = 1 << 12


class Opening(Protocol):
    """What a pickler other than Python's does in its own way."""

    def unwrap(self, node: Call) -> object:
        """What a call only wraps to say its type, or the call itself."""

    def kinds(self, node: Call) -> Mapping[str, str]:
        """The kinds of those attributes of an object that its class declares to be parameters or buffers."""


_PLAIN_GLOBALS = frozenset(
    ["collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch.Size",
     "torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage"]
)  # fmt: skip
"""Globals that tell nothing of what a checkpoint holds: plain tensors and dicts need them."""


def entries_of(
    graph: Graph,
    finder: StorageFinder,
    opening: Opening | None = None,
    *,
    place: Place | None = None,
    rebuilder: type[Rebuilder] = Rebuilder,
) -> list[Entry]:
    """Every leaf of the graph under its dotted name, in the document's order; `opening` is a pickler's own manner.

    `place` is where the pickle stands, for a container that gives the bytes of `Embedded` storages within it.
    Raises MalformedError for tensors that do not fit their storages, LimitError where shared containers multiply.
    """
    budget = Budget(graph.nbytes)
    leaves = _Walk(rebuilder(graph, finder, budget, place), budget, opening).leaves(graph.root)
    found: list[Entry] = []
    while more := list(islice(leaves, _CHECK_EVERY)):
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
        return [key_text(key) for key in graph.root.pairs[::2]]
    return []


def key_text(key: object) -> str:
    """A mapping's key as a part of a name: strings as they are, other keys by their repr."""
    text = text_of(key)
    return describe(key) if text is None else text


class Opener:
    """What opens up below a node and under which keys. Whatever it looks at is paid for."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        """What is left to pay with."""

    def children(self, node: object, kind: str) -> Children | None:
        """What opens up below a node, or None for a leaf."""
        if isinstance(node, Dict):
            return self._pairs(node.pairs, kind)
        if isinstance(node, list | tuple):
            return self._items(node, kind)
        if isinstance(node, Call):
            return self._of_call(node, kind)
        return None

    def _pairs(self, pairs: Sequence[object], kind: str) -> Children | None:
        """The values of a mapping; an empty one is a leaf."""
        self.budget.steps(len(pairs))
        return zip(map(self._key, pairs[::2]), pairs[1::2], repeat(kind), strict=False) if pairs else None

    def _items(self, items: Sequence[object], kind: str) -> Children | None:
        """The items of a sequence; one that holds scalars only is one value rather than many entries."""
        self.budget.steps(len(items))
        if all(isinstance(item, _SCALARS) for item in items):
            return None
        return zip(map(str, range(len(items))), items, repeat(kind), strict=False)

    def _of_call(self, node: Call, kind: str) -> Children | None:
        """An object opens up to its mapping or sequence and its attributes; one that has none of these is a leaf."""
        if _is_ordered_dict(node):
            return self._pairs(node.pairs or self._listed_pairs(node.args), kind)
        if node.states and (parts := packed_parts(node)) is not None:
            self.budget.steps(len(parts))
            packed = "buffer" if kind == "tensor" and is_packed(node) else kind
            return ((key, part, packed) for key, part in parts)
        attributes = next(filter(None, map(self.state, node.states[:_STATES])), None)
        if attributes is not None and not node.pairs and not node.items:
            return self._attributes(attributes, kind) if attributes.pairs else None
        if node.pairs:
            return self._pairs(node.pairs, kind)
        return self._items(node.items, kind)

    def state(self, state: object) -> Dict | None:
        """The attributes in a BUILD's argument: a dict, or a pair of one or None, and of the slots."""
        if isinstance(state, Dict):
            return state
        if type(state) is not tuple or len(state) != 2 or not isinstance(state[1], Dict):
            return None
        pairs = state[0].pairs if isinstance(state[0], Dict) else []
        self.budget.steps(len(pairs) + len(state[1].pairs))
        return Dict([*pairs, *state[1].pairs])

    def _listed_pairs(self, args: object) -> list[object]:
        """The pairs of an `OrderedDict([[key, value], …])`, as Python 2 wrote it."""
        if not isinstance(args, tuple) or len(args) != 1 or not isinstance(args[0], list):
            return []
        self.budget.steps(2 * len(args[0]))
        pairs: list[object] = []
        for item in args[0]:
            if not isinstance(item, list | tuple) or len(item) != 2:
                return []
            pairs.extend(item)
        return pairs

    def _attributes(self, state: Dict, kind: str) -> Children:
        """An object's attributes; those of a torch.nn.Module as its state_dict names them."""
        self.budget.steps(len(state.pairs))
        named = {text_of(key): value for key, value in zip(state.pairs[::2], state.pairs[1::2], strict=True)}
        if not {"_parameters", "_buffers", "_modules"} <= named.keys():
            yield from self._pairs(state.pairs, kind) or ()
            return
        for group, group_kind in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", kind)):
            for key, value, _ in self.children(named[group], kind) or ():
                if value is not None:
                    yield key, value, group_kind
        for name, value in named.items():
            if name and (not name.startswith("_") or (type(value) is Call and _is_open(value))):
                yield name, value, kind

    def _key(self, key: object) -> str:
        return key if type(key) is str else self._told(key_text(key))

    def _told(self, text: str) -> str:
        """Pay for a description: it took about as long as it is."""
        self.budget.steps(20 + len(text))
        return text


class _Walk(Opener):
    """One walk over a graph, depth first and without recursion."""

    def __init__(self, rebuilder: Rebuilder, budget: Budget, opening: Opening | None = None) -> None:
        super().__init__(budget)
        self._rebuilder = rebuilder
        self._opening = opening
        self._texts: dict[int, object] = {}
        """Sequences whose Python 2 strings became text."""

    def leaves(self, root: object) -> Iterator[Entry]:
        """Every leaf under its name."""
        tensor = self._rebuilder.tensor("", root)
        children = None if tensor else self.children(root, "tensor")
        if children is None:
            yield tensor or Value("", self._plain(root))
            return
        frames: list[tuple[str, Children, int]] = [("", children, id(root))]
        open_nodes = {id(root)}
        while frames:
            prefix, children, identity = frames[-1]
            for key, node, kind in children:
                name = f"{prefix}.{key}" if prefix and key else prefix or key
                self.budget.name(name)
                tensor = self._rebuilder.tensor(name, node)
                if tensor is not None:
                    yield tensor if kind == "tensor" else _with_kind(tensor, kind)
                elif id(node) in open_nodes:
                    yield Value(name, Opaque("<the same object again>"))
                elif (below := self.children(node, kind)) is None:
                    yield Value(name, self._plain(node))
                elif len(frames) > limits.NESTING:
                    raise LimitError(f"its containers nest deeper than {limits.NESTING}")
                else:
                    open_nodes.add(id(node))
                    frames.append((name, below, id(node)))
                    break
            else:
                frames.pop()
                open_nodes.discard(identity)

    # --- a pickler's own manner --------------------------------------------------------------------------------------

    def children(self, node: object, kind: str) -> Children | None:
        """What opens up below a node or what it only wraps."""
        return super().children(self._opening.unwrap(node) if self._opening and isinstance(node, Call) else node, kind)

    def _of_call(self, node: Call, kind: str) -> Children | None:
        below = super()._of_call(node, kind)
        kinds = self._opening.kinds(node) if self._opening and below else None
        return self._declared(below, kinds) if below and kinds else below

    def _declared(self, below: Children, kinds: Mapping[str, str]) -> Children:
        """An object's attributes, where its class declares the kinds of some."""
        for key, value, kind in below:
            yield key, value, kinds.get(key, kind)

    # --- what leaves say ---------------------------------------------------------------------------------------------

    def _plain(self, node: object) -> object:
        """A leaf's value: plain data where it is that, else its text."""
        if self._opening and isinstance(node, Call):
            node = self._opening.unwrap(node)
        if isinstance(node, str | RawString):
            text = node.text if isinstance(node, RawString) else str(node)
            self.budget.steps(len(text) >> 1)
            return text
        if node is None or isinstance(node, bool | int | float):
            return node
        if isinstance(node, list | tuple):
            return self._plain_items(node)
        if isinstance(node, Dict):
            return {}
        if isinstance(node, Call):
            number = numpy_scalar(node, self._rebuilder.data)
            if number is not None:
                return number if isinstance(number, _SCALARS) else Opaque(repr(number))
            if _is_ordered_dict(node):
                return Opaque("OrderedDict()")
            return Opaque(self._told(array_text(node) or describe(node)))
        return Opaque(self._told(describe(node)))

    def _plain_items(self, items: list[object] | tuple[object, ...]) -> object:
        """A sequence of scalars, Python 2 strings among them as text."""
        self.budget.steps(len(items))
        self.budget.steps(sum(len(text_of(item) or "") for item in items) >> 1)
        if not any(isinstance(item, RawString) for item in items):
            return items
        found = self._texts.get(id(items))
        if found is None:
            texts = [item.text if isinstance(item, RawString) else item for item in items]
            found = self._texts[id(items)] = texts if isinstance(items, list) else tuple(texts)
        return found


_SCALARS = (type(None), bool, int, float, str, RawString)

_STATES = 4
"""How many of an object's BUILDs are looked at; picklers write one."""


def _with_kind(tensor: Tensor, kind: str) -> Tensor:
    from dataclasses import replace

    return replace(tensor, kind=kind) if tensor.kind == "tensor" else tensor


def _is_open(node: Call) -> bool:
    """True for a tensor or packed weights, which are listed even where a module keeps them to itself."""
    return (isinstance(node.func, Global) and node.func.module in _TENSOR_MODULES) or is_packed(node)


_TENSOR_MODULES = ("torch._utils", "torch._tensor")
"""Where the calls are that rebuild tensors."""


def _is_ordered_dict(node: object) -> bool:
    return isinstance(node, Call) and isinstance(node.func, Global) and node.func.name == "OrderedDict"
