"""The bytes of files of numpy: what it writes of an array, and any header."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

DTYPES = ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "<i8", ">i8", "|i1", "<i2", ">i4", "|u1", "<u2", ">u4", "<u8",
          "|b1", "<c8", ">c8", "<c16"]  # fmt: skip


def npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    """What numpy writes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version)
    return buffer.getvalue()


def headed(header: bytes, content: bytes = b"", version: int = 1) -> bytes:
    """An array file with that header."""
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes((version, 0)) + size + header + content
