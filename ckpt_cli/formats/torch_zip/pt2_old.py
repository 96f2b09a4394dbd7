"""Exported programs as torch 2.1 to 2.7 wrote them: a plain zip file of torch.save files and JSON.

Source: torch/export/__init__.py (`load`, which still reads them).
"""

from __future__ import annotations

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats.torch_zip.pt2 import NAME, SavedPrograms, as_buffers
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry

_SAVED = ("serialized_state_dict", "serialized_constants")
"""Records that are torch.save files: `.pt`, or in the first versions `.json`, which they never were."""


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open an exported program of that time: its state_dict, then its constants."""
    programs = SavedPrograms(records, prefix)
    buffers = programs.json.buffers(f"{prefix}serialized_exported_program.json")
    entries: list[Entry] = []
    for name in _SAVED:
        found = [records.by_name[name + suffix] for suffix in (".pt", ".json") if name + suffix in records.by_name]
        if not found and name == _SAVED[0]:
            raise MalformedError("an exported program without its serialized_state_dict", path=programs.storages.path)
        for record in found[:1]:
            saved = programs.saved(record) if record.nbytes else []
            entries += as_buffers([entry for entry in saved if entry.name], buffers)  # without a name: an empty dict
    version = records.by_name.get("version")
    said = bytes(records.read("version", 64)).decode("ascii", "replace") if version and version.nbytes < 64 else "?"
    return Checkpoint(
        path=programs.storages.path,
        format=NAME,
        entries=entries,
        container=programs.storages,
        version=f"exported program of torch 2.1 to 2.7, version {said.strip()}",
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )
