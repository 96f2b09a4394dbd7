"""New torch zip files of nested dicts and lists, from tensors and values that each have a place in them.

What torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes of a distributed checkpoint.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from ckpt_cli import limits
from ckpt_cli.errors import CkptError, FormatError, MalformedError
from ckpt_cli.files.copy import Progress, no_progress
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.dcp.paths import nest
from ckpt_cli.formats.torch_zip.write import write_saved
from ckpt_cli.formats.zip.container import ZipStorages, prefix_of
from ckpt_cli.model.checkpoint import Storage
from ckpt_cli.model.new_checkpoint import NewCheckpoint, SavedValue
from ckpt_cli.pickles.equal import same_graphs
from ckpt_cli.pickles.graph import Graph, Inline, nodes_of
from ckpt_cli.pickles.references import number_storages, storage_references
from ckpt_cli.pickles.tensors.make import Maker


class Nested:
    """A state about to be written; `new.paths` has the place of each tensor and value, in their order."""

    def __init__(self, new: NewCheckpoint) -> None:
        maker = Maker()
        nodes: dict[str, object] = {tensor.name: maker.tensor(tensor) for tensor in new.tensors}
        storages: dict[int, Storage] = {}
        for node in nodes.values():
            for reference in storage_references(node):
                storages[id(reference)] = maker.storages[int(reference.pid[2])]  # type: ignore[index]  # as it was made
        contents = dict(new.contents)
        pickles = bytearray()
        for value in new.values:
            _join(value, pickles)
            nodes[value.name] = value.root
            storages |= value.storages
            contents |= value.contents
        self._data = bytes(pickles)
        self._root = nest((name, path, nodes[name]) for name, path in new.paths.items())
        self._storages = number_storages(self._root, storages)
        self.new = replace(new, contents=contents)
        """What is written, with the bytes of all storages."""

    @property
    def nbytes(self) -> int:
        """The bytes of the new file."""
        return self._write(None, no_progress)

    def write(self, target: LocalFile, progress: Progress = no_progress) -> None:
        """Write the pickle and all storages."""
        self._write(target, progress)

    def _write(self, target: LocalFile | None, progress: Progress) -> int:
        out = self.new
        return write_saved(self._root, self._storages, out, target, progress, prefix=out.stem, data=self._data)

    def verify(self, path: str) -> None:
        """Read the new file back, and compare its pickle with the one that was meant."""
        from ckpt_cli.formats.open import open_checkpoint

        fault = ""
        try:
            with closing(open_checkpoint(path)) as copy:
                container, graph = copy.container, copy.document
                if not isinstance(container, ZipStorages) or not isinstance(graph, Graph):
                    raise MalformedError("it is not a torch zip file")
                records = container.records
                data = records.read(f"{prefix_of(records)}data.pkl", limits.PICKLE_INFLATED)
                if not same_graphs(self._root, self._data, graph.root, data):
                    fault = "its pickle is another one"
        except FormatError as error:
            fault = error.problem
        if fault:
            raise CkptError(f"the new file did not read back as it should, so nothing was replaced: {fault}")


def _join(value: SavedValue, pickles: bytearray) -> None:
    """Add the pickle of a value to others, where it has long strings, and have these counted from the first byte."""
    long = [node for node in nodes_of(value.root) if isinstance(node, Inline)]
    for node in long:
        object.__setattr__(node, "offset", node.offset + len(pickles))
    if long:
        pickles += value.data
