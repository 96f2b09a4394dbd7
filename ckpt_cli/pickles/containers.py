"""The containers of a graph: what dicts, lists and objects open up to, under which keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from ckpt_cli.budget import WalkBudget
from ckpt_cli.pickles.attributes import is_module, is_open
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, RawString
from ckpt_cli.pickles.packed import has_parts, is_packed, packed_parts
from ckpt_cli.pickles.tensors.arguments import text_of
from ckpt_cli.pickles.tensors.numpy import item_names, object_array

Children = Iterator[tuple[str, object, str]]
"""The children of a node: each one's key, the node, and the kind that a tensor there has."""

SETTING = "setting"
"""The kind of what lies in a module's own attributes: a tensor there is one like any other."""

SCALARS = (type(None), bool, int, float, str, RawString)
"""Types of the items of a sequence that is one value rather than many entries."""

_TEXT = frozenset([str])

_STATES = 4
"""The number of an object's BUILDs that are looked at; picklers write one."""


def key_text(key: object) -> str:
    """A mapping's key as a part of a name: strings as they are, other keys by their repr."""
    text = text_of(key)
    return describe(key) if text is None else text


def joined(prefix: str, key: str) -> str:
    """Return the dotted name of what a container of some name has under a key."""
    return f"{prefix}.{key}" if prefix and key else prefix or key


class Containers:
    """Finds the children of nodes, and the keys that they have. The budget pays for every item that is looked at."""

    def __init__(self, budget: WalkBudget) -> None:
        self.budget = budget
        """The budget of the walk."""

    def children(self, node: object, kind: str) -> Children | None:
        """Return the children of a node, or None for a leaf."""
        if type(node) is Call:
            return self._of_call(node, kind)
        if type(node) is Dict:
            return self._pairs(node.pairs, kind)
        if type(node) is list or type(node) is tuple:
            return self._items(node, kind)
        return None

    def unwrapped(self, node: object) -> object:
        """Return the node that a node only wraps; the node itself, as Python pickles."""
        return node

    def _pairs(self, pairs: Sequence[object], kind: str) -> Children | None:
        """The values of a mapping; an empty one is a leaf."""
        self.budget.steps(len(pairs))
        if not pairs:
            return None
        keys: Sequence[object] = pairs[::2]
        texts = keys if _TEXT.issuperset(map(type, keys)) else map(self._key, keys)
        return zip(texts, pairs[1::2], repeat(kind), strict=False)  # type: ignore[arg-type]  # they are texts

    def _items(self, items: Sequence[object], kind: str) -> Children | None:
        """The items of a sequence; one that holds scalars only is one value rather than many entries."""
        self.budget.steps(len(items))
        if all(isinstance(item, SCALARS) for item in items):
            return None
        return zip(map(str, range(len(items))), items, repeat(kind), strict=False)

    def _of_call(self, node: Call, kind: str) -> Children | None:
        """An object opens up to its mapping or sequence and its attributes; one that has none of these is a leaf."""
        if is_ordered_dict(node):
            return self._pairs(node.pairs or self._listed_pairs(node.args), kind)
        if not (node.states or node.pairs or node.items):
            return None
        if node.states and (parts := packed_parts(node)) is not None:
            self.budget.steps(len(parts))
            packed = "buffer" if kind in ("tensor", SETTING) and is_packed(node) else kind
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
            return not all(isinstance(inner, SCALARS) for inner in item)
        return isinstance(item, Call) or (isinstance(item, Dict) and bool(item.pairs))

    def opened_by(self, node: Call) -> str | int:
        """The field of a call that it opens up to, or the number of the state that has its attributes."""
        if is_ordered_dict(node):
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
                yield name, value, SETTING if kind == "tensor" else kind

    def _key(self, key: object) -> str:
        return key if type(key) is str else self._told(key_text(key))

    def _told(self, text: str) -> str:
        """Pay for a description, whose cost is about its length."""
        self.budget.steps(20 + len(text))
        return text


def is_ordered_dict(node: object) -> bool:
    """True for a call that makes an OrderedDict."""
    return type(node) is Call and type(node.func) is Global and node.func.name == "OrderedDict"
