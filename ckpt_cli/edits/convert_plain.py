"""Conversions that make every object plain, so that `torch.load(weights_only=True)` takes the new file."""

from __future__ import annotations

from typing import Any

from ckpt_cli.budget import WalkBudget
from ckpt_cli.edits.convert_contents import Casting, pack_plain
from ckpt_cli.edits.convert_options import ConvertPlan, stem_of
from ckpt_cli.edits.plain import Plain
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.targets import Target
from ckpt_cli.formats.torch_zip.write import spelled, unwrap_classes
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.model.changes import Content, content_of
from ckpt_cli.model.checkpoint import Checkpoint, Storage, Tensor
from ckpt_cli.model.new_checkpoint import NewCheckpoint
from ckpt_cli.nn.state_dict import node_at
from ckpt_cli.pickles.containers import Containers
from ckpt_cli.pickles.graph import Call, Global, Graph, PersistentId
from ckpt_cli.pickles.references import number_storages, storage_references
from ckpt_cli.pickles.tensors.calls import CALLS
from ckpt_cli.pickles.tensors.inline_bytes import InlineBytes, PicklePlace
from ckpt_cli.pickles.tensors.make import Maker
from ckpt_cli.pickles.tensors.numpy import ARRAYS
from ckpt_cli.pickles.tensors.rebuild import Rebuilder
from ckpt_cli.pickles.write import write_pickle
from ckpt_cli.scanner.weights_only import refusal_of

_VIEWS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
"""The functions whose first argument is the storage of a view."""


def plan_plain(checkpoint: Checkpoint, graph: Graph, target: Target, output: str, prefix: str) -> ConvertPlan:
    """Plan a file of torch.save that has the values of a pickle, or of a part of it, as plain ones.

    Raises UnsupportedError for an object that has no plain form, with its place.
    """
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.formats.torch_zip.write import SavedObject

    maker = _TensorMaker(checkpoint, graph)
    root = node_at(graph.root, prefix, Containers(WalkBudget(graph.nbytes))) if prefix else graph.root
    plain = Plain(graph.data, WalkBudget(graph.nbytes), maker.tensor)
    new_root = plain.run(root)
    ordered = number_storages(new_root, maker.storages_of(new_root))
    contents = {storage: maker.content(storage) for storage in ordered}
    pickle = bytearray()
    write_pickle(new_root, graph.data, pickle.extend)
    problem = refusal_of(pickle)
    if problem:
        raise UnsupportedError(f"torch's weights_only loader would not take it: {problem}")
    new = NewCheckpoint((), contents, stem=stem_of(output))
    job = SavedObject(new_root, ordered, new, graph.data, open_checkpoint, write=target.object_writer().write_object)
    below = f"{prefix}." if prefix else ""
    tensors = [tensor for tensor in checkpoint.tensors if tensor.name.startswith(below)]
    return ConvertPlan(
        job,
        len(tensors),
        Losses(),
        contents,
        not_kept=tuple(checkpoint.unread),
        plain=tuple(plain.changes),
    )


class _TensorMaker:
    """Makes tensors of arrays in a pickle, and knows the storages that a graph refers to."""

    def __init__(self, checkpoint: Checkpoint, graph: Graph) -> None:
        from ckpt_cli.formats.plain import KnownStorages

        self._checkpoint = checkpoint
        container = checkpoint.container
        finder: Any = KnownStorages(checkpoint.tensors)
        if isinstance(container, ZipStorages):  # which has those too that only objects refer to
            finder = SavedPickle(container, container.records, prefix_of(container.records))
        if finder.big_endian:
            raise UnsupportedError("the file is big-endian", hint="convert it without --plain into safetensors first")
        unwrap_classes(graph.root)
        budget = WalkBudget(graph.nbytes)
        self._rebuilder = Rebuilder(CALLS, graph, finder, budget, PicklePlace(None))
        self._maker = Maker()
        self._contents: dict[Storage, Content] = {}
        self._storages: dict[int, Storage] = {}
        """The storages of the references that were made, by their identity."""

    def tensor(self, name: str, node: Call) -> object | None:
        """Return the call of a new tensor for one whose bytes stand in the pickle; None for any other call."""
        from ckpt_cli.arrays.cast import Losses

        func = node.func
        if type(func) is not Global or func.name not in (*ARRAYS, *_VIEWS):
            return None
        if func.name in _VIEWS and type(node.args) is tuple and node.args and type(node.args[0]) is PersistentId:
            return None
        tensor = self._rebuilder.tensor(name, node)
        if tensor is None or tensor.storage is None or not isinstance(tensor.storage.source, InlineBytes):
            return None
        if spelled(tensor.dtype) is None:
            raise UnsupportedError(f"{name!r} is an array of {tensor.dtype}, which torch does not have")
        if func.name in ARRAYS:
            (made,), contents = pack_plain(self._checkpoint, [tensor], Casting(None, Losses()), tied=False)
            self._contents |= contents
        else:
            made = tensor
        return self._call(made)

    def _call(self, tensor: Tensor) -> Call:
        call = self._maker.tensor(tensor)
        for reference in storage_references(call):
            self._storages[id(reference)] = self._maker.storages[int(reference.pid[2])]  # type: ignore[index]  # as made
        return call

    def storages_of(self, root: object) -> dict[int, Storage]:
        """Return the storage of each reference of a graph, by the reference's identity."""
        return {
            id(reference): self._storages.get(id(reference)) or self._rebuilder.storages.of(reference, bare=True)[0]
            for reference in storage_references(root)
        }

    def content(self, storage: Storage) -> Content:
        """Return the bytes of a storage."""
        return self._contents.get(storage) or content_of(storage, files=self._checkpoint.container.files)
