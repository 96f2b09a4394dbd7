"""Exported programs (torch.export.save): a `.pt2` archive of raw records, and a JSON map that says what they are.

Sources: torch/export/pt2_archive/_package.py (`_package_state_dict`, `_package_constants`, `_load_state_dict`),
torch/csrc/export/pt2_archive_constants.h and torch/_export/serde/schema.py (`PayloadMeta`, `TensorMeta`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import LimitError, MalformedError, UnknownFormatError, UnsupportedError
from ckpt_cli.formats.zip.container import SavedPickle, ZipStorages, prefix_of
from ckpt_cli.formats.zip.read import Record, ZipRecords
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, Storage, Tensor, Value
from ckpt_cli.pickles.describe import describe
from ckpt_cli.pickles.flatten import entries_of

NAME = "pt2"

_CONFIGS = (("data/weights/", "_weights_config.json"), ("data/constants/", "_constants_config.json"))
"""Each folder of payloads, and how the names of the maps in it end; they begin with a model's name."""

_DTYPES: dict[int, DType] = {
    number: BY_NAME[name]
    for number, name in {
        1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
        9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
        29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
        34: "uint32", 35: "uint64",
    }.items()
}  # fmt: skip
"""torch/_export/serde/schema.py `ScalarType`."""

_SHORT = 64
"""Bytes of a record that is one word."""

_STRIDED = 7
"""Of schema.py `Layout`."""


class SavedPrograms:
    """The payloads of an archive as entries."""

    def __init__(self, records: ZipRecords, prefix: str) -> None:
        self.storages = ZipStorages(records)
        self.json = JsonRecords(records)
        self._records = records
        self._prefix = prefix
        self._found: dict[str, Storage] = {}
        """Storages by the names of their records."""

    def payloads(self, folder: str, config: str, buffers: frozenset[str] | None) -> Iterator[Entry]:
        """The entries of one map; without a set of `buffers`, all that are no parameters are buffers."""
        listed = self.json.read(config).get("config")
        if not isinstance(listed, dict):
            raise MalformedError(f"record {describe(config)} has no config")
        for name, meta in listed.items():
            if not isinstance(meta, dict) or not isinstance(meta.get("path_name"), str):
                raise MalformedError(f"record {describe(config)} does not say where {describe(name)} is")
            record = self._records.by_name.get(folder + meta["path_name"])
            if record is None:
                raise MalformedError(f"tensor {describe(name)} has no record {describe(folder + meta['path_name'])}")
            is_buffer = buffers is None or name in buffers
            kind = "parameter" if meta.get("is_param") is True else "buffer" if is_buffer else "tensor"
            if meta.get("use_pickle") is True:
                yield from self.pickled(name, record, meta.get("tensor_meta"), kind)
            else:
                yield self._raw(name, record, meta.get("tensor_meta"), kind)

    def _raw(self, name: str, record: Record, meta: Any, kind: str) -> Tensor:
        """A tensor whose storage is the record's bytes."""
        if not isinstance(meta, dict):
            raise MalformedError(f"tensor {describe(name)} has no tensor_meta")
        dtype = _DTYPES.get(meta["dtype"]) if type(meta.get("dtype")) is int else None
        if dtype is None or meta.get("layout", _STRIDED) != _STRIDED:
            raise MalformedError(f"tensor {describe(name)}: its dtype or its layout is not one of torch's")
        shape = _counts(_integers(meta.get("sizes")), name, "shape")
        stride = _counts(_integers(meta.get("strides")), name, "stride")
        offset = _count(_integer(meta.get("storage_offset")), name, "offset")
        requires_grad = meta.get("requires_grad") is True
        if not record.nbytes and 0 not in shape:  # saved from a fake tensor: torch.export.load gives it zeros
            return Tensor(name, dtype, shape, stride, kind=kind, requires_grad=requires_grad, layout="meta")
        storage = self._storage(record, _location(meta.get("device")))
        return _strided(name, dtype, storage, shape, stride, offset, kind=kind, requires_grad=requires_grad)

    def _storage(self, record: Record, location: str) -> Storage:
        found = self._found.get(record.name)
        if found is None:
            key = record.name.removeprefix(f"{self._prefix}data/")
            found = self._found[record.name] = self.storages.storage(
                key, self._records, record, record.nbytes, location
            )
        return found

    def pickled(self, name: str, record: Record, meta: object, kind: str) -> Iterator[Entry]:
        """Yield the entries of a payload that is not raw bytes: a tensor in a zip file of its own, or an object."""
        if meta is None:
            yield Value(name, Opaque(f"<an object, pickled in {record.nbytes} bytes>"))
            return
        for entry in self.saved(record):
            below = replace(entry, name=f"{name}.{entry.name}" if entry.name else name)
            yield replace(below, kind=kind) if isinstance(below, Tensor) and below.kind == "tensor" else below

    def saved(self, record: Record) -> list[Entry]:
        """The entries of a torch.save file that is a record."""
        inner = self.storages.inner(record.name)
        prefix = prefix_of(inner)
        if f"{prefix}data.pkl" not in inner.by_name:
            raise MalformedError(f"record {describe(record.name)} is not a torch.save file")
        saved = SavedPickle(self.storages, inner, prefix, label=f"{record.name.removeprefix(self._prefix)}/")
        return entries_of(saved.graph(), saved)


def read_records(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open a `.pt2` archive: weights under their names, then constants; several models by name before these."""
    programs = SavedPrograms(records, prefix)
    said = records.by_name[f"{prefix}archive_format"]
    kind = bytes(records.read(said.name, _SHORT)).strip() if said.nbytes <= _SHORT else b"too long to be one"
    if kind != b"pt2":
        raise UnknownFormatError(f"a zip archive that says its format is {kind!r}", path=programs.storages.path)
    models = _models(records, prefix)
    if not models:
        raise _without_models(records, prefix, programs.storages.path)
    entries: list[Entry] = []
    for model in models:
        found = _of_model(programs, records, prefix, model)
        entries += (replace(entry, name=f"{model}.{entry.name}") for entry in found) if len(models) > 1 else found
    return Checkpoint(
        path=programs.storages.path,
        format=NAME,
        entries=entries,
        container=programs.storages,
        version=f"exported program (.pt2), archive version {_version(records, prefix)}",
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
    )


def _models(records: ZipRecords, prefix: str) -> list[str]:
    """The names of the exported programs, in the order of the records."""
    found: dict[str, None] = {}
    for name in records.by_name:
        for folder, ending in (*_CONFIGS, ("data/weights/", ".pt"), ("data/constants/", ".pt")):
            if name.startswith(prefix + folder) and name.endswith(ending):
                found[name.removeprefix(prefix + folder).removesuffix(ending)] = None
    return list(found)


def _of_model(programs: SavedPrograms, records: ZipRecords, prefix: str, model: str) -> Iterator[Entry]:
    """The weights and constants of one program; torch 2.8 had each as one torch.save file."""
    for folder, ending in _CONFIGS:
        is_weights = ending == "_weights_config.json"
        config = f"{prefix}{folder}{model}{ending}"
        old = records.by_name.get(f"{prefix}{folder}{model}.pt")
        if old is not None:
            buffers = programs.json.buffers(f"{prefix}models/{model}.json")
            yield from as_buffers(programs.saved(old), buffers)
        elif config in records.by_name:
            buffers = frozenset() if is_weights else programs.json.buffers(f"{prefix}models/{model}.json")
            yield from programs.payloads(f"{prefix}{folder}", config, None if is_weights else buffers)


def as_buffers(entries: list[Entry], buffers: frozenset[str]) -> Iterator[Entry]:
    """The entries, those that the signature calls buffers as such."""
    for entry in entries:
        if isinstance(entry, Tensor) and entry.kind == "tensor" and entry.name in buffers:
            entry = replace(entry, kind="buffer")
        yield entry


def _without_models(records: ZipRecords, prefix: str, path: str) -> UnsupportedError | MalformedError:
    if any(name.startswith(f"{prefix}data/aotinductor/") for name in records.by_name):
        return UnsupportedError("an AOTInductor package (.pt2): compiled code, whose weights are not listed", path=path)
    return MalformedError("a .pt2 archive without weights or constants", path=path)


def _version(records: ZipRecords, prefix: str) -> str:
    record = records.by_name.get(f"{prefix}archive_version")
    if record is None or record.nbytes > _SHORT:
        return "not given"
    return bytes(records.read(record.name, _SHORT)).decode("ascii", "replace").strip()


def _integers(value: object) -> object:
    return [_integer(item) for item in value] if isinstance(value, list) else value


def _integer(value: object) -> object:
    """The number of a SymInt: `{"as_int": 4}`."""
    return value.get("as_int") if isinstance(value, dict) else value


def _location(device: object) -> str:
    """`cuda:0` of `{"type": "cuda", "index": 0}`."""
    if not isinstance(device, dict) or not isinstance(device.get("type"), str):
        return "cpu"
    index = device.get("index")
    return f"{device['type']}:{index}" if type(index) is int and index >= 0 else device["type"]


# --- torch 2.1 to 2.7 -------------------------------------------------------------------------------------------------

_SAVED = ("serialized_state_dict", "serialized_constants")
"""Records that are torch.save files: `.pt`, or in the first versions `.json`, which they never were."""


def read_old(records: ZipRecords, prefix: str) -> Checkpoint:
    """Open a plain zip file of torch.save files and JSON (torch/export/__init__.py `load`, which still reads them)."""
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


# --- JSON, within limits of memory and depth -------------------------------------------------------------------------

_COSTS = ((b"{", 300), (b"[", 64), (b",", 40), (b'"', 28))
"""Bytes of memory that what begins, goes on or ends with a character takes when parsed."""

_COUNT_END = 1 << 63
"""The bound of sizes, strides and offsets: torch has them in 64 bits with a sign."""


class JsonRecords:
    """The JSON records of one zip file, which share one limit of memory."""

    def __init__(self, records: ZipRecords) -> None:
        self._records = records
        self._path = records.file.path

    def read(self, name: str) -> dict[str, Any]:
        """Return the object that a record is; raises MalformedError for anything else, LimitError for far too much."""
        raw = self.raw(name)
        cost = (2 if raw.isascii() else 8) * len(raw) + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
        if not current().affords((self, "JSON"), cost, limits.ZIP_JSON_PARSED):
            raise LimitError(
                f"record {describe(name)} and others would take about {cost >> 20} MiB of memory", path=self._path
            )
        try:
            found = json.loads(raw.decode())
        except RecursionError:
            raise MalformedError(f"record {describe(name)} nests too deeply", path=self._path) from None
        except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
            raise MalformedError(f"record {describe(name)} is not JSON: {error}", path=self._path) from None
        if not isinstance(found, dict):
            raise MalformedError(f"record {describe(name)} is not a JSON object", path=self._path)
        return found

    def raw(self, name: str) -> bytes:
        """The bytes of a record."""
        if self._records.by_name[name].nbytes > limits.ZIP_JSON:
            nbytes = self._records.by_name[name].nbytes
            raise LimitError(f"record {describe(name)} has {nbytes} bytes, far more than it needs", path=self._path)
        return bytes(self._records.read(name, limits.ZIP_JSON))

    def buffers(self, name: str) -> frozenset[str]:
        """The names of the buffers in the signature of an exported program, which is not parsed: graphs are long."""
        record = self._records.by_name.get(name)
        if record is None or record.nbytes > limits.ZIP_JSON:
            return frozenset()
        found = islice(_BUFFER.finditer(self.raw(name)), limits.ZIP_RECORDS)
        return frozenset(match[1].decode("utf-8", "replace") for match in found)


_BUFFER = re.compile(rb'"buffer_name": ?"([^"\\]*)"')
"""Of torch/_export/serde/schema.py `InputToBufferSpec`."""


def _count(value: object, tensor: str, what: str) -> int:
    """A number from 0 that 64 bits hold; raises MalformedError."""
    if type(value) is not int or not 0 <= value < _COUNT_END:
        raise MalformedError(f"tensor {describe(tensor)}: its {what} is not a number that a tensor may have")
    return value


def _counts(value: object, tensor: str, what: str) -> tuple[int, ...]:
    """A list of such numbers."""
    if not isinstance(value, list) or len(value) > limits.DIMENSIONS:
        raise MalformedError(
            f"tensor {describe(tensor)}: its {what} is not a list of up to {limits.DIMENSIONS} numbers"
        )
    return tuple(_count(item, tensor, what) for item in value)


def _strided(
    name: str, dtype: DType, storage: Storage, shape: tuple[int, ...], stride: tuple[int, ...], offset: int,
    *, kind: str, requires_grad: bool,
) -> Tensor:  # fmt: skip
    """A view of a storage, checked to lie inside it; raises MalformedError."""
    if len(shape) != len(stride):
        raise MalformedError(
            f"tensor {describe(name)}: its shape {describe(shape)} and its stride {describe(stride)} "
            "have different lengths"
        )
    elements = 1
    for size in shape:
        elements *= size or 1
    if elements >= _COUNT_END:
        raise MalformedError(
            f"tensor {describe(name)}: its shape {describe(shape)} has more elements than 64 bits can count"
        )
    tensor = Tensor(name, dtype, shape, stride, storage, offset, kind, requires_grad)
    begin, end = tensor.span
    if end > storage.nbytes:
        raise MalformedError(
            f"tensor {describe(name)} needs bytes {begin}–{end}, storage {storage.key!r} has {storage.nbytes}"
        )
    return tensor
