"""The vocabulary of torch's rebuild calls: from a call in the graph to the facts of a tensor.

Sources: torch/_utils.py, torch/_tensor.py (`__reduce_ex__`), torch/nn/parameter.py, torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.files.source import MemorySource
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.pickles.attributes import is_storage
from ckpt_cli.pickles.budget import Budget
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.graph import Call, Dict, Global, Graph, PersistentId
from ckpt_cli.pickles.legacy_save import HEAD, read_save, reference_of
from ckpt_cli.pickles.tensors.arguments import (
    COUNT_END,
    dtype_of,
    flags_of,
    geometry,
    is_count,
    odd_storage,
    storage_dtype,
    text_of,
    wrong,
)
from ckpt_cli.pickles.tensors.inline_bytes import Buffer, InlineBytes, Place, buffer_of
from ckpt_cli.pickles.tensors.layouts import LAYOUTS
from ckpt_cli.pickles.tensors.numpy import NUMPY, is_array
from ckpt_cli.pickles.tensors.subclasses import SUBCLASSES, with_attributes

Rebuild = Callable[["Rebuilder", str, "tuple[Any, ...]", Call], "Tensor | None"]
"""Makes a tensor of a call's arguments; None where the call wraps something that is no tensor that we know."""

_PART_STEPS = 100
"""What making a part costs, in steps of the budget."""


class StorageFinder(Protocol):
    """What a format tells about the storages that a pickle refers to."""

    big_endian: bool
    """Whether typed storages were written on a big-endian machine."""

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        """The storage called `key`; raises FormatError where its bytes are missing or too few."""


class Rebuilder:
    """Turns calls of one pickle into tensors."""

    def __init__(self, graph: Graph, finder: StorageFinder, budget: Budget, place: Place | None = None) -> None:
        self.data = graph.data
        """What the pickle was read from."""
        self._graph = graph
        self.may_find = bool(graph.persistent) or any((node.module, node.name) in _REBUILD for node in graph.globals)
        """Whether there can be a tensor in the pickle, as far as the names that it imports tell."""
        self._nested: dict[int, tuple[Tensor, ...]] = {}
        """The parts that were found beside what a tensor is made of, by the identity of its call."""
        self._below: Callable[[str, object], Iterable[tuple[str, object]]] | None = None
        """Finds the tensors in what hangs on another one."""
        self._made: list[Dict] = []
        """The dicts that stand for pairs of a tensor's call, kept as nodes are known by their identity."""
        self._finder = finder
        self._place = place
        """Where that stands; None where storages within the pickle are not to be had."""
        self._budget = budget
        self._depth = 0
        """How many tensors the one that is being made is a part of."""
        self._storages: dict[str, tuple[Storage, DType | None]] = {}
        """What was found by each key, so that a storage is one object, with the dtype by which it is known."""
        self._calls: dict[Global, Rebuild | None] = {}
        """The function in the table for each global that was called; nodes are hashed by identity."""
        self._kinds: dict[Global, tuple[DType, int]] = {}
        """The dtype of each storage class, and the bytes of one of its elements."""
        self._embedded: dict[int, Storage] = {}
        """The storages within the pickle, by the identity of the node that their bytes are in."""
        self._loaded: dict[int, tuple[Storage, DType]] = {}
        """The same for those that were pickled as a save of their own."""
        self._preface = b""
        """What the last of these had before its main pickle: nearly every one has the same."""
        self._views: dict[int, tuple[int, int]] = {}
        """The part of a storage that a reference is to, where it is not to all: the first element, and how many."""

    def tensor(self, name: str, node: object) -> Tensor | None:
        """The tensor that a call would make, or None when it makes something else."""
        if type(node) is not Call:
            return self._bare(name, node) if is_storage(node) else None
        rebuild = self.rebuild_of(node.func)
        if rebuild is None:
            return None
        if type(node.args) is not tuple:
            raise wrong(name, "its rebuild call has no arguments")
        try:
            tensor = rebuild(self, name, node.args, node)
            beside = self._beside(node) if tensor is not None else []
            return self._with_parts(tensor, node, beside) if tensor is not None and beside else tensor
        except (TypeError, ValueError, IndexError):  # too few or too many arguments, or not the kind that torch writes
            raise wrong(name, f"{describe(node.func)} has arguments that it does not take") from None

    def _beside(self, node: Call) -> list[tuple[str, object]]:
        """Return what hangs on a tensor's call, its pairs as a dict that lives as long as the rebuilder."""
        found = _beside(node)
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
            name = node.func.name  # type: ignore[attr-defined]  # a name of the table
            args = node.args if isinstance(node.args, tuple) and node.args else (None,)
            if name in _ARRAYS:
                return is_array(node)
            if name.startswith("_rebuild_from_type"):
                return self.rebuild_of(args[0]) is not None
            if not name.startswith("_rebuild_parameter"):
                return True
            node = args[0]
        return False

    def _bare(self, name: str, node: object) -> Tensor:
        """A storage by itself: as the vector of its elements."""
        storage, dtype = self.storage(node, bare=True)
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
        from ckpt_cli.pickles.flatten import tensors_within

        if self._below is None:
            self._below = tensors_within(self, self._graph, self._budget)
        for name, below in self._below(key, node):
            part = self.part(name, below)
            if part is not None:
                yield part

    def part(self, name: str, node: object) -> Tensor | None:
        """The tensor that a call within another tensor's call would make, or None."""
        self._budget.steps(_PART_STEPS)
        if self._depth == limits.PARTS_WITHIN:
            raise LimitError(f"a tensor is made of tensors, and so on, more than {limits.PARTS_WITHIN} times")
        self._depth += 1
        try:
            return self.tensor(name, node)
        finally:
            self._depth -= 1

    def inner(self, name: str, node: object) -> Tensor:
        """The same, of what can be nothing else; raises MalformedError for anything that is no tensor."""
        tensor = self.part(name, node)
        if tensor is None:
            raise wrong(name, "it wraps something that is no tensor")
        return tensor

    def pay(self, steps: int) -> None:
        """Pay for looking at so many items."""
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
            rebuild = self._calls[func] = _REBUILD.get((func.module, func.name))
            return rebuild

    def storage(self, node: object, *, bare: bool = False) -> tuple[Storage, DType]:
        """The storage that a persistent id refers to, and the dtype of its class (uint8 for untyped ones).

        A `bare` reference, to a storage by itself, may be of another class than those of tensors.
        """
        pid = node.pid if type(node) is PersistentId else None
        if type(pid) is not tuple or len(pid) < 5:
            return self._load(node)
        tag, kind, key, location, numel = pid[:5]
        if type(key) is not str or type(location) is not str:  # Python 2 wrote bytes; a key of one digit is a Letter
            tag, key, location = text_of(tag), text_of(key), text_of(location)
        if tag != "storage" or type(kind) is not Global or key is None or location is None or not is_count(numel):
            raise odd_storage()
        dtype, itemsize = self._kinds.get(kind) or self._kind(kind)
        nbytes = numel * itemsize
        if len(pid) > 5 and pid[5] is not None:
            self._views[id(node)] = _part_of(pid[5], numel)
        found = self._storages.get(key)
        if found is None:
            found = self._finder.find(key, nbytes, location), dtype
            self._storages[key] = (found[0], None) if bare else found
        elif found[1] is None or bare:
            known, found = found[1], (found[0], dtype)
            self._storages[key] = (found[0], known if bare else dtype)
        elif found[1] is not dtype:
            raise MalformedError(f"storage {key!r} is {found[1]} in one place and {dtype} in another")
        if found[0].nbytes < nbytes:
            raise MalformedError(f"storage {key!r} has {found[0].nbytes} bytes in one place and {nbytes} in another")
        return found[0], dtype

    def embedded(self, node: object, buffer: Buffer, begin: int, nbytes: int, location: str = "cpu") -> Storage | None:
        """The storage that a range of a node's bytes is; None where the format does not say where its pickle stands."""
        if self._place is None:
            return None
        found = self._embedded.get(id(node))
        if found is None or found.nbytes != nbytes:
            at = None if buffer.offset is None else (self._place.begin or 0) + buffer.offset + begin
            key = f"text {len(self._embedded)}" if at is None else f"@{at}"
            found = Storage(key, nbytes, location, InlineBytes(key, begin, buffer, self._place))
            self._embedded[id(node)] = found
        return found

    def _load(self, node: object) -> tuple[Storage, DType]:
        """The storage that plain pickle.dump wrote: `_load_from_bytes` of a whole legacy save (torch/storage.py)."""
        func = node.func if type(node) is Call else None
        args = node.args if type(node) is Call else None
        if not isinstance(func, Global) or func.name != "_load_from_bytes" or type(args) is not tuple or len(args) != 1:
            raise odd_storage()
        found = self._loaded.get(id(args[0]))
        if found is None:
            found = self._loaded[id(args[0])] = self._loaded_from(args[0])
        return found

    def _loaded_from(self, node: object) -> tuple[Storage, DType]:
        buffer = buffer_of(node, self.data)
        if buffer is None:
            raise odd_storage()
        self._budget.steps(_PART_STEPS)
        head = buffer.data
        if buffer.codec:
            head = str(head[:HEAD], buffer.codec, "ignore").encode("latin-1", "ignore")
        save = read_save(MemorySource(head, size=len(buffer.data)), 0, self._preface)
        self._preface = bytes(head[: save.begin])
        reference = reference_of(save.graph.root)
        if reference is None or reference.key not in save.places:
            raise MalformedError("the pickle has a storage as a save of its own, and that holds something else")
        begin, nbytes = save.places[reference.key]
        found = self.embedded(node, buffer, begin, nbytes, reference.location)
        return found or Storage(f"save {len(self._loaded)}", nbytes, reference.location), reference.dtype

    def _kind(self, kind: Global) -> tuple[DType, int]:
        dtype = storage_dtype(kind)
        found = self._kinds[kind] = dtype, max(dtype.bits // 8, 1)
        return found

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
        storage, storage_type = self.storage(storage_node)
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


def _part_of(view: object, numel: int) -> tuple[int, int]:
    """The range of elements of a view of a storage, as torch 0.3 wrote it: (key, offset, size)."""
    if type(view) is not tuple or len(view) != 3 or not is_count(view[1]) or not is_count(view[2]):
        raise odd_storage()
    if view[1] + view[2] > numel:
        raise MalformedError(f"a view of elements {view[1]}–{view[1] + view[2]} of a storage that has {numel}")
    return view[1], view[2]


_ARRAYS = frozenset(name for module, name in NUMPY if module.startswith("numpy"))
"""The functions that make arrays, of numbers or of anything else."""

_PLAIN = {"quint8": "uint8", "qint8": "int8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
"""What the elements of a storage are where only a tensor says what they stand for."""

_ATOMS = frozenset([type(None), bool, int, float, str, bytes, Global])

_WITH_STATE = frozenset(["Tensor", "Parameter", "Variable", *_ARRAYS])
"""Functions whose state is what the tensor is made of."""

_HOOKS = {"_rebuild_tensor_v2": 5, "_rebuild_tensor_v3": 5, "_rebuild_parameter": 2, "_rebuild_parameter_with_state": 2,
          "_rebuild_qtensor": 6}  # fmt: skip
"""Which argument of a call has the hooks of its tensor."""


def _beside(node: Call) -> list[tuple[str, object]]:
    """Return what hangs on a tensor's call that it is not made of, and may hold others; nearly always nothing."""
    args, name = node.args, node.func.name  # type: ignore[attr-defined]  # a call of the table
    found: list[tuple[str, object]] = []
    at = _HOOKS.get(name)
    if at is not None and len(args) > at:  # type: ignore[arg-type]  # a tuple
        hooks = args[at]  # type: ignore[index]  # likewise
        if type(hooks) is Dict or (type(hooks) is Call and (hooks.pairs or hooks.args or hooks.states or hooks.items)):
            found.append(("__hooks__", hooks))
        data = args[0]  # type: ignore[index]  # likewise
        if at == 2 and type(data) is Call and type(data.func) is Global and type(data.args) is tuple:
            found += _beside(data) if data.func.name == "_rebuild_tensor_v2" else ()
    if (node.states or node.pairs or node.items) and name not in _WITH_STATE:
        found += [("__state__", node.states), ("__items__", node.items), ("__dict__", node.pairs)]
    return found


def _attribute(key: object) -> str:
    return text_of(key) or ""


# --- one function a call; each takes the call's arguments as torch writes them ----------------------------------------


def _tensor_v1(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    storage, offset, size, stride = args
    return r.strided(name, storage, offset, size, stride, False, None)


def _tensor_v2(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    return r.strided(name, *args)


def _tensor_v3(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    as_v2 = (*args[:6], *args[7:])
    return r.strided(name, *as_v2, dtype=dtype_of(name, args[6]))


def _parameter(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor | None:
    data, requires_grad = args[:2]  # no copy of all: hostile arguments are many, and shared
    if type(data) is Call and type(data.args) is tuple and r.rebuild_of(data.func) is _tensor_v2:
        as_v2 = (*data.args[:4], requires_grad, *data.args[5:])  # nearly every parameter: made at once, not made over
        tensor: Tensor | None = r.strided(name, *as_v2, kind="parameter")
    elif (tensor := r.part(name, data)) is not None:
        tensor = replace(tensor, kind="parameter", requires_grad=requires_grad is True)
    if tensor is None or len(args) < 4:  # the hooks, and the state of a parameter that has attributes
        return tensor
    return with_attributes(r, tensor, args[3])


def _from_cpu(r: Rebuilder, name: str, args: tuple[Any, ...], _: Call) -> Tensor:
    data, _dtype_node, _device, requires_grad = args
    return replace(r.inner(name, data), requires_grad=requires_grad is True)


def _set_state(r: Rebuilder, name: str, _: tuple[Any, ...], node: Call) -> Tensor:
    """`torch.Tensor()` whose state is (storage, offset, size, stride), or the 5-tuple of a Variable before 0.4."""
    if not node.states:
        return Tensor(name, BY_NAME["float32"], (0,), (1,))
    state: Any = node.states[-1]
    if len(state) == 5:
        return replace(r.inner(name, state[0]), requires_grad=state[3] is True)
    return _tensor_v1(r, name, state, node)


def _variable(r: Rebuilder, name: str, args: tuple[Any, ...], node: Call) -> Tensor:
    """A Variable or Parameter of before 0.4: its data, then whether it takes a gradient, as arguments or as state."""
    given: Any = args[1:2] or (node.states[-1] if node.states else ())
    kind = "parameter" if isinstance(node.func, Global) and node.func.name == "Parameter" else "tensor"
    return replace(r.inner(name, args[0]), kind=kind, requires_grad=given[:1] == (True,))


_REBUILD: dict[tuple[str, str], Rebuild] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _from_cpu,
    ("torch", "Tensor"): _set_state,
    ("torch._tensor", "Tensor"): _set_state,
    ("torch.tensor", "Tensor"): _set_state,
    ("torch.nn.parameter", "Parameter"): _variable,
    ("torch.autograd.variable", "Variable"): _variable,
    **LAYOUTS,
    **SUBCLASSES,
    **NUMPY,
}
