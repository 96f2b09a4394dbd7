"""The zip file that torch.save has written since 1.6: a pickle, and a record a storage.

Record names and their order are those of torch/csrc/serialization and torch/serialization.py (`_save`).
"""

from __future__ import annotations

from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.pickles.flatten import entries_of, objects_of, top_level_of

NAME = "zip"


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open a torch zip file: its directory and its pickle are read, no storage is."""
    storages = ZipStorages(records)
    saved = SavedPickle(storages, records, prefix)
    graph = saved.graph()
    return Checkpoint(
        path=storages.path,
        format=NAME,
        entries=entries_of(graph, saved, place=saved.place()),
        container=storages,
        version=f"torch.save zip, version {saved.version or 'not given'}",
        objects=objects_of(graph),
        top_level=top_level_of(graph),
        document=graph,
    )
