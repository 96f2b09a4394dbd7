"""A graph flattened to named entries: dicts, lists and objects open up, everything else is a leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, repeat
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.errors import LimitError
from ckpt_cli.model.checkpoint import AGAIN, Entry, Opaque, Tensor, Value
from ckpt_cli.pickles.attributes import Hidden, Spot, is_module, is_open
from ckpt_cli.pickles.budget import Budget
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, RawString, Set
from ckpt_cli.pickles.packed import has_parts, is_packed, packed_parts
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.inline_bytes import Place
from ckpt_cli.pickles.tensors.numpy import array_text, item_names, numpy_scalar, object_array
from ckpt_cli.pickles.tensors.rebuild import Rebuilder, StorageFinder

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

    `place` is where the pickle stands, for the storages whose bytes are within it.
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

    def unwrapped(self, node: object) -> object:
        """What a node only wraps; the node itself, as Python pickles."""
        return node

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
        array = object_array(node)
        if array is not None:
            self.budget.steps(len(array[1]))
            if not any(map(self._opens_in_array, array[1])):
                return None
            return zip(item_names(array[0]), array[1], repeat(kind), strict=False)
        return self._items(node.items, kind)

    def _opens_in_array(self, item: object) -> bool:
        """True for an item of an array that is more than plain data."""
        if isinstance(item, list | tuple):
            self.budget.steps(len(item))
            return not all(isinstance(inner, _SCALARS) for inner in item)
        return isinstance(item, Call) or (isinstance(item, Dict) and bool(item.pairs))

    def opened_by(self, node: Call) -> str | int:
        """The field of a call that it opens up to, or the number of the state that has its attributes."""
        if _is_ordered_dict(node):
            return "pairs" if node.pairs else "args"
        if node.states and has_parts(node):
            return "packed"
        if not node.pairs and not node.items:
            for number, state in enumerate(node.states[:_STATES]):
                if self.state(state) is not None:
                    return number
        if node.pairs:
            return "pairs"
        return "items" if object_array(node) is None else "array"

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
        if not is_module(named):
            yield from self._pairs(state.pairs, kind) or ()
            return
        for group, group_kind in (("_parameters", "parameter"), ("_buffers", "buffer"), ("_modules", kind)):
            for key, value, _ in self.children(named[group], kind) or ():
                if value is not None:
                    yield key, value, group_kind
        for name, value in named.items():
            if name is not None and is_open(name, value):
                yield name, value, kind

    def _key(self, key: object) -> str:
        return key if type(key) is str else self._told(key_text(key))

    def _told(self, text: str) -> str:
        """Pay for a description: it took about as long as it is."""
        self.budget.steps(20 + len(text))
        return text


class Frame:
    """A node that is open in a walk, with those of its children that are still to be met."""

    __slots__ = ("children", "holder", "is_extra", "name", "node", "place", "seen")

    def __init__(self, name: str, node: object, seen: set[int] | None, place: object) -> None:
        self.name = name
        self.node = node
        self.place = place
        """Where the node stands, in a walk that says so."""
        self.children: Iterator[Any] = iter(())
        self.seen = seen
        """What has been opened of what the same holder keeps to itself; None for what is open to all."""
        self.holder: str | None = None
        """The name of that holder."""
        self.is_extra = False
        """Whether the children are those that the node does not open up to by itself."""


class Frames:
    """The nodes that are open in a walk, outermost first: what both the names and the places of entries follow from.

    What is open to all is listed under each of its names. What an object keeps to itself is listed once for each name
    of that object, and only as far as it is not open elsewhere, so that objects that know each other do not multiply.
    """

    def __init__(self, opener: Opener, rebuilder: Rebuilder, root: object) -> None:
        self._opener = opener
        self._hidden = Hidden(
            opener.budget, rebuilder.is_tensor, opener.state, opener.opened_by, possible=rebuilder.may_find
        )
        self._root = root
        self._frames: list[Frame] = []
        self._open: set[int] = set()
        self._public: set[int] | None = None

    def top(self) -> Frame | None:
        """The innermost frame."""
        return self._frames[-1] if self._frames else None

    def below(self, frame: Frame, children: Children) -> Iterable[object]:  # noqa: ARG002 - for other walks
        """The children that a frame's node opens up to, as the walk gives them."""
        return children

    def further(self, frame: Frame, spots: list[Spot]) -> Iterable[object]:  # noqa: ARG002 - likewise
        """The children that it keeps to itself, as the walk gives them."""
        return ((spot.key, spot.node, "tensor") for spot in spots)

    def open(self, name: str, node: object, kind: str, within: Frame | None, place: object = None) -> Frame | None:
        """A frame for a node, which a further `push` takes in; None for a leaf."""
        children = self._opener.children(node, kind)
        if children is None and type(node) is not Call and type(node) is not Set:
            return None
        frame = Frame(name, node, within.seen if within else None, place)
        frame.holder = within.holder if within else None
        if children is not None:
            frame.children = iter(self.below(frame, children))
            return frame
        return frame if self._turn(frame, opened=False) else None

    def push(self, frame: Frame) -> None:
        """Take in a frame."""
        if len(self._frames) > limits.NESTING:
            raise LimitError(f"its containers nest deeper than {limits.NESTING}")
        self._open.add(id(frame.node))
        if frame.seen is not None:
            frame.seen.add(id(frame.node))
        self._frames.append(frame)

    def is_again(self, node: object, within: Frame) -> bool:
        """True if a node is not to be opened here, as it is open above, or elsewhere."""
        if id(node) in self._open:
            return True
        if within.seen is None or type(node) is tuple:  # a tuple is made of its items wherever it stands
            return False
        return id(node) in within.seen or id(node) in self._all_public()

    def advance(self, frame: Frame) -> None:
        """Go on to what a frame's node keeps to itself, or leave it."""
        if frame.is_extra or not self._turn(frame, opened=True):
            self._frames.pop()
            self._open.discard(id(frame.node))

    def _turn(self, frame: Frame, *, opened: bool) -> bool:
        """Turn to the children that a frame's node does not open up to; False where there are none."""
        spots = self._hidden.further(self._opener.unwrapped(frame.node), opened=opened)
        if not spots:
            return False
        frame.is_extra = True
        if frame.seen is None:
            frame.seen, frame.holder = {id(frame.node)}, frame.name
        frame.children = iter(self.further(frame, spots))
        return True

    def _all_public(self) -> set[int]:
        """The identities of all nodes that are open to all."""
        if self._public is None:
            self._public = public_nodes(self._opener, self._hidden.is_tensor, self._root)
        return self._public


def public_nodes(opener: Opener, is_tensor: Callable[[object], bool], root: object) -> set[int]:
    """The identities of the nodes below a root that open up without what any keeps to itself."""
    found: set[int] = set()
    agenda = [root]
    while agenda:
        node = agenda.pop()
        if id(node) in found or is_tensor(node):
            continue
        children = opener.children(node, "tensor")
        if children is not None:
            found.add(id(node))
            agenda.extend(child for _, child, _ in children if isinstance(child, Dict | Call | list | tuple))
    return found


def tensors_within(
    rebuilder: Rebuilder, graph: Graph, budget: Budget
) -> Callable[[str, object], Sequence[tuple[str, object]]]:
    """What finds the tensors in something that hangs on another tensor, with their names below that.

    What is open to all is not looked into, and each container only once for all tensors.
    """
    opener = Opener(budget)
    hidden = Hidden(budget, rebuilder.is_tensor, opener.state, opener.opened_by)
    public = public_nodes(opener, rebuilder.is_tensor, graph.root)
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
            opened = opener.children(node, "tensor")
            spots = hidden.further(node, opened=opened is not None)
            below = [*((key, child) for key, child, _ in opened or ()), *((spot.key, spot.node) for spot in spots)]
            deeper: list[tuple[str, object]] = []
            for key, child in below:
                if hidden.holds(child):
                    budget.name(inner := f"{name}.{key}" if key else name)
                    found_here = found if rebuilder.is_tensor(child) else deeper
                    found_here.append((inner, child))
            agenda.extend(reversed(deeper))
        return [(key + name, node) for name, node in found]

    return find


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
        frames = Frames(self, self._rebuilder, root)
        first = None if tensor else frames.open("", root, "tensor", None)
        if first is None:
            yield tensor or Value("", self._plain(root))
            return
        frames.push(first)
        while frame := frames.top():
            prefix, holder = frame.name, frame.holder
            for key, node, kind in frame.children:
                name = f"{prefix}.{key}" if prefix and key else prefix or key
                self.budget.name(name)
                tensor = self._rebuilder.tensor(name, node)
                if tensor is not None:
                    tensor = tensor if kind == "tensor" else _with_kind(tensor, kind)
                    yield tensor if holder is None else replace(tensor, holder=holder)
                elif frames.is_again(node, frame):
                    yield Value(name, Opaque(AGAIN), holder)
                elif (below := frames.open(name, node, kind, frame)) is None:
                    yield Value(name, self._plain(node), holder)
                else:
                    frames.push(below)
                    break
            else:
                frames.advance(frame)

    # --- a pickler's own manner --------------------------------------------------------------------------------------

    def unwrapped(self, node: object) -> object:
        """What a node only wraps."""
        return self._opening.unwrap(node) if self._opening and isinstance(node, Call) else node

    def children(self, node: object, kind: str) -> Children | None:
        """What opens up below a node or what it only wraps."""
        return super().children(self.unwrapped(node), kind)

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
    return replace(tensor, kind=kind) if tensor.kind == "tensor" else tensor


def _is_ordered_dict(node: object) -> bool:
    return isinstance(node, Call) and isinstance(node.func, Global) and node.func.name == "OrderedDict"
