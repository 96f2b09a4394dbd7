"""Tensors that an object holds outside its plain attributes: in arguments, states, slots and private attributes.

An object keeps more than its public parts: private attributes of a module, arguments of the call that makes it, a
state that its `__setstate__` takes, attributes of a mapping, tensors as keys. Each gets a name of its own below the
node's, so that every tensor of a pickle is listed: attributes by their names, the rest by what Python calls it
(`__args__`, `__kwargs__`, `__state__`, `__dict__`, `__items__`, `__keys__`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence

from ckpt_cli.budget import WalkBudget
from ckpt_cli.facts import dataclass
from ckpt_cli.pickles.graph import Call, Dict, Global, Set, children_of
from ckpt_cli.pickles.packed import is_packed
from ckpt_cli.pickles.tensors.arguments import text_of

_Sequence = list[object] | tuple[object, ...]


class Field:
    """A field of a node, such as a call's arguments, as a sequence of one item that can be replaced."""

    __slots__ = ("index", "name", "node")

    def __init__(self, node: object, name: str, index: int | None = None) -> None:
        self.node = node
        self.name = name
        self.index = index
        """The item of the field that is meant, where it is a list."""

    def put(self, node: object) -> None:
        """Replace what the field holds."""
        if self.index is None:
            setattr(self.node, self.name, node)
        else:
            getattr(self.node, self.name)[self.index] = node

    @property
    def slot(self) -> tuple[int, ...]:
        """The identity of the field in the graph."""
        return (id(self.node), hash(self.name), -1 if self.index is None else self.index)


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """One child of a node, and where in the graph it stands."""

    key: str
    """Its name below the node's; empty where it goes by the node's own."""
    node: object
    sequence: _Sequence | Field
    """The pairs, items or field that it is in."""
    index: int = 0
    is_keyed: bool = False
    """True if a key stands before it in the sequence."""


class Hidden:
    """Finds the children of nodes that have tensors in them and are not among those that the nodes open up to."""

    def __init__(
        self,
        budget: WalkBudget,
        is_tensor: Callable[[object], bool],
        state_of: Callable[[object], Dict | None],
        opened_by: Callable[[Call], str | int],
        *,
        possible: bool = True,
    ) -> None:
        """For a graph in which it is `possible` that there are tensors, as far as its names and references tell."""
        self._budget = budget
        self.is_tensor = is_tensor
        self._state_of = state_of
        self._opened_by = opened_by
        """The field that a call opens up to, `packed` or `array` of one that does to its state, or a state's number."""
        self._full: set[int] = set()
        """The identities of nodes that have tensors in them."""
        self._possible = possible
        self._plain: set[int] = set()
        """The identities of states in which nothing is kept that is not open."""
        self._empty: set[int] = set()
        """Those of nodes that have none."""

    # --- where tensors are -------------------------------------------------------------------------------------------

    def holds(self, node: object) -> bool:
        """True if a node is a tensor or has one in it, however deep: every node of a graph is looked at once."""
        if type(node) in _LEAVES or not node or not self._possible:
            return False
        if id(node) in self._full:
            return True
        return id(node) not in self._empty and self._search(node)

    def _search(self, root: object) -> bool:
        """Look through all that is below a node and not known yet; what holds tensors is passed on to its holders."""
        parents, children = array("Q"), array("Q")
        agenda = [root]
        seen = {id(root)}
        full: set[int] = set()
        while agenda:
            node = agenda.pop()
            if id(node) in self._full or self.is_tensor(node):
                full.add(id(node))
                continue
            below = children_of(node)
            self._budget.steps(1 + len(below))
            for child in below:
                if type(child) in _LEAVES or id(child) in self._empty:
                    continue
                parents.append(id(node))
                children.append(id(child))
                if id(child) not in seen:
                    seen.add(id(child))
                    agenda.append(child)
        if full:
            self._pass_on(full, parents, children)
        self._full |= full
        self._empty |= seen - full if full else seen
        return id(root) in full

    def _pass_on(self, full: set[int], parents: array[int], children: array[int]) -> None:
        """Add the holders of what is full, and theirs: what is met later lies deeper, so that few rounds do."""
        before = 0
        while before < len(full):
            before = len(full)
            self._budget.steps(len(parents))
            for at in range(len(parents) - 1, -1, -1):
                if children[at] in full:
                    full.add(parents[at])

    # --- children ----------------------------------------------------------------------------------------------------

    def further(self, node: object, *, opened: bool) -> list[Child]:
        """The children of a node that it does not open up to; of one that does not open up at all, all of them."""
        kind = type(node)
        if not self._possible:
            return []
        if kind is Call:
            return self._of_call(node, opened=opened)  # type: ignore[arg-type]  # its type was compared
        if kind is Dict:
            return list(self._keys(node.pairs))  # type: ignore[attr-defined]  # likewise
        if kind is Set and self.holds(node):
            items = node.items  # type: ignore[attr-defined]  # likewise
            return [Child(str(index), item, items, index) for index, item in enumerate(items)]
        return []

    def _of_call(self, node: Call, *, opened: bool) -> list[Child]:
        simple = not node.states and not node.args and node.kwargs is None and type(node.func) is Global
        if simple and not (node.pairs and node.items):
            return list(self._keys(node.pairs)) if node.pairs else []
        if not opened:
            return self._of_leaf(node) if self.holds(node) else []
        used = self._opened_by(node)
        found = list(self._keys(node.pairs))
        if used != "items" and node.items and self.holds(node.items):
            found.append(Child("__items__", node.items, Field(node, "items")))
        if used != "args" and self.holds(node.args):
            found.append(Child("__args__", node.args, Field(node, "args")))
        found += self._rest(node)
        for number, state in enumerate(node.states):
            if used == number:
                found += self._further_attributes(state)
            elif used != "array" and (used != "packed" or number) and self.holds(state):
                found.append(self._state(node, number, state))
        return found

    def _of_leaf(self, node: Call) -> list[Child]:
        """All that a call consists of: a named tuple's items, an object's arguments and state."""
        args = node.args
        func = node.func.qualified if isinstance(node.func, Global) else ""
        found: list[Child] = []
        if func in _COLLECTIONS and isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], list):
            found.append(Child("", args[0], Field(node, "")))
        elif args:
            alone = not node.states and node.kwargs is None
            found.append(Child("" if alone else "__args__", args, Field(node, "args")))
        found += self._rest(node)
        for number, state in enumerate(node.states):
            if func in _PARTIALS and isinstance(state, tuple) and len(state) == len(_PARTIAL):
                return self._of_partial(node, number, state)
            if state is not None:
                found.append(self._state(node, number, state))
        return found

    def _of_partial(self, node: Call, number: int, state: tuple[object, ...]) -> list[Child]:
        """Return the parts of a functools.partial, from its state (Modules/_functoolsmodule.c, `partial_reduce`)."""
        fields = _Fields(node, number)
        parts = enumerate(zip(_PARTIAL, state, strict=True))
        return [Child(name, part, fields.at(index)) for index, (name, part) in parts if part is not None]

    def _rest(self, node: Call) -> Iterator[Child]:
        """The keyword arguments, and what is called where that is no plain name."""
        if node.kwargs is not None and self.holds(node.kwargs):
            yield Child("__kwargs__", node.kwargs, Field(node, "kwargs"))
        if type(node.func) is not Global and self.holds(node.func):
            yield Child("__func__", node.func, Field(node, "func"))

    def _state(self, node: Call, number: int, state: object) -> Child:
        name = "__dict__" if isinstance(state, Dict) else "__state__"
        return Child(f"{name}{number}" if number else name, state, Field(node, "states", number))

    def _keys(self, pairs: object) -> Iterator[Child]:
        """Keys that are tensors or have tensors in them."""
        if not pairs or not isinstance(pairs, list) or _PLAIN_KEYS.issuperset(map(type, pairs[::2])):
            return
        for index, key in enumerate(pairs[::2]):
            if self.holds(key):
                yield Child(f"__keys__.{index}", key, pairs, 2 * index)

    def _further_attributes(self, state: object) -> list[Child]:
        """Return the same as `_attributes`, which is not called again for a state that has none."""
        if id(state) in self._plain:
            return []
        found = list(self._attributes(state))
        if not found:
            self._plain.add(id(state))
        return found

    def _attributes(self, state: object) -> Iterator[Child]:
        """The attributes that a module keeps to itself; of any other object all are open."""
        if type(state) is tuple and not isinstance(state[0], Dict) and self.holds(state[0]):
            yield Child("__state__", state, Field(state, ""))
            return
        tables: dict[str, object] = {}
        private: list[tuple[str, list[object], int]] = []
        for part in state if type(state) is tuple else (state,):
            if isinstance(part, Dict):
                self._budget.steps(len(part.pairs))
                yield from self._keys(part.pairs)
                private += _private(part.pairs, tables)
        if len(tables) < len(GROUPS):  # not a module
            return
        for group, table in tables.items():
            for child in self.further(table, opened=True):
                yield Child(f"{group}.{child.key}", child.node, child.sequence, child.index, child.is_keyed)
        kept = [child for child in private if self.holds(child[1][child[2]])]
        taken = {text_of(key) for table in tables.values() for key in _keys_of(table)} if kept else set()
        for name, pairs, at in kept:
            key = name if name and name not in taken else f"__dict__.{name}"
            yield Child(key, pairs[at], pairs, at, is_keyed=True)


class _Fields:
    """The parts of a state that is a tuple, each of which can be replaced."""

    def __init__(self, node: Call, number: int) -> None:
        self._node = node
        self._number = number

    def at(self, index: int) -> Field:
        """One part."""
        return _Part(self._node, self._number, index)


class _Part(Field):
    """One part of a state that is a tuple."""

    __slots__ = ("place",)

    def __init__(self, node: Call, number: int, place: int) -> None:
        super().__init__(node, "states", number)
        self.place = place

    def put(self, node: object) -> None:
        """Replace the part, and with it the tuple."""
        states = getattr(self.node, self.name)
        items = list(states[self.index])
        items[self.place] = node
        states[self.index] = tuple(items)

    @property
    def slot(self) -> tuple[int, ...]:
        """The identity of the part in the graph."""
        return (*super().slot, self.place)


def is_module(named: Mapping[str | None, object]) -> bool:
    """True if attributes are those of a torch.nn.Module."""
    return all(group in named for group in GROUPS)


def is_open(name: str | None, value: object) -> bool:
    """True if a module opens up to an attribute: its name is not private, or it is a tensor or packed weights."""
    return name is not None and name != "" and (name[0] != "_" or _is_tensor_call(value) or is_packed(value))


def _is_tensor_call(node: object) -> bool:
    """True if a node is a tensor, which is listed even where a module keeps it to itself."""
    return isinstance(node, Call) and isinstance(node.func, Global) and node.func.module in _TENSOR_MODULES


_TENSOR_MODULES = ("torch._utils", "torch._tensor")
"""The modules of the calls that rebuild tensors."""


def _keys_of(table: object) -> Sequence[object]:
    """The names in one of a module's tables."""
    return table.pairs[::2] if isinstance(table, Call | Dict) else ()


def _private(pairs: list[object], tables: dict[str, object]) -> Iterator[tuple[str, list[object], int]]:
    """The attributes with something in them that a module would not open up to; its tables are put into `tables`."""
    for at in range(1, len(pairs), 2):
        key, value = pairs[at - 1], pairs[at]
        name = key if type(key) is str else text_of(key) or ""
        if name in _GROUPS:
            tables[name] = value
        elif type(value) not in _LEAVES and not is_open(name, value) and not _is_empty(value):
            yield name, pairs, at


def _is_empty(node: object) -> bool:
    if type(node) is Call:
        filled = node.pairs or node.states or node.items or (node.args and any(node.args))  # type: ignore[arg-type]
        return not filled and type(node.func) is Global
    return not (node.pairs if type(node) is Dict else node.items if type(node) is Set else True)


GROUPS = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that it opens up to."""

_GROUPS = frozenset(GROUPS)

_LEAVES = frozenset([type(None), bool, int, float, str, bytes, Global])

_PLAIN_KEYS = frozenset([str, int, float, bool, type(None), bytes, Global])

_COLLECTIONS = frozenset(
    [f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "list", "tuple")]
)
"""The form that protocols 0 to 3 give a list of items."""

_PARTIALS = ("functools.partial", "_functools.partial")
_PARTIAL = ("func", "args", "keywords", "__dict__")
