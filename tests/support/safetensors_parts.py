"""A state to write as safetensors, and the parts of such a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from run_edit import (
    State,
)
from safetensors import safe_open
from safetensors.torch import load_file


def state() -> State:
    """Tensors of several widths, in an order that is neither that of their names nor of their widths."""
    torch.default_generator.manual_seed(0)
    return {
        "module.b.weight": torch.randn(3, 4),
        "module.a.weight": torch.randn(5, dtype=torch.float64),
        "module.a.bias": torch.arange(3),
        "other.half": torch.randn(7).half(),
        "other.flag": torch.tensor([True, False, True]),
    }


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header as it stands in the file, and what follows it."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), raw[begin:]


def metadata(path: Path) -> dict[str, str]:
    """What the library says that the metadata is."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def assert_aligned(path: Path) -> None:
    """The data begins at a multiple of 64 bytes, and each tensor at one of its element."""
    header, data = parts(path)
    assert (path.stat().st_size - len(data)) % 64 == 0
    for name, tensor in load_file(path).items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
