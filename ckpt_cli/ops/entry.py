"""The engine of `info FILE NAME`: the facts of one entry, or of all that a prefix or glob selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_cli.errors import CkptError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.copy import OnProgress
from ckpt_cli.model.checkpoint import Checkpoint, Tensor, Value
from ckpt_cli.ops.aliasing import stored_nbytes, tied_names, unique_numel
from ckpt_cli.ops.parts import gradient_of, parts_of
from ckpt_cli.ops.select import refuse_index, select_one
from ckpt_cli.ops.stats import stats
from ckpt_cli.ops.summaries import Row

if TYPE_CHECKING:
    from concurrent.futures import Executor


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a file in which bytes of a tensor stand as they are."""

    path: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """The facts of one tensor."""

    tensor: Tensor
    python_class: str
    """The class that it is loaded as, such as `torch.nn.parameter.Parameter`."""
    gradient: str | None
    """The name of its gradient in the file; None where the file has none, as torch stores none."""
    tied_with: Sequence[str]
    places: Sequence[Place]
    """Where its span of the storage stands in the files; empty where it is compressed or has no bytes of its own."""
    values: Sequence[Row]
    """Statistics of its values, or of those of the parts that it is made of."""


@dataclass(frozen=True, slots=True)
class ValueFacts:
    """The facts of one non-tensor entry."""

    value: Value
    python_class: str
    of_module: bool
    """True if it is a setting of a pickled module."""


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """The facts of all entries that a prefix or a glob selects."""

    name: str
    python_class: str | None
    """The class of the container; None where the file does not say, and of a glob."""
    tensors: int
    numel: int
    """Elements of its tensors, those of tied ones counted once."""
    nbytes: int
    """Bytes of their storages."""
    values: int
    """Non-tensor entries below it."""
    dtypes: Sequence[str]
    names: Sequence[str]
    """The names of the tensors and values."""


EntryFacts = TensorFacts | ValueFacts | ContainerFacts


def describe_entry(
    checkpoint: Checkpoint, argument: str, executor: Executor, on_progress: OnProgress = lambda _, __: None
) -> list[EntryFacts]:
    """Return the facts of what one NAME selects: of each entry that has exactly this name, else of all together.

    Reads the values of a tensor, on an executor, and nothing of a container. Raises NameNotFoundError.
    """
    with about(checkpoint.path):
        selections = select_one(checkpoint, argument)
        refuse_index(checkpoint, argument, selections, "info")
        if not selections[0].exact:
            entries = [selection.entry for selection in selections]
            return [_container(checkpoint, argument, entries)]
        found: list[EntryFacts] = []
        for selection in selections:
            entry = selection.entry
            if isinstance(entry, Value):
                found.append(ValueFacts(entry, _class_of_value(entry.value), entry.of_module))
            else:
                found.append(_tensor(checkpoint, entry, executor, on_progress))
        return found


def _tensor(checkpoint: Checkpoint, tensor: Tensor, executor: Executor, on_progress: OnProgress) -> TensorFacts:
    tied = tied_names(checkpoint.tensors).get(tensor.name, [])
    alone = replace(checkpoint, entries=[tensor])
    return TensorFacts(
        tensor,
        _class_of(tensor),
        gradient_of(checkpoint, tensor, parts_of(checkpoint).parts),
        [name for name in tied if name != tensor.name],
        _places(tensor),
        stats(alone, (), executor, on_progress).tensors,
    )


def _class_of(tensor: Tensor) -> str:
    if tensor.python_type:
        return tensor.python_type
    return "torch.nn.parameter.Parameter" if tensor.kind == "parameter" else "torch.Tensor"


def _class_of_value(value: object) -> str:
    return "object" if type(value).__name__ == "Opaque" else type(value).__name__


def _places(tensor: Tensor) -> list[Place]:
    if tensor.storage is None:
        return []
    begin, end = tensor.span
    try:
        extents = tensor.storage.extents(begin, end - begin)
    except CkptError:  # it is compressed
        return []
    return [Place(extent.file.path, extent.offset, extent.nbytes) for extent in extents]


def _container(checkpoint: Checkpoint, argument: str, entries: Sequence[Tensor | Value]) -> ContainerFacts:
    tensors = [entry for entry in entries if isinstance(entry, Tensor)]
    return ContainerFacts(
        argument,
        _class_at(checkpoint, argument),
        len(tensors),
        unique_numel(tensors),
        stored_nbytes(tensors),
        len(entries) - len(tensors),
        list(dict.fromkeys(tensor.dtype.name for tensor in tensors)),
        [entry.name for entry in entries],
    )


def _class_at(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the class of the container that a prefix is in a pickle: a dict, a list, a module or another object."""
    from ckpt_cli.budget import WalkBudget
    from ckpt_cli.nn.state_dict import node_at
    from ckpt_cli.pickles.containers import Containers, is_ordered_dict
    from ckpt_cli.pickles.graph import Call, Dict, Graph
    from ckpt_cli.pickles.nn_module import class_of

    graph = checkpoint.document
    if not isinstance(graph, Graph):
        return None
    node = node_at(graph.root, name.strip("\"'").removesuffix("."), Containers(WalkBudget(graph.nbytes)))
    if is_ordered_dict(node):
        return "collections.OrderedDict"
    if isinstance(node, Call):
        kind = class_of(node)
        return None if kind is None else kind.qualified
    return "dict" if isinstance(node, Dict) else type(node).__name__ if isinstance(node, list | tuple) else None
