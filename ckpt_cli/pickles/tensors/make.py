"""Nodes of new pickles: the tensors, dicts and objects that torch itself would pickle, nothing imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_cli.dtypes import DType
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.pickles.graph import Call, Dict, Global, PersistentId


def state_of(new: NewCheckpoint, maker: Maker) -> object:
    """Return a dict of the tensors of a new checkpoint, or the OrderedDict that a state_dict is."""
    pairs: list[object] = []
    for tensor in new.tensors:
        pairs += (tensor.name, maker.tensor(tensor))
    return maker.state_dict(pairs, new.notes) if new.ordered or new.notes else Dict(pairs)


class Maker:
    """Makes nodes for one pickle; names and storages that are met again are the same nodes."""

    def __init__(self) -> None:
        self._globals: dict[tuple[str, str], Global] = {}
        self._references: dict[tuple[Storage, str], PersistentId] = {}
        self._keys: dict[Storage, str] = {}
        self._strings: dict[str, str] = {}
        self.storages: list[Storage] = []
        """The storages that were referred to, by the numbers that are their keys."""

    def name(self, module: str, name: str) -> Global:
        """A name to import."""
        return self._globals.setdefault((module, name), Global(module, name))

    def text(self, text: str) -> str:
        """A string, the same object for the same text, as interned ones are."""
        return self._strings.setdefault(text, text)

    def size(self, sizes: Sequence[int]) -> Call:
        """A torch.Size."""
        return Call("reduce", self.name("torch", "Size"), ((*sizes,),))

    def instance(self, module: str, name: str, state: Mapping[str, object] | tuple[object, ...]) -> Call:
        """An object of a class, by its `__dict__` or by what its `__setstate__` takes."""
        made = Call("new", self.name(module, name), ())
        if isinstance(state, tuple):
            made.states = [state]
        elif state:
            made.states = [Dict([item for key, value in state.items() for item in (self.text(key), value)])]
        return made

    def ordered_dict(self, pairs: Sequence[object] = ()) -> Call:
        """An OrderedDict of key, value, key, value…"""
        made = Call("reduce", self.name("collections", "OrderedDict"), ())
        made.pairs = list(pairs)
        return made

    def state_dict(self, pairs: Sequence[object], notes: Mapping[str, Mapping[str, object]]) -> Call:
        """An OrderedDict of key, value, key, value… with `_metadata`, where there are notes."""
        made = self.ordered_dict(pairs)
        if notes:
            listed: list[object] = []
            for name, said in notes.items():
                fields = [item for key, value in said.items() for item in (self.text(key), value)]
                listed += (name, Dict(list(fields)))
            made.states = [Dict(["_metadata", self.ordered_dict(listed)])]
        return made

    def tensor(self, tensor: Tensor) -> Call:
        """The call that rebuilds a strided tensor (torch/_tensor.py, `_reduce_ex_internal`)."""
        storage, dtype = tensor.storage, tensor.dtype
        if storage is None or tensor.shape is None or (dtype.category == "quantized"):
            raise UnsupportedError(f"tensor {tensor.name!r} is not a plain tensor")
        geometry = (*tensor.shape,), (*tensor.stride,)  # new tuples, as torch's are: pickle writes a shared one once
        view = (self._reference(storage, dtype), tensor.storage_offset, *geometry)
        rest: tuple[object, ...] = (tensor.requires_grad, self.ordered_dict())
        function = "_rebuild_tensor_v2" if dtype.storage else "_rebuild_tensor_v3"
        named = () if dtype.storage else (self.name("torch", dtype.name),)
        flags = [item for flag in ("conj", "neg") if getattr(tensor, flag) for item in (flag, True)]
        more = (Dict(list(flags)),) if flags else ()
        return Call("reduce", self.name("torch._utils", function), (*view, *rest, *named, *more))

    def _reference(self, storage: Storage, dtype: DType) -> PersistentId:
        """The reference to a storage, by the class that has its dtype, else untyped."""
        kind = (storage, dtype.storage or "")
        found = self._references.get(kind)
        if found is None:
            if storage not in self._keys:
                self._keys[storage] = str(len(self.storages))
                self.storages.append(storage)
            if dtype.storage:
                cls, numel = self.name("torch", f"{dtype.storage}Storage"), storage.nbytes // dtype.itemsize
            else:
                cls, numel = self.name("torch.storage", "UntypedStorage"), storage.nbytes
            location = self.text(storage.location)
            pid = (self.text("storage"), cls, self._keys[storage], location, numel)
            found = self._references[kind] = PersistentId(pid)
        return found
