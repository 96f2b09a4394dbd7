"""Read zip files of torch: those of torch.save since 1.6 here, the other kinds by a table of their readers.

Record names and their order are those of torch/csrc/serialization and torch/serialization.py (`_save`).
"""

from __future__ import annotations

import importlib

from ckpt_cli.errors import MalformedError, UnknownFormatError, about
from ckpt_cli.facts import dataclass
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
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


@dataclass(frozen=True, slots=True)
class Flavour:
    """One kind of zip file."""

    mark: str
    """The record, below the common prefix, that only this kind has among those after it; a folder ends in a slash."""
    reader: str = ""
    """`module:function`, where the function takes records and prefix; empty for one that is not read."""
    what: str = ""
    """A description of one that is not read."""
    rooted: bool = True
    """True if its records lie in a folder, as those of torch's own writer do."""


FLAVOURS = (
    Flavour("archive_format", "ckpt_cli.formats.torch_zip.pt2:read_records"),
    Flavour("serialized_exported_program.json", "ckpt_cli.formats.torch_zip.pt2:read_old", rooted=False),
    Flavour("constants.pkl", "ckpt_cli.formats.torch_zip.torchscript:read_records"),
    Flavour("model.json", what="an old TorchScript archive (model.json, as PyTorch 1.0 wrote), which is not read"),
    Flavour("data.pkl", "ckpt_cli.formats.torch_zip.read:read_records"),
    Flavour("policy.pth", "ckpt_cli.formats.torch_zip.sb3:read_records", rooted=False),
    Flavour("model.weights.h5", "ckpt_cli.formats.containers.h5:read_records", rooted=False),
    Flavour("data/aotinductor/", what="an AOTInductor package: compiled code, whose weights are not listed"),
    Flavour(".data/extern_modules", what="a torch.package archive, a Python package with code, which is not read"),
)
"""In the order in which they are looked for."""


def read(file: LocalFile) -> Checkpoint:
    """Open a zip file as what its records say that it is; raises UnknownFormatError for one that is not torch's."""
    records = ZipRecords(file)
    if not records.by_name:
        raise MalformedError("a zip file without records", path=file.path)
    prefix = prefix_of(records)
    for flavour in FLAVOURS:
        within = prefix if flavour.rooted else ""
        if (flavour.rooted and not prefix) or not _has(records, within + flavour.mark):
            continue
        if not flavour.reader:
            raise UnknownFormatError(flavour.what, path=file.path)
        with about(file.path):
            module, _, function = flavour.reader.partition(":")
            checkpoint: Checkpoint = getattr(importlib.import_module(module), function)(records, within)
        return checkpoint
    raise UnknownFormatError(f"a zip file, but not one of torch.save's: it has no {prefix}data.pkl", path=file.path)


def _has(records: ZipRecords, mark: str) -> bool:
    if mark.endswith("/"):
        return any(name.startswith(mark) for name in records.by_name)
    return mark in records.by_name
