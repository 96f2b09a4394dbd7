"""JSON that is a record of a zip file, within limits of memory and depth."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

from ckpt_cli import limits
from ckpt_cli.dtypes import DType
from ckpt_cli.errors import LimitError, MalformedError
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.model.checkpoint import Storage, Tensor
from ckpt_cli.pickles.describe import describe

_COSTS = ((b"{", 300), (b"[", 64), (b",", 40), (b'"', 28))
"""Bytes of memory that what begins, goes on or ends with a character takes when parsed."""

_COUNT_END = 1 << 63
"""What sizes, strides and offsets must stay below: torch has them in 64 bits with a sign."""


class JsonRecords:
    """The JSON records of one zip file, which share one limit of memory."""

    def __init__(self, records: ZipRecords) -> None:
        self._records = records
        self._path = records.file.path
        self._left = limits.ZIP_JSON_PARSED
        """Bytes of memory that may still be taken."""

    def read(self, name: str) -> dict[str, Any]:
        """The object that a record is; raises MalformedError for one that is none, LimitError for far too much."""
        raw = self.raw(name)
        cost = (2 if raw.isascii() else 8) * len(raw) + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
        self._left -= cost
        if self._left < 0:
            raise LimitError(
                f"record {describe(name)} and others would take about {cost >> 20} MiB of memory", path=self._path
            )
        try:
            found = json.loads(raw.decode())
        except RecursionError:
            raise MalformedError(f"record {describe(name)} nests too deeply", path=self._path) from None
        except ValueError as error:  # bad JSON, bad UTF-8, an integer of thousands of digits
            raise MalformedError(f"record {describe(name)} is no JSON: {error}", path=self._path) from None
        if not isinstance(found, dict):
            raise MalformedError(f"record {describe(name)} is no JSON object", path=self._path)
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


def count(value: object, tensor: str, what: str) -> int:
    """A number from 0 that 64 bits hold; raises MalformedError."""
    if type(value) is not int or not 0 <= value < _COUNT_END:
        raise MalformedError(f"tensor {describe(tensor)}: its {what} is no number that a tensor may have")
    return value


def counts(value: object, tensor: str, what: str) -> tuple[int, ...]:
    """A list of such numbers."""
    if not isinstance(value, list) or len(value) > limits.DIMENSIONS:
        raise MalformedError(f"tensor {describe(tensor)}: its {what} is no list of up to {limits.DIMENSIONS} numbers")
    return tuple(count(item, tensor, what) for item in value)


def strided(
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
