"""A throw-away format of one file: a line of JSON, then tensors of block-quantized elements or of float32."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open as opening
from ckpt_cli.formats import registry
from ckpt_cli.model.checkpoint import Checkpoint, PlainBytes, Storage, Tensor, contiguous_stride

Q4 = DType("q4_0", 32, 18, "block")
"""As GGUF has it: a float16 scale and 32 numbers of 4 bits."""

MAGIC = b"BLOCKS\n"


def write(path: Path, shapes: Mapping[str, Sequence[int]], *, more: int = 0) -> Path:
    """A file of tensors of zeros but for a count; those whose name has `bias` are float32."""
    header = json.dumps({name: list(shape) for name, shape in shapes.items()}).encode()
    nbytes = sum(_dtype(name).nbytes(prod(shape)) for name, shape in shapes.items()) + more
    path.write_bytes(MAGIC + header + b"\n" + bytes(number % 251 for number in range(nbytes)))
    return path


def _dtype(name: str) -> DType:
    return BY_NAME["float32"] if "bias" in name else Q4


def read(file: LocalFile) -> Checkpoint:
    """Open such a file."""
    head = file.read(0, min(file.size, 1 << 16)).removeprefix(MAGIC).partition(b"\n")[0]
    at = len(MAGIC) + len(head) + 1
    entries = []
    for name, shape in json.loads(head).items():
        dtype = _dtype(name)
        nbytes = dtype.nbytes_of(shape)
        storage = Storage(name, nbytes, "cpu", PlainBytes(file, at))
        entries.append(Tensor(name, dtype, tuple(shape), contiguous_stride(shape), storage))
        at += nbytes
    return Checkpoint(file.path, "blocks", entries, _Container(file))


class _Container(SimpleNamespace):
    def __init__(self, file: LocalFile) -> None:
        super().__init__(files=(file,), close=file.close)

    def seal(self, overlay: object) -> None:
        """No checksums."""


@pytest.fixture
def block_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ckpt read the format during one test."""
    module = ModuleType("block_format_reader")
    module.read = read  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = registry.Format("blocks", lambda head: head.startswith(MAGIC), module.__name__)
    for table in (registry, opening):
        monkeypatch.setattr(table, "FORMATS", (known, *registry.FORMATS), raising=False)
