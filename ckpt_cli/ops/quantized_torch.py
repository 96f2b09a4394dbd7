"""Tensors that torch quantizes itself, as recipes of plain floats: those of torch's own `dequantize()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ckpt_cli.arrays.indexing import Index
from ckpt_cli.dtypes import BY_NAME, DType
from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.quantized_layout import LONGEST_ROW, PIECE, Source

if TYPE_CHECKING:
    from ckpt_cli.arrays.cast import Losses
    from ckpt_cli.arrays.quantized import QuantizedCodec


class Decoding:
    """Makes floats of the integers of a part of a quantized tensor."""

    def __init__(self, codec: QuantizedCodec, shape: tuple[int, ...], target: DType) -> None:
        self._codec = codec
        self._shape = shape
        self._target = target

    def run(self, parts: Iterable[memoryview]) -> tuple[memoryview, Losses]:
        """Return the floats as bytes, and the finite values that the dtype cannot hold."""
        import numpy as np

        from ckpt_cli.arrays.cast import Losses
        from ckpt_cli.arrays.dequantize import rounded

        losses = Losses()
        stored = np.frombuffer(next(iter(parts)), self._codec.stored.newbyteorder("<")).reshape(self._shape)
        made = rounded(np.asarray(self._codec.decode(stored)), self._target, losses, is_small=False)
        return np.ascontiguousarray(made).view(np.uint8).reshape(-1).data, losses


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized tensor as it will be; a recipe of `parallel/pieces.py`, like `Layout`."""

    scheme: str
    weight: Tensor
    integers: Tensor
    codec: QuantizedCodec
    native: DType = BY_NAME["float32"]
    """The dtype that torch's `dequantize()` gives."""
    helpers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name, which stays."""
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, which stays."""
        return tuple(self.weight.shape or ())

    @property
    def stored(self) -> Sequence[Source]:
        """What is read for it."""
        return (Source(self.integers),)

    @property
    def numel(self) -> int:
        """Elements."""
        return self.weight.numel

    @property
    def piece(self) -> int:
        """Elements of a piece: some rows of the first dimension."""
        return self._row * max(PIECE // self._row, 1)

    @property
    def _row(self) -> int:
        return max(prod(self.shape[1:]), 1)

    def of(self, target: DType) -> QuantizedTensor:
        """Return the recipe of another dtype."""
        return replace(self, native=target)

    def _index(self, begin: int, end: int) -> Index:
        return (slice(begin // self._row, end // self._row),) if self.shape else ()

    def sources(self, begin: int, end: int) -> list[tuple[Tensor, Index]]:
        """Return the integers of a range of elements."""
        return [(self.integers, self._index(begin, end))]

    def making(self, begin: int, end: int) -> Decoding:
        """Return what makes a range of elements."""
        index = self._index(begin, end)
        shape = ((end - begin) // self._row, *self.shape[1:]) if self.shape else ()
        return Decoding(self.codec.at(index), shape, self.native)


def quantized_tensors(checkpoint: Checkpoint) -> list[QuantizedTensor]:
    """Return the recipes of all tensors that torch quantizes itself.

    Raises RefusedError for those of modules, which are no plain entries, and for rows that are too long.
    """
    from ckpt_cli.arrays.quantized import QuantizedCodec, integers

    found = []
    for tensor in checkpoint.tensors:
        if tensor.layout != "quantized":
            continue
        if "._packed_params" in tensor.name:
            raise RefusedError(f"{tensor.name!r} is the packed weight of a quantized module, which takes no plain one")
        if prod((tensor.shape or ())[1:]) > LONGEST_ROW:
            raise RefusedError(f"tensor {tensor.name!r} has rows of more than {LONGEST_ROW:,} elements")
        scheme = f"torch's {tensor.quantizer.scheme}" if tensor.quantizer else "torch's"
        found.append(QuantizedTensor(scheme, tensor, integers(tensor), QuantizedCodec(checkpoint, tensor)))
    return found
