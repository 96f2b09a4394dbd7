"""The zip files of Stable-Baselines3: a torch.save file for each module and optimizer, and JSON beside them.

Source: stable_baselines3/common/save_util.py (`save_to_zip_file`, `load_from_zip_file`, `data_to_json`): a record
`data` of JSON, in which what JSON cannot hold is a pickle in base64, `NAME.pth` for each state_dict of the policy and
its optimizers, `pytorch_variables.pth` for other tensors, and the version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, UnsupportedError, quoted
from ckpt_cli.formats.signatures import is_zip
from ckpt_cli.formats.torch_zip.pt2 import JsonRecords
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.layout import DEFLATED
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Value
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.flatten import entries_of, objects_of

NAME = "stable-baselines3"

_END = ".pth"
_POLICY, _OPTIMIZER = "policy", "policy.optimizer"
_VERSION = "_stable_baselines3_version"
_HEAD = 4
"""Bytes by which a zip file is known."""

_SHORT = 64
"""Bytes of a version."""

_TEXT = 1000
"""Characters of the name of a class that are shown."""


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open the files in it as one checkpoint: `policy.*`, `optimizer.*`, and the others by their own names."""
    storages = ZipStorages(records)
    entries: list[Entry] = []
    objects: dict[str, None] = {}
    files = [name for name in records.by_name if name.startswith(prefix) and name.endswith(_END)]
    if len(files) > limits.SHARDS:
        raise LimitError(f"it has {len(files)} files of torch.save")
    for name in files:
        label = name.removeprefix(prefix).removesuffix(_END)
        saved = _saved(storages, name, label)
        graph = saved.graph()
        below = "optimizer" if label == _OPTIMIZER and f"{prefix}optimizer{_END}" not in records.by_name else label
        found = entries_of(graph, saved, place=saved.place())
        entries += (replace(entry, name=f"{below}.{entry.name}" if entry.name else below) for entry in found)
        objects.update(dict.fromkeys(objects_of(graph)))
    if f"{prefix}data" in records.by_name:
        entries += _values(JsonRecords(records).read(f"{prefix}data"))
    return Checkpoint(
        path=storages.path,
        format=NAME,
        entries=entries,
        container=storages,
        version=f"Stable-Baselines3 {_version(records, prefix)}".strip(),
        objects=list(objects),
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
        weights=_POLICY,
    )


def _saved(storages: ZipStorages, name: str, label: str) -> SavedPickle:
    """Return the torch.save file that a record is."""
    if storages.records.by_name[name].method == DEFLATED:
        path = quoted(storages.path)
        raise UnsupportedError(
            f"{describe(name)} in it is compressed, which Stable-Baselines3 does not do",
            path=storages.path,
            hint=f"unzip {path} -d OUT && (cd OUT && zip -0r ../OUT.zip .) makes one that is not",
        )
    records = storages.records
    record = records.by_name[name]
    if is_zip(records.file.read(records.data_offset(record), min(_HEAD, record.nbytes))):
        inner = storages.inner(name)
        within = prefix_of(inner)
        if f"{within}data.pkl" in inner.by_name:
            return SavedPickle(storages, inner, within, label=f"{label}/")
    raise MalformedError(f"record {describe(name)} is not a file that torch.save wrote since 1.6", path=storages.path)


def _version(records: ZipRecords, prefix: str) -> str:
    record = records.by_name.get(f"{prefix}{_VERSION}")
    if record is None or record.nbytes > _SHORT:
        return ""
    return bytes(records.read(record.name, _SHORT)).decode("ascii", "replace").strip()


_PLAIN = (str, int, float, bool, type(None))


def _values(data: dict[str, Any]) -> Iterator[Value]:
    """Yield what the JSON says of the run, below `data`; of what is pickled in it, the class."""
    for name, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value:
            yield Value(f"data.{name}", Opaque(f"{str(value.get(':type:', 'an object'))[:_TEXT]}, pickled"))
        elif isinstance(value, _PLAIN) or (isinstance(value, list) and all(isinstance(item, _PLAIN) for item in value)):
            yield Value(f"data.{name}", value)
        else:
            yield Value(f"data.{name}", Opaque(f"<JSON of {len(value)} items>"))
