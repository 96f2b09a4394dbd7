"""Sizes as people write them."""

from __future__ import annotations

import re

from ckpt_cli.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)")


def size_of(text: str) -> int:
    """The bytes that `5GB` or `512MiB` are, powers of ten but for those with an i, as huggingface_hub counts."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]):
        raise UsageError(f"{text!r} is no size", hint="5GB, 500MB or 2GiB, say")
    return int(float(match[1]) * unit)
