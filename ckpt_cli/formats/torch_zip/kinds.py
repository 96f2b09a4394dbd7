"""The zip files that torch writes, in one table: which record tells which kind, and the module that reads it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from ckpt_cli.errors import MalformedError, UnknownFormatError, about
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.zip.container import prefix_of
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Flavour:
    """One kind of zip file."""

    mark: str
    """The record, below the common prefix, that only this kind has among those after it; a folder ends in a slash."""
    module: str = ""
    """Has `read_records(records, prefix) -> Checkpoint`; empty for one that is not read."""
    what: str = ""
    """What one that is not read is."""
    rooted: bool = True
    """Whether its records lie in a folder, as those of torch's own writer do."""


FLAVOURS = (
    Flavour("archive_format", "ckpt_cli.formats.torch_zip.pt2"),
    Flavour("serialized_exported_program.json", "ckpt_cli.formats.torch_zip.pt2_old", rooted=False),
    Flavour("constants.pkl", "ckpt_cli.formats.torch_zip.torchscript"),
    Flavour("model.json", what="an old TorchScript archive (model.json, as PyTorch 1.0 wrote), which is not read"),
    Flavour("data.pkl", "ckpt_cli.formats.torch_zip.read"),
    Flavour("data/aotinductor/", what="an AOTInductor package: compiled code, whose weights are not listed"),
    Flavour(".data/extern_modules", what="a torch.package archive, a Python package with code, which is not read"),
)
"""In the order in which they are looked for."""


def read(file: SourceFile) -> Checkpoint:
    """Open a zip file as what its records say that it is; raises UnknownFormatError for one that is not torch's."""
    records = ZipRecords(file)
    if not records.by_name:
        raise MalformedError("a zip file without records", path=file.path)
    prefix = prefix_of(records)
    for flavour in FLAVOURS:
        within = prefix if flavour.rooted else ""
        if (flavour.rooted and not prefix) or not _has(records, within + flavour.mark):
            continue
        if not flavour.module:
            raise UnknownFormatError(flavour.what, path=file.path)
        with about(file.path):
            checkpoint: Checkpoint = importlib.import_module(flavour.module).read_records(records, within)
        return checkpoint
    raise UnknownFormatError(f"a zip file, but not one of torch.save's: it has no {prefix}data.pkl", path=file.path)


def _has(records: ZipRecords, mark: str) -> bool:
    if mark.endswith("/"):
        return any(name.startswith(mark) for name in records.by_name)
    return mark in records.by_name
