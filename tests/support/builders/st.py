"""safetensors files: any header over any bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file(header: Mapping[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of a header, given as what JSON makes of it or as its bytes; `length` is what it is said to take."""
    raw = encoded(header)
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write(path: Path, header: Mapping[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write such a file."""
    path.write_bytes(file(header, data, length=length))
    return path


def encoded(header: Mapping[str, Any] | str | bytes) -> bytes:
    """The header's bytes, not padded."""
    if isinstance(header, bytes):
        return header
    return (header if isinstance(header, str) else json.dumps(header)).encode()


def info(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """What a header says of one tensor; the offsets count from the header's end."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def floats(*counts: int) -> tuple[dict[str, Any], bytes]:
    """A header of one-dimensional F32 tensors `t0`, `t1`… of so many elements each, and zeros for them."""
    header: dict[str, Any] = {}
    end = 0
    for place, count in enumerate(counts):
        header[f"t{place}"] = info("F32", [count], end, end + 4 * count)
        end += 4 * count
    return header, bytes(end)
