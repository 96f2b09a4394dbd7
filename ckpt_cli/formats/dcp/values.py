"""The pickled values of a distributed checkpoint as graphs, to be written again without being run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckpt_cli import limits
from ckpt_cli.budget import WalkBudget
from ckpt_cli.errors import CkptError, LimitError, UnsupportedError
from ckpt_cli.formats.dcp.read import SavedItem
from ckpt_cli.model.changes import content_of
from ckpt_cli.model.checkpoint import Value
from ckpt_cli.model.new_checkpoint import SavedValue
from ckpt_cli.pickles.graph import nodes_of
from ckpt_cli.pickles.references import storage_references
from ckpt_cli.pickles.tensors.storages import Storages


def saved_values(values: Iterable[Value]) -> Iterator[SavedValue]:
    """Read the items of some values.

    Raises MalformedError, UnsupportedError or LimitError where one cannot be read, with its name.
    """
    nodes = nbytes = 0
    for value in values:
        if not isinstance(value.content, SavedItem):
            raise UnsupportedError(f"{value.name!r} is not a value of a distributed checkpoint")
        try:
            found = _saved(value.name, value.content)
        except CkptError as error:
            error.problem = f"value {value.name!r}: {error.problem}"
            raise
        nbytes += len(found.data)
        nodes += sum(1 for _ in nodes_of(found.root))
        if nbytes > limits.DCP_VALUES or nodes > limits.PICKLE_BLOCKS:
            raise LimitError(f"its values are pickles of more than {nbytes:,} bytes and {nodes:,} objects")
        yield found


def _saved(name: str, value: SavedItem) -> SavedValue:
    graph, saved = value.saved()
    references = storage_references(graph.root)
    if references and saved.big_endian:
        raise UnsupportedError("it holds tensors that were saved big-endian")
    storages_of = Storages(graph, saved, WalkBudget(graph.nbytes))
    storages = {id(reference): storages_of.of(reference)[0] for reference in references}
    contents = {storage: content_of(storage) for storage in storages.values()}
    return SavedValue(name, graph.root, bytes(graph.data[: graph.nbytes]), storages, contents)
