"""The initializers of an ONNX model: weights in the file itself, or in files of external data beside it.

Source: onnx/onnx.proto (`ModelProto`, `GraphProto`, `TensorProto`, `SparseTensorProto`) and
docs/ExternalData.md. Elements are bytes in `raw_data` or external data; else numbers of the field for their dtype, of
which those of float and double stand as plain bytes too. The graph itself is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from ckpt_cli import limits
from ckpt_cli.budget import current
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import (
    LimitError,
    MalformedError,
    TruncatedError,
    UnknownFormatError,
    UnsupportedError,
    about,
    listed,
)
from ckpt_cli.facts import dataclass
from ckpt_cli.files.open import Opener
from ckpt_cli.files.places import exists, folder_of, is_plain_name, join
from ckpt_cli.files.source import Extent, SourceFile
from ckpt_cli.formats.containers.protobuf import BYTES, VARINT, Field, Reader
from ckpt_cli.model.checkpoint import Checkpoint, Entry, Opaque, PlainBytes, Storage, Tensor, Value, contiguous_stride
from ckpt_cli.pickles.describe import describe

if TYPE_CHECKING:
    from ckpt_cli.files.patches import Overlay

NAME = "onnx"

_IR_VERSION, _PRODUCER, _PRODUCER_VERSION, _GRAPH, _METADATA = 1, 2, 3, 7, 14
_INITIALIZER, _SPARSE = 5, 15
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_FLOATS, _INT32S, _INT64S, _DOUBLES, _UINT64S = 4, 5, 7, 10, 11

_DTYPES: dict[int, DType] = {
    number: BY_NAME[name]
    for number, name in {
        1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
        10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
        17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 24: "float8_e8m0fnu",
    }.items()
}  # fmt: skip
_OTHERS = {8: "string", 21: "uint4", 22: "int4", 23: "float4_e2m1", 25: "uint2", 26: "int2", 27: "float6_e2m3",
           28: "float6_e3m2"}  # fmt: skip
"""`TensorProto.DataType` of those that are only listed."""

_PLAIN = {_FLOATS: ("float32", "complex64"), _DOUBLES: ("float64", "complex128")}
"""Fields of numbers that stand as they are, and the dtypes of the elements that they are."""

_VARINTS = {
    _INT32S: ("int32", "int16", "int8", "uint16", "uint8", "bool", "float16", "bfloat16", "float8_e4m3fn",
              "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    _INT64S: ("int64",),
    _UINT64S: ("uint32", "uint64"),
}  # fmt: skip
"""The same of numbers that take as many bytes as they need."""

_NAMED = 3
"""Names in a note."""

_TEXT = 64 << 10
"""Bytes of a text that is read."""


class _Files:
    """The container: the model and the files of external data, none of which has checksums."""

    def __init__(self, file: SourceFile) -> None:
        self.files: Sequence[SourceFile] = (file,)

    def seal(self, overlay: Overlay) -> None:
        """There are no checksums."""

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


@dataclass(slots=True)
class _Initializer:
    """What a `TensorProto` says."""

    name: str = ""
    type: int = 0
    dims: list[int] = field(default_factory=list)
    contents: dict[int, list[Field]] = field(default_factory=dict)
    """The fields with elements, by their numbers."""
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.dims)


def read_set(file: SourceFile, opener: Opener, read_one: object) -> Checkpoint:  # noqa: ARG001 - as the table has it
    """Open an ONNX model: names, shapes and places of its initializers are read, no element is.

    Raises UnknownFormatError for a model without initializers, MalformedError, TruncatedError or LimitError.
    """
    with about(file.path):
        model = _Model(file)
        if not model.initializers and not model.others:
            raise UnknownFormatError("an ONNX model without initializers: it has no weights")
        container = _Files(file)
        beside = _open_beside(file, model.initializers, opener, container)
        entries = [_entry(initializer, model.reader, beside) for initializer in model.initializers]
    return Checkpoint(
        path=file.path,
        format=NAME,
        entries=[*entries, *model.others],
        container=container,
        version=f"ONNX, IR version {model.version}{model.producer and f', made by {model.producer}'}",
        metadata=model.metadata,
        top_level=list(dict.fromkeys(entry.name.partition(".")[0] for entry in entries)),
        is_set=bool(beside),
        notes=_notes(model, beside),
    )


def _notes(model: _Model, beside: Mapping[str, SourceFile]) -> list[str]:
    """Return what is listed only, and the files that are not there."""
    wanted = dict.fromkeys(made.external.get("location", "") for made in model.initializers if made.is_external)
    absent = [describe(name) for name in wanted if name not in beside]
    notes = [f"external data that is not in its folder: {listed(absent, _NAMED)}"] if absent else []
    if model.others:
        names = listed([describe(entry.name) for entry in model.others], _NAMED)
        notes.append(f"only listed, for their dtypes or as sparse ones: {names}")
    return notes


class _Model:
    """What a `ModelProto` says of its initializers."""

    def __init__(self, file: SourceFile) -> None:
        self.reader = Reader(file)
        self.version = 0
        self.producer = ""
        self.metadata: dict[str, str] = {}
        self.initializers: list[_Initializer] = []
        self.others: list[Entry] = []
        """Those that are only listed."""
        self._fields = 0
        self._names = 0
        for found in self._counted(0, file.size):
            if found.number == _IR_VERSION and found.wire == VARINT:
                self.version = found.value
            elif found.wire == BYTES:
                self._note(found)

    def _counted(self, begin: int, end: int) -> Iterator[Field]:
        for found in self.reader.fields(begin, end):
            self._fields += 1
            if self._fields > limits.ONNX_FIELDS:
                raise LimitError(f"it has more than {limits.ONNX_FIELDS:,} fields")
            yield found

    def _note(self, found: Field) -> None:
        if found.number in (_PRODUCER, _PRODUCER_VERSION):
            self.producer = f"{self.producer} {self._text(found)}".strip()
        elif found.number == _METADATA:
            key, value = self._pair(found)
            self.metadata[key] = value
        elif found.number == _GRAPH:
            for inner in self._counted(found.begin, found.end):
                if inner.number == _INITIALIZER and inner.wire == BYTES:
                    self._add(self._initializer(inner))
                elif inner.number == _SPARSE and inner.wire == BYTES:
                    self._add_sparse(inner)

    def _text(self, found: Field) -> str:
        self._names += found.size
        if found.size > _TEXT or self._names > limits.NAME_BYTES:
            raise LimitError(f"it has a name or a text of {found.size} bytes")
        return self.reader.text(found, _TEXT)

    def _pair(self, found: Field) -> tuple[str, str]:
        """Return a `StringStringEntryProto`."""
        parts = {each.number: self._text(each) for each in self._counted(found.begin, found.end) if each.wire == BYTES}
        return parts.get(1, ""), parts.get(2, "")

    def _initializer(self, found: Field) -> _Initializer:
        made = _Initializer()
        for each in self._counted(found.begin, found.end):
            if each.number == _DIMS:
                for size in self.reader.numbers(each):
                    made.dims.append(size)
                    if size >= 1 << 63 or len(made.dims) > limits.DIMENSIONS:
                        raise MalformedError(f"an initializer has no shape of up to {limits.DIMENSIONS} dimensions")
            elif each.number == _TYPE:
                made.type = each.value
            elif each.number == _NAME and each.wire == BYTES:
                made.name = self._text(each)
            elif each.number == _LOCATION:
                made.is_external = each.value == 1
            elif each.number == _EXTERNAL and each.wire == BYTES:
                key, value = self._pair(each)
                made.external[key] = value
            elif each.number in (_RAW, *_PLAIN, *_VARINTS):
                made.contents.setdefault(each.number, []).append(each)
        return made

    def _add(self, made: _Initializer) -> None:
        if len(self.initializers) + len(self.others) >= limits.ONNX_INITIALIZERS:
            raise LimitError(f"it has more than {limits.ONNX_INITIALIZERS:,} initializers")
        made.name = made.name or str(len(self.initializers) + len(self.others))
        if made.type in _DTYPES:
            self.initializers.append(made)
        else:
            what = _OTHERS.get(made.type, f"ONNX type {made.type}")
            self.others.append(Value(made.name, Opaque(f"<{what} {list(made.shape)}>")))

    def _add_sparse(self, found: Field) -> None:
        values = next((each for each in self._counted(found.begin, found.end) if each.number == 1), None)
        name = self._initializer(values).name if values is not None and values.wire == BYTES else ""
        if len(self.others) >= limits.ONNX_INITIALIZERS:
            raise LimitError(f"it has more than {limits.ONNX_INITIALIZERS:,} initializers")
        self.others.append(Value(name or f"sparse.{len(self.others)}", Opaque("<sparse initializer>")))


def _open_beside(
    file: SourceFile, initializers: Sequence[_Initializer], opener: Opener, container: _Files
) -> dict[str, SourceFile]:
    """Open the files of external data that are in the model's folder, by their names."""
    wanted = dict.fromkeys(made.external.get("location", "") for made in initializers if made.is_external)
    if len(wanted) > limits.SHARDS:
        raise LimitError(f"its initializers are in {len(wanted)} files")
    folder = folder_of(file.path)
    names = [name for name in wanted if is_plain_name(name) and exists(join(folder, name))]
    files = opener.open_all([join(folder, name) for name in names])
    container.files = (file, *files)
    return dict(zip(names, files, strict=True))


def _entry(made: _Initializer, reader: Reader, beside: dict[str, SourceFile]) -> Entry:
    """Return an initializer as a tensor; as a value that says why where its elements are not there."""
    dtype = _DTYPES[made.type]
    nbytes = dtype.nbytes_of(made.shape)
    if made.is_external:
        location = made.external.get("location", "")
        if location not in beside:
            why = "not there" if is_plain_name(location) else "not in its folder"
            return Value(made.name, Opaque(f"<{dtype} {list(made.shape)}, in {describe(location)}, which is {why}>"))
        begin = _decimal(made, "offset", 0)
        length = _decimal(made, "length", nbytes)
        if length != nbytes:
            raise MalformedError(f"initializer {describe(made.name)} of {dtype} {list(made.shape)} has {length} bytes")
        beside[location].check(begin, nbytes)
        source = PlainBytes(beside[location], begin)
        return _tensor(made, dtype, Storage(made.name, nbytes, "cpu", source))
    if len(made.contents) > 1 or any(len(fields) > 1 for fields in made.contents.values()):
        raise UnsupportedError(f"initializer {describe(made.name)} has its elements in several fields")
    if not made.contents:
        if nbytes:
            raise MalformedError(f"initializer {describe(made.name)} of {dtype} {list(made.shape)} has no elements")
        return _tensor(made, dtype, Storage(made.name, 0, "cpu", PlainBytes(reader.source, 0)))
    ((number, (found,)),) = made.contents.items()
    fits = number == _RAW or dtype.name in (*_PLAIN.get(number, ()), *_VARINTS.get(number, ()))
    if not fits or found.wire not in (BYTES, VARINT if number in _VARINTS else BYTES):
        raise MalformedError(f"initializer {describe(made.name)} has its elements in a field for other dtypes")
    if number in _VARINTS:
        return _tensor(made, dtype, Storage(made.name, nbytes, "cpu", _Numbers(made, reader, found, dtype)))
    if found.size != nbytes:
        raise MalformedError(f"initializer {describe(made.name)} of {dtype} {list(made.shape)} has {found.size} bytes")
    return _tensor(made, dtype, Storage(made.name, nbytes, "cpu", PlainBytes(reader.source, found.begin)))


def _tensor(made: _Initializer, dtype: DType, storage: Storage) -> Tensor:
    return Tensor(made.name, dtype, made.shape, contiguous_stride(made.shape), storage)


def _decimal(made: _Initializer, key: str, default: int) -> int:
    text = made.external.get(key, "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedError(f"initializer {describe(made.name)} has {describe(text)} for its {key}")
    return int(text) if text else default


class _Numbers:
    """The elements of an initializer that are numbers of one to ten bytes each, decoded where they are asked for."""

    __slots__ = ("_decoded", "_dtype", "_field", "_name", "_reader", "_shape")
    composed = False

    def __init__(self, made: _Initializer, reader: Reader, found: Field, dtype: DType) -> None:
        self._name, self._shape = made.name, made.shape
        self._reader, self._field, self._dtype = reader, found, dtype
        self._decoded = b""

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Bytes of the storage."""
        if not self._decoded:
            self._decoded = self._all()
        return memoryview(self._decoded)[begin : begin + nbytes]

    def extents(self, begin: int, nbytes: int) -> Sequence[Extent]:  # noqa: ARG002 - as the protocol has it
        """Raise UnsupportedError: they stand nowhere plainly."""
        raise UnsupportedError(
            f"initializer {describe(self._name)} is stored as numbers of different lengths, so it cannot be changed",
            hint="ckpt convert FILE OUT.pt makes a checkpoint that can be changed freely",
        )

    def _all(self) -> bytes:
        size, source = self._dtype.itemsize, self._reader.source
        nbytes = self._dtype.nbytes_of(self._shape)
        if max(nbytes, self._field.size) > limits.INFLATED_AT_ONCE:
            raise LimitError(f"initializer {describe(self._name)} would have to be decoded: {nbytes} bytes")
        current().inflate(nbytes, source.path)
        mask = (1 << 8 * size) - 1
        found = b"".join((value & mask).to_bytes(size, "little") for value in Reader(source).numbers(self._field))
        if len(found) != nbytes:
            raise TruncatedError(f"initializer {describe(self._name)} has {len(found)} bytes, {nbytes} are needed")
        return found
