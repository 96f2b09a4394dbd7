"""The JSON that commands share: long lists made a piece at a time, numbers, values and tensors.

Each module of `render/` has a `to_json(result)`, which returns the result as data in the stable shape that docs/json.md
documents: keys may be added, none is renamed. NaN and infinities, which JSON lacks, are the strings `"NaN"`,
`"Infinity"` and `"-Infinity"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from ckpt_cli.model.checkpoint import Opaque, Tensor, Value
from ckpt_cli.render.text import value_text

if TYPE_CHECKING:
    Encode = Callable[[object], str]
    """Makes JSON text of data without a LongList in it."""
    Parts = Iterator["str | Parts"]
    """Text, and iterators over the text of what lies within."""

_ITEMS = 100
"""Items of a list that are turned into text at a time."""


class LongList:
    """A list of a result that is never wholly in memory: its items are made whenever it is iterated over.

    `json.dumps(to_json(result), default=list)` makes ordinary lists of all of them. The class is not a dataclass,
    because making one takes a millisecond of the start of every command.
    """

    __slots__ = ("lines", "pieces")

    def __init__(self, pieces: Callable[[], Iterable[Sequence[object]]], *, lines: bool = False) -> None:
        self.pieces = pieces
        """Yields the items, some at a time; an item that has a LongList in it is alone in its piece."""
        self.lines = lines
        """True if each piece is written on a line of its own."""

    def __iter__(self) -> Iterator[object]:
        return chain.from_iterable(self.pieces())


def rows(make: Callable[[], Iterable[object]]) -> LongList:
    """Return a list of which each item is written on a line of its own."""
    return LongList(lambda: ([item] for item in make()), lines=True)


def json_text(data: object) -> Iterator[str]:
    """Yield what `to_json` returned as JSON text, with a newline at the end.

    Nothing here recurses, because modules may be nested deeper than json.dumps follows.
    """
    import json

    encode = json.JSONEncoder(allow_nan=False).encode
    stack = [_dict_parts(data, encode) if isinstance(data, dict) and data else _parts(data, encode)]
    while stack:
        for part in stack[-1]:
            if isinstance(part, str):
                yield part
            else:
                stack.append(part)
                break
        else:
            stack.pop()
    yield "\n"


def _parts(value: object, encode: Encode) -> Parts:
    if isinstance(value, LongList):
        return _list_parts(value, encode)
    if isinstance(value, dict) and any(isinstance(item, LongList) for item in value.values()):
        return _dict_parts(value, encode)
    return iter([encode(value)])


def _dict_parts(facts: Mapping[str, object], encode: Encode) -> Parts:
    separator = "{"
    for key, value in facts.items():
        yield f"{separator}{encode(key)}: "
        yield _parts(value, encode)
        separator = ", "
    yield "}"


def _list_parts(items: LongList, encode: Encode) -> Parts:
    separator = "[\n" if items.lines else "["
    for piece in items.pieces():
        yield separator
        yield _parts(piece[0], encode) if len(piece) == 1 else encode(piece)[1:-1]
        separator = ",\n" if items.lines else ", "
    yield "[]" if separator[0] == "[" else "]"


def tensor_json(tensor: Tensor, tied: Mapping[str, list[str]]) -> dict[str, object]:
    """Return the facts of one tensor; those that it does not have are None."""
    return {
        "name": tensor.name,
        "type": "tensor",
        "kind": tensor.kind,
        "dtype": tensor.dtype.name,
        "shape": None if tensor.shape is None else list(tensor.shape),
        "numel": tensor.numel,
        "nbytes": tensor.nbytes,
        "stride": list(tensor.stride),
        "storage": None if tensor.storage is None else tensor.storage.key,
        "storage_offset": tensor.storage_offset,
        "requires_grad": tensor.requires_grad,
        "device": tensor.device,
        "tied_with": [name for name in tied.get(tensor.name, ()) if name != tensor.name],
        "layout": tensor.layout,
        "python_type": tensor.python_type,
        "parts": [tensor_json(part, {}) for part in tensor.parts],
        "details": _details(tensor),
    }


def _details(tensor: Tensor) -> dict[str, object]:
    """Return the facts that only some layouts have: quantization, stored elements, sharding."""
    details: dict[str, object] = {}
    if tensor.quantizer is not None:
        of_all = tensor.quantizer.axis is None
        details["scheme"] = tensor.quantizer.scheme
        details["axis"] = tensor.quantizer.axis
        details["scale"] = finite(tensor.quantizer.scale) if of_all else None
        details["zero_point"] = tensor.quantizer.zero_point if of_all else None
    if tensor.nnz is not None:
        details["nnz"] = tensor.nnz
        details["coalesced"] = tensor.coalesced
    if tensor.sharding is not None:
        details["mesh"] = tensor.sharding.mesh
        details["placements"] = tensor.sharding.placements
        details["offsets"] = [list(offset) for offset in tensor.sharding.offsets]
    return details


def entry_json(entry: Value) -> dict[str, object]:
    """Return a non-tensor entry; a list of more than `_ITEMS` items is made in pieces.

    As JSON, long texts in it take several times their memory.
    """
    value = entry.value
    if not isinstance(value, list | tuple) or len(value) <= _ITEMS:
        return {"name": entry.name, "type": "value", "value": value_json(value)}

    def pieces() -> Iterator[Sequence[object]]:
        for at in range(0, len(value), _ITEMS):
            yield [value_json(item) for item in value[at : at + _ITEMS]]

    return {"name": entry.name, "type": "value", "value": LongList(pieces)}


def value_json(value: object) -> object:
    """Return a non-tensor value: as JSON where JSON has it, else its short repr."""
    if isinstance(value, Opaque):
        return value.text
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, list | tuple):
        return [value_json(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4096:
        return value_text(value)
    return value


def finite(value: float) -> object:
    """Return a number, or the string that stands for NaN or an infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
