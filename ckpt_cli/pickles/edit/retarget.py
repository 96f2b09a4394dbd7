"""The rebuild calls of tensors whose bytes are elsewhere, or of another dtype, from now on.

Sources: torch/_utils.py, torch/_tensor.py (`_reduce_ex_internal`): a dtype with a storage class of its own is rebuilt
by `_rebuild_tensor_v2`, any other one by `_rebuild_tensor_v3` over an untyped storage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.changes import Changes
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.pickles.edit.apply import Editing
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId, is_filled
from ckpt_cli.pickles.rows import Template, called
from ckpt_cli.pickles.tensors.rebuild import Rebuilder

_STRIDED = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")

_LONGEST = 250
"""Characters of a storage's key in a row: new keys are the names of tensors before they are numbered."""

_View = tuple[object, ...]


class Retargeting:
    """The tensors of one graph, pointed at new storages; `storages` has what each reference stands for afterwards."""

    def __init__(self, editing: Editing, rebuilder: Rebuilder, old: Iterable[Tensor]) -> None:
        self._editing = editing
        self._rebuilder = rebuilder
        self._old = {tensor.name: tensor for tensor in old}
        self._made: dict[tuple[int, _View], object] = {}
        """New nodes by the old one and the view: what was one object stays one."""
        self._within: set[int] = set()
        """The containers that are being looked through, by their identities."""
        self._globals: dict[tuple[str, str], Global] = {node_key(node): node for node in editing.graph.globals}
        self._references: dict[tuple[Storage, str], PersistentId] = {}
        self._rows: dict[tuple[object, ...], Template | None] = {}
        """The templates of rows over new storages, by the old one's and what is new."""
        self._taken: set[Storage] = set()
        """The storages that a row may have been made for."""
        self.storages: dict[int, Storage] = {}
        """The storage of each new reference, by its identity."""

    def carry_out(self, changes: Changes) -> None:
        """Give every tensor that changes a rebuild call for its new facts."""
        for name, new in changes.tensors.items():
            place = self._editing.entry(name)
            if self._old[name].layout in ("quantized", "wrapper") and new.layout == "strided" and not new.parts:
                place.replace(self.made(new))
                continue
            views = {}
            for before, after in zip(_strided(self._old[name]), _strided(new), strict=True):
                views[_view_of(before)] = after
            place.replace(self._rebuilt(place.node, views))

    def made(self, tensor: Tensor) -> Call:
        """The rebuild call of a tensor that is new, as torch.save writes it."""
        if tensor.storage is None:
            raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
        geometry = (*(tensor.shape or ()),), (*tensor.stride,)  # new tuples, as torch's are
        view = (self._reference(tensor.storage, tensor.dtype), tensor.storage_offset, *geometry)
        function = self._global("torch._utils", "_rebuild_tensor_v2")
        return Call("reduce", *self._by_version(function, (), view, tensor.dtype))

    def _rebuilt(self, node: object, views: dict[_View, Tensor]) -> object:
        """Return a node with the strided calls in it made again; those that do not change are kept as they are."""
        if isinstance(node, PersistentId):  # a storage by itself
            tensor = self._rebuilder.tensor("", node)
            after = views.get(_view_of(tensor)) if tensor is not None else None
            return node if after is None or after.storage is None else self._reference(after.storage, after.dtype)
        if isinstance(node, tuple):
            items = tuple(self._rebuilt(item, views) for item in node)
            return items if any(new is not old for new, old in zip(items, node, strict=True)) else node
        if isinstance(node, Dict | list):  # attributes of a tensor
            return self._container(node, views)
        if not isinstance(node, Call) or not isinstance(node.func, Global):
            return node
        if node.func.name in _STRIDED:
            tensor = self._rebuilder.tensor("", node)
            after = views.get(_view_of(tensor)) if tensor is not None else None
            return node if after is None else self._call(node, after)
        return self._around(node, views)

    def _container(self, node: Dict | list[object], views: dict[_View, Tensor]) -> object:
        """A dict or list with the tensors in it changed: the same object, or another one where any is."""
        if id(node) in self._within:
            return node
        self._within.add(id(node))
        old = node.pairs if isinstance(node, Dict) else node
        items = [self._rebuilt(item, views) for item in old]
        self._within.discard(id(node))
        if all(new is before for new, before in zip(items, old, strict=True)):
            return node
        key = self._key(node, views)
        return self._made.setdefault(key, Dict(items) if isinstance(node, Dict) else items)

    def _key(self, node: object, views: dict[_View, Tensor]) -> tuple[int, _View]:
        return (id(node), (frozenset((view, after.storage) for view, after in views.items()),))

    def _around(self, node: Call, views: dict[_View, Tensor]) -> object:
        """A call that wraps others: a parameter, a sparse tensor, a subclass."""
        args = node.args
        if (
            isinstance(args, tuple) and len(args) == 4 and isinstance(args[2], tuple)
        ):  # from_type: func, type, args, state
            inner = self._rebuilt(Call("reduce", args[0], args[2]), views)
            pair = (inner.func, inner.args) if isinstance(inner, Call) else (args[0], args[2])
            state = self._rebuilt(args[3], views)
            same = pair[1] is args[2] and state is args[3]
            new_args: object = args if same else (pair[0], args[1], pair[1], state)
        else:
            new_args = self._rebuilt(args, views)
        if new_args is args:
            return node
        key = self._key(node, views)
        if key not in self._made:
            made = Call(node.opcode, node.func, new_args, node.kwargs)
            made.states, made.items, made.pairs = node.states, node.items, node.pairs
            self._made[key] = made
        return self._made[key]

    def _call(self, node: Call, tensor: Tensor) -> Call:
        """The rebuild call of a strided tensor with new facts; what torch notes beside them is kept."""
        key = (id(node), (tensor.storage, *_view_of(tensor)))
        found = self._made.get(key)
        if isinstance(found, Call):
            return found
        made = self._row(node, tensor)
        if made is not None:
            self._made[key] = made
            return made
        args, func = node.args, node.func
        if not isinstance(args, tuple) or not isinstance(func, Global) or tensor.storage is None:
            raise UnsupportedError(f"tensor {tensor.name!r} is rebuilt in a way that cannot be changed")
        size = args[2] if _counts(args[2]) == tensor.shape else (tensor.shape or ())
        stride = args[3] if _counts(args[3]) == tensor.stride else tensor.stride
        view = (self._reference(tensor.storage, tensor.dtype), tensor.storage_offset, size, stride)
        made = Call(node.opcode, *self._by_version(func, args, view, tensor.dtype))
        made.states = node.states
        self._made[key] = made
        return made

    def _row(self, node: Call, tensor: Tensor) -> Call | None:
        """Return a call that was read as a row, over another storage; None where more than that is another one.

        Further tensors of one storage have one reference, which takes less than a row for each.
        """
        row: Any = node.row
        storage = tensor.storage
        if row is None or storage is None or is_filled(node) or storage in self._taken:
            return None
        self._taken.add(storage)
        if not storage.key.isascii() or not 0 < len(storage.key) < _LONGEST:  # of a row in the making
            return None
        kind = "torch", f"{tensor.dtype.storage}Storage"
        same = (row.size, row.stride, *node_key(row.kind)) == (tensor.shape, tensor.stride, *kind)
        if not same or row.requires_grad is not tensor.requires_grad:
            return None
        view = (row, storage.nbytes, tensor.storage_offset, storage.location)
        if view not in self._rows:
            numel = storage.nbytes // tensor.dtype.itemsize
            self._rows[view] = Template.of(row, numel, tensor.storage_offset, storage.location)
        template = self._rows[view]
        if template is None:
            return None
        made = called(template, storage.key)
        self.storages[id(made)] = storage
        return made

    def _by_version(
        self, func: Global, args: tuple[object, ...], view: tuple[object, ...], dtype: DType
    ) -> tuple[Global, tuple[object, ...]]:
        """The function for a dtype, and its arguments."""
        if func.name in ("_rebuild_qtensor", "_rebuild_tensor") and (dtype.storage or func.name == "_rebuild_qtensor"):
            return func, (*view, *args[4:])
        rest = args[4:6] if len(args) >= 6 else (False, Call("reduce", self._global("collections", "OrderedDict"), ()))
        flags = args[7:] if func.name == "_rebuild_tensor_v3" else args[6:]
        if dtype.storage:
            return self._global("torch._utils", "_rebuild_tensor_v2"), (*view, *rest, *flags)
        named = self._global("torch", dtype.name)
        return self._global("torch._utils", "_rebuild_tensor_v3"), (*view, *rest, named, *flags)

    def _reference(self, storage: Storage, dtype: DType) -> PersistentId:
        """A new reference to a storage."""
        kind = (storage, dtype.storage or "")
        if kind not in self._references:
            itemsize = max(dtype.bits // 8, 1)
            name = (f"{dtype.storage}Storage", storage.nbytes // itemsize) if dtype.storage else ("", storage.nbytes)
            cls = self._global("torch", name[0]) if name[0] else self._global("torch.storage", "UntypedStorage")
            reference = PersistentId(("storage", cls, storage.key, storage.location, name[1]))
            self.storages[id(reference)] = storage
            self._references[kind] = reference
        return self._references[kind]

    def _global(self, module: str, name: str) -> Global:
        return self._globals.setdefault((module, name), Global(module, name))


def node_key(node: Global) -> tuple[str, str]:
    """The two names of a global."""
    return node.module, node.name


def _strided(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor that has a storage, or the parts of it that have."""
    if tensor.storage is not None:
        yield tensor
    for part in tensor.parts:
        yield from _strided(part)


def _view_of(tensor: Tensor) -> _View:
    """Return the facts by which the strided tensors of one tensor differ."""
    key = tensor.storage.key if tensor.storage else None
    return (key, tensor.dtype.name, tensor.storage_offset, tensor.shape, tensor.stride)


def _counts(node: object) -> object:
    """A size as a tuple, where it is one or a torch.Size."""
    if isinstance(node, Call) and isinstance(node.args, tuple) and len(node.args) == 1:
        node = node.args[0]
    return tuple(node) if isinstance(node, list) else node
