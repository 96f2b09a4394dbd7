"""Rebuild calls in general: from a call in the graph to the facts of a tensor.

Sources: torch/_utils.py, torch/_tensor.py (`__reduce_ex__`), torch/nn/parameter.py, torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import FormatError, LimitError
from ckpt_cli.model.checkpoint import Tensor
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph
from ckpt_cli.pickles.references import is_storage
from ckpt_cli.pickles.tensors.arguments import COUNT_END, flags_of, geometry, text_of, wrong
from ckpt_cli.pickles.tensors.inline_bytes import PicklePlace
from ckpt_cli.pickles.tensors.numpy import ARRAYS, is_array
from ckpt_cli.pickles.tensors.storages import StorageFinder, Storages
from ckpt_cli.pickles.walk import tensors_within

Rebuild = Callable[["Rebuilder", str, "tuple[Any, ...]", Call], "Tensor | None"]
"""Makes a tensor of a call's arguments; None where the call wraps something that is not a known tensor."""

Calls = Mapping[tuple[str, str], Rebuild]
"""The function for each call that makes a tensor, by the module and name of what is called."""

PLAIN = ("torch._utils", "_rebuild_tensor_v2")
"""The call that makes nearly all tensors."""

_PART_STEPS = 100
"""The cost of making a part, in steps of the budget."""


class Rebuilder:
    """Turns calls of one pickle into tensors."""

    def __init__(
        self, calls: Calls, graph: Graph, finder: StorageFinder, budget: WalkBudget, place: PicklePlace | None = None
    ) -> None:
        """Make tensors of the graph with a table of calls.

        `finder` is the format's own way to storages; `place` is where the pickle stands, for those within it.
        """
        self.data = graph.data
        """The bytes that the pickle was read from."""
        self.storages = Storages(graph, finder, budget, place)
        self._views = self.storages.views
        self.may_find = bool(graph.persistent) or any((node.module, node.name) in calls for node in graph.globals)
        """True where there can be a tensor in the pickle, as far as the names that it imports tell."""
        self._table = calls
        self._graph = graph
        self._finder = finder
        self._budget = budget
        self._rows: dict[object, tuple[DType, int, int] | tuple[()]] = {}
        """The facts of the calls that were read as rows, by what these have in common."""
        self._calls: dict[Global, Rebuild | None] = {}
        """The function in the table for each global that was called; nodes are hashed by identity."""
        self._nested: dict[int, tuple[Tensor, ...]] = {}
        """The parts that were found beside what a tensor is made of, by the identity of its call."""
        self._below: Callable[[str, object], Iterable[tuple[str, object]]] | None = None
        """Finds the tensors in what hangs on another one."""
        self._made: list[Dict] = []
        """The dicts that stand for pairs of a tensor's call, kept as nodes are known by their identity."""
        self._depth = 0
        """The number of tensors that the one that is being made is a part of."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """Return the tensor that a call would make, or None when it makes something else.

        Raises MalformedError for a call that torch does not write, and for a view that is not within its storage.
        """
        if type(node) is not Call:
            return self._bare(name, node) if is_storage(node) else None
        if node.row is not None and (found := self._of_row(name, node)) is not None:
            return found
        func = node.func
        if type(func) is not Global:
            return None
        rebuild = self._calls[func] if func in self._calls else self.rebuild_of(func)
        if rebuild is None:
            return None
        if type(node.args) is not tuple:
            raise wrong(name, "its rebuild call has no arguments")
        try:
            tensor = rebuild(self, name, node.args, node)
            if tensor is None or not (beside := _beside(node)):
                return tensor
            return self._with_parts(tensor, node, self._kept(beside))
        except (TypeError, ValueError, IndexError):  # too few or too many arguments, or not the kind that torch writes
            raise wrong(name, f"{describe(func)} has arguments that it does not take") from None

    def _of_row(self, name: str, node: Call) -> Tensor | None:
        """Return the tensor of a call that was read as a row; None where it takes looking at its arguments."""
        row: Any = node.row
        facts = self._rows.get(row)
        if facts is None:
            facts = self._rows[row] = self._facts_of(name, row)
        if not facts or node.states or node.pairs or node.items:
            return None
        dtype, nbytes, end = facts
        storage = self.storages.at(node.key, dtype, nbytes, row.location)
        if storage is None or end > storage.nbytes:
            return None
        return Tensor(name, dtype, row.size, row.stride, storage, row.offset, "tensor", row.requires_grad)

    def _facts_of(self, name: str, row: Any) -> tuple[DType, int, int] | tuple[()]:
        """Return the dtype of rows, the bytes of their storages and of these those before the view's end.

        Nothing where there is a fault in them, or something that is rarely said.
        """
        rebuild = self.rebuild_of(row.func)
        if rebuild is None or rebuild is not self._table.get(PLAIN) or self._finder.big_endian:
            return ()
        try:
            dtype, itemsize = self.storages.kind_of(row.kind)
            shape, steps = geometry(name, row.size, row.stride)
        except FormatError:
            return ()
        if row.numel < 0 or row.offset < 0:
            return ()
        return dtype, row.numel * itemsize, Tensor(name, dtype, shape, steps, None, row.offset).span[1]

    def _kept(self, beside: Sequence[tuple[str, object]]) -> list[tuple[str, object]]:
        """Return what hangs on a tensor's call, its pairs as a dict that lives as long as the rebuilder."""
        found = list(beside)
        for at, (name, value) in enumerate(found):
            if name == "__dict__" and isinstance(value, list):
                self._made.append(Dict(list(value)))
                found[at] = (name, self._made[-1])
        return found

    def is_tensor(self, node: object) -> bool:
        """True if a node is a call that would make a tensor, or refers to a storage."""
        if type(node) is not Call:
            return is_storage(node)
        for _ in range(limits.PARTS_WITHIN):
            if type(node) is not Call or self.rebuild_of(node.func) is None:
                return False
            if node.row is not None:
                return True
            name = node.func.name  # type: ignore[attr-defined]  # a name of the table
            args = node.args if isinstance(node.args, tuple) and node.args else (None,)
            if name in ARRAYS:
                return is_array(node)
            if name.startswith("_rebuild_from_type"):
                return self.rebuild_of(args[0]) is not None
            if not name.startswith("_rebuild_parameter"):
                return True
            node = args[0]
        return False

    def _bare(self, name: str, node: object) -> Tensor:
        """A storage by itself: as the vector of its elements."""
        storage, dtype = self.storages.of(node, bare=True)
        dtype = BY_NAME[_PLAIN.get(dtype.name, dtype.name)]
        begin, numel = self._views.get(id(node)) or (0, storage.nbytes * 8 // dtype.bits)
        kind = node.pid[1].qualified  # type: ignore[attr-defined]  # a reference, whose class was looked up
        return Tensor(name, dtype, (numel,), (1,), storage, begin, python_type=kind)

    def _with_parts(self, tensor: Tensor, node: Call, beside: Iterable[tuple[str, object]]) -> Tensor:
        """A tensor with the tensors among its parts that hang on its call beside what it is made of."""
        found = self._nested.get(id(node))
        if found is None:
            found = self._nested[id(node)] = tuple(part for key, value in beside for part in self.nested(key, value))
        return replace(tensor, parts=tensor.parts + found) if found else tensor

    def nested(self, key: str, node: object) -> Iterator[Tensor]:
        """The tensors in what hangs on a tensor, however deep, called by their places in it."""
        if type(node) in _ATOMS or (type(node) is Call and not (node.args or node.states or node.pairs or node.items)):
            return
        if self._below is None:
            self._below = tensors_within(self._graph, self.is_tensor, self._budget)
        for name, below in self._below(key, node):
            part = self.part(name, below)
            if part is not None:
                yield part

    def part(self, name: str, node: object) -> Tensor | None:
        """Return the tensor that a call within another tensor's call would make, or None.

        Raises LimitError where tensors are made of tensors too deep.
        """
        self._budget.steps(_PART_STEPS)
        if self._depth == limits.PARTS_WITHIN:
            raise LimitError(
                f"a tensor is made of tensors, and so on, more than {limits.PARTS_WITHIN} times", fixed=True
            )
        self._depth += 1
        try:
            return self.tensor(name, node)
        finally:
            self._depth -= 1

    def inner(self, name: str, node: object) -> Tensor:
        """The same, of what can be nothing else; raises MalformedError for anything that is not a tensor."""
        tensor = self.part(name, node)
        if tensor is None:
            raise wrong(name, "it wraps something that is not a tensor")
        return tensor

    def pay(self, steps: int) -> None:
        """Pay for looking at `steps` items."""
        self._budget.steps(steps)

    def attributes(self, state: object) -> Iterator[tuple[str, object]]:
        """The attributes of a tensor, from its state: a dict, or a pair of one or None, and of the slots."""
        if type(state) is not tuple:
            state = (state,)
        for given in state[:2]:
            if isinstance(given, Dict):
                self._budget.steps(len(given.pairs))
                yield from zip(map(_attribute, given.pairs[::2]), given.pairs[1::2], strict=True)

    def rebuild_of(self, func: object) -> Rebuild | None:
        """The table's function for what a call calls."""
        if type(func) is not Global:
            return None
        try:
            return self._calls[func]
        except KeyError:
            rebuild = self._calls[func] = self._table.get((func.module, func.name))
            return rebuild

    def strided(
        self,
        name: str,
        storage_node: object,
        offset: Any,
        size: object,
        stride: object,
        requires_grad: object,
        _hooks: object,
        meta: object = None,
        *,
        dtype: DType | None = None,
        kind: str = "tensor",
    ) -> Tensor:
        """A view of a storage, checked to lie inside it, from the arguments of `_rebuild_tensor_v2`.

        `dtype` is given for untyped storages only.
        """
        storage, storage_type = self.storages.of(storage_node)
        shape, steps = geometry(name, size, stride)
        if type(offset) is not int or not 0 <= offset < COUNT_END:
            raise wrong(name, f"its offset is {describe(offset)}")
        limit = storage.nbytes
        if self._views and (view := self._views.get(id(storage_node))):
            offset += view[0]
            limit = min(limit, sum(view) * (dtype or storage_type).itemsize)
        tensor = Tensor(name, dtype or storage_type, shape, steps, storage, offset, kind, requires_grad is True)
        if meta is not None or self._finder.big_endian:
            tensor = self._flagged(tensor, meta, typed=dtype is None)
        begin, end = tensor.span
        if end > limit:
            raise wrong(name, f"needs bytes {begin}–{end}, storage {storage.key!r} has {limit}")
        return tensor

    def _flagged(self, tensor: Tensor, meta: object, *, typed: bool) -> Tensor:
        """The view with what is rarely said of one; of big-endian bytes, torch swaps those of typed storages only."""
        flags = flags_of(tensor.name, meta)
        big_endian = typed and self._finder.big_endian and tensor.dtype.bits > 8
        return replace(tensor, conj="conj" in flags, neg="neg" in flags, big_endian=big_endian)


_PLAIN = {"quint8": "uint8", "qint8": "int8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
"""The dtype of the elements of a storage where only a tensor says what they stand for."""

_ATOMS = frozenset([type(None), bool, int, float, str, bytes, Global])

_WITH_STATE = frozenset(["Tensor", "Parameter", "Variable", *ARRAYS])
"""Functions whose state is what the tensor is made of."""

_HOOKS = {"_rebuild_tensor_v2": 5, "_rebuild_tensor_v3": 5, "_rebuild_parameter": 2, "_rebuild_parameter_with_state": 2,
          "_rebuild_qtensor": 6}  # fmt: skip
"""The number of the argument of a call that has the hooks of its tensor."""


def _beside(node: Call) -> Sequence[tuple[str, object]]:
    """Return what hangs on a tensor's call that it is not made of, and may hold others; nearly always nothing."""
    args: Any = node.args
    name = node.func.name  # type: ignore[attr-defined]  # a call of the table
    found: list[tuple[str, object]] = []
    at = _HOOKS.get(name, len(args))
    if at < len(args):
        hooks = args[at]
        if type(hooks) is Dict or (type(hooks) is Call and (hooks.pairs or hooks.args or hooks.states or hooks.items)):
            found.append(("__hooks__", hooks))
        if at == 2:
            data = args[0]
            if type(data) is Call and type(data.func) is Global and type(data.args) is tuple:
                found += _beside(data) if data.func.name == "_rebuild_tensor_v2" else ()
    if (node.states or node.pairs or node.items) and name not in _WITH_STATE:
        found += [("__state__", node.states), ("__items__", node.items), ("__dict__", node.pairs)]
    return found


def _attribute(key: object) -> str:
    return text_of(key) or ""
