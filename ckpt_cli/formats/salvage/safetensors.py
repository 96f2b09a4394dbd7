"""Files of safetensors that were cut in their data, or whose header promises more than there is."""

from __future__ import annotations

import json
from math import prod
from typing import Any, TypeGuard

from ckpt_cli import limits
from ckpt_cli.dtypes import BY_SAFETENSORS
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.files.source import SourceFile
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.formats.safetensors.header import as_torch_spells
from ckpt_cli.formats.safetensors.read import with_aliases
from ckpt_cli.formats.salvage.found import Lost, Salvaged, checkpoint_of
from ckpt_cli.model.checkpoint import Tensor, contiguous_stride

_COSTS = ((b"{", 500), (b"[", 100), (b",", 40), (b'"', 28))
"""Bytes of memory that what begins, goes on or ends with a character of a header takes when parsed."""


def salvage(file: SourceFile, problem: str, kind: str) -> Salvaged:
    """List the tensors of the header whose ranges lie in the file; raises FormatError where the header is not whole."""
    header, begin = _header(file)
    given = header.pop("__metadata__", None)
    metadata = given if isinstance(given, dict) else {}
    metadata = {key: text for key, text in metadata.items() if isinstance(text, str)}
    container = PlainFile(file)
    kept: list[Tensor] = []
    lost: list[Lost] = []
    for name, info in header.items():
        found = _tensor(container, name, info, begin, file.size - begin)
        if isinstance(found, Tensor):
            kept.append(found)
        else:
            lost.append(Lost(name, found))
    entries = with_aliases(kept, metadata)
    there = {entry.name for entry in entries}
    gone = {item.name for item in lost}
    lost += [
        Lost(name, f"it is the same tensor as {kept_as!r}, which is lost")
        for name, kept_as in metadata.items()
        if kept_as in gone and name not in there and name not in gone
    ]
    return Salvaged(checkpoint_of(file, kind, entries, metadata=metadata), problem, tuple(lost))


def _header(file: SourceFile) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the first byte after it."""
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    if file.size < 8 or 8 + length > file.size:
        raise TruncatedError("its header is not all there, so that no tensor has a name")
    if length > limits.SAFETENSORS_HEADER:
        raise LimitError(f"a header of {length} bytes")
    raw = file.read(8, length)
    cost = 2 * length + sum(raw.count(char) * nbytes for char, nbytes in _COSTS)
    if cost > limits.SAFETENSORS_PARSED:
        raise LimitError(f"its header of {length} bytes would take about {cost >> 20} MiB of memory")
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise MalformedError("its header is not a JSON object")
    return header, 8 + length


def _tensor(container: PlainFile, name: str, info: Any, begin: int, has: int) -> Tensor | str:
    """Return the tensor that a field of the header describes, or the reason why it cannot be had."""
    if not isinstance(info, dict):
        return "its header does not describe it"
    spelled, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    dtype = BY_SAFETENSORS.get(spelled) if isinstance(spelled, str) else None
    if dtype is None or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        return "its dtype, shape or data_offsets are not valid"
    first, end = offsets
    nbits = dtype.bits * prod(shape) if len(shape) <= limits.DIMENSIONS else -1
    if nbits < 0 or nbits % 8 or end - first != nbits // 8:
        return "its shape does not take the bytes that its data_offsets say"
    if end > has:
        return (
            f"its {end - first} bytes are not there"
            if first >= has
            else (f"of its {end - first} bytes the last {end - has} are not there")
        )
    in_torch, spelled_shape = as_torch_spells(dtype, tuple(shape))
    storage = container.storage(name, end - first, begin + first)
    return Tensor(name, in_torch, spelled_shape, contiguous_stride(spelled_shape), storage)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 64 for item in value)
