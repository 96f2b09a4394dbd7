"""What is in an array with objects in it: a pickle follows the header (numpy/lib/format.py `write_array`)."""

from __future__ import annotations

from dataclasses import replace

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats.numpy.npy import Header
from ckpt_cli.model.checkpoint import Entry, Storage, Value
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.graph import Graph
from ckpt_cli.pickles.tensors.inline_bytes import Place


def object_entries(name: str, header: Header, graph: Graph, place: Place) -> list[Entry]:
    """The entries of the array's pickle below the array's name; the array itself where nothing in it opens up.

    Raises MalformedError for tensors that do not fit the pickle.
    """
    found = entries_of(graph, _NoStorages(), place=place)
    if [(type(entry), entry.name) for entry in found] == [(Value, "")]:
        return [header.entry(name, Storage(name, 0))]
    return [replace(entry, name=f"{name}.{entry.name}" if entry.name else name) for entry in found]


class _NoStorages:
    """The storages of a pickle that has all bytes in it."""

    big_endian = False

    def find(self, key: str, nbytes: int, location: str) -> Storage:  # noqa: ARG002 - as the protocol has it
        """Raise MalformedError: nothing stands outside of the pickle."""
        raise MalformedError("the pickle of a numpy array refers to a storage outside of it")
