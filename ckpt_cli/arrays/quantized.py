"""Quantized tensors: integers, and the numbers that they stand for; and the values of tensors, quantized or not.

An integer q of channel c stands for `(q - zero_point[c]) * scale[c]`, computed as torch does: in float32 where there is
one scale, in float64 and then rounded to float32 where each channel has its own (measured;
aten/src/ATen/native/quantized/AffineQuantizerBase.cpp, fbgemm's QuantUtils).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_cli.arrays.codec import Codec, require_honest, stored_of
from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.budget import require_bounded
from ckpt_cli.dtypes import BY_NAME
from ckpt_cli.errors import MalformedError, UnsupportedError, ValueRefusedError
from ckpt_cli.model.checkpoint import Checkpoint, Quantizer, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

_INTEGERS = {"qint8": "int8", "quint8": "uint8", "qint32": "int32", "quint4x2": "uint8", "quint2x4": "uint8"}
"""The dtype of what torch's `int_repr()` gives, packed elements unpacked."""


def integers(tensor: Tensor) -> Tensor:
    """Return the stored integers of a quantized tensor as a tensor; raise UnsupportedError for packed ones."""
    if tensor.dtype.bits < 8:
        raise UnsupportedError(
            f"tensor {tensor.name!r} packs {8 // tensor.dtype.bits} integers into a byte: "
            "they can be shown as what they stand for only",
        )
    dtype = BY_NAME[_INTEGERS[tensor.dtype.name]]
    return replace(tensor, dtype=dtype, layout="strided", parts=(), quantizer=None)


class QuantizedCodec(Codec):
    """Decodes and encodes the elements of a quantized tensor, whose channels may have their own scales."""

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        import numpy as np

        if tensor.quantizer is None or tensor.storage is None:
            raise MalformedError(f"tensor {tensor.name!r} does not say how it is quantized")
        self.quantizer = tensor.quantizer
        self.dtype = tensor.dtype
        self.name = tensor.name
        self.paired = False
        self.uniform = self.quantizer.axis is None
        self._kind = np.dtype(_INTEGERS[tensor.dtype.name])
        self.stored = self._kind.newbyteorder(">" if tensor.big_endian else "<")
        self._bits = tensor.dtype.bits
        self._size = max(self._bits // 8, 1)
        self._scales, self._zeros = parameters(checkpoint, tensor)
        self._channels = _channels(tensor)

    def at(self, index: Index) -> QuantizedCodec:
        """Return the codec of the part that an index selects."""
        if self.uniform:
            return self
        part = object.__new__(QuantizedCodec)
        part.__dict__.update(self.__dict__)
        part._channels = self._channels.at(index)
        return part

    def decode(self, stored: Array) -> Array:
        """Return the numbers that integers stand for, in float64 where channels have such scales, as torch does."""
        import numpy as np

        scales, zeros = self._of_channels()
        with np.errstate(all="ignore"):
            if self.quantizer.scheme.endswith("float_qparams"):
                return np.asarray((stored.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32))
            moved = stored.astype(np.int64) - zeros
            if self.quantizer.axis is not None:
                return np.asarray((moved * scales.astype(np.float64)).astype(np.float32))
            return np.asarray(moved.astype(np.float32) * scales.astype(np.float32))

    def encode(self, values: Array, *, cast: bool = False) -> Array:
        """Return the integers nearest to `value / scale + zero_point`, rounded half to even as torch does.

        Raises ValueRefusedError for what lies beyond the integers' range, which `cast` clips instead.
        """
        import numpy as np

        if values.dtype.kind == "c":
            raise ValueRefusedError(f"{self.dtype} cannot hold a complex number (tensor {self.name!r})")
        scales, zeros = self._of_channels()
        wanted = values.astype(np.float64).astype(np.float32)
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / scales.astype(np.float32)
            if self.uniform and self._bits == 8:  # FBGEMM multiplies and adds with one rounding, the others with two
                moved = (wanted.astype(np.float64) * inverse + zeros.astype(np.float64)).astype(np.float32)
            else:
                moved = wanted * inverse + zeros.astype(np.float32)
            found = np.rint(moved).astype(np.float64)
        least, most = self._range()
        bad = ~((found >= least) & (found <= most))  # NaN is bad too
        if bool((np.isnan(found) if cast else bad).any()):
            first = np.broadcast_to(wanted, bad.shape)[bad].reshape(-1)[0]
            raise ValueRefusedError(
                f"{self.dtype} with its scale cannot hold {float(first)!r} (tensor {self.name!r})",
                hint=None if np.isnan(first) else "--cast takes the nearest value that it can hold",
            )
        return np.asarray(np.clip(found, least, most).astype(self.stored))

    def arithmetic(self) -> np.dtype[Any]:
        """Arithmetic is that of float32."""
        import numpy as np

        return np.dtype(np.float32)

    def _range(self) -> tuple[int, int]:
        import numpy as np

        if self._bits < 8:
            return 0, (1 << self._bits) - 1
        limits = np.iinfo(self._kind)
        return int(limits.min), int(limits.max)

    def _of_channels(self) -> tuple[Array, Array]:
        """Return the scale and zero point of each element, in a shape that broadcasts to the region's."""
        import numpy as np

        if self.uniform:
            return self._scales, self._zeros
        numbers = np.arange(len(self._scales))
        steps = self._channels.stride
        shape = tuple(size if step else 1 for size, step in zip(self._channels.shape, steps, strict=True))
        strides = [8 * step for step in steps]
        begin = 8 * self._channels.offset if 0 not in shape else 0
        chosen = np.ndarray(shape, np.int64, numbers, begin, strides)
        return np.asarray(self._scales[chosen]), np.asarray(self._zeros[chosen])


def parameters(checkpoint: Checkpoint, tensor: Tensor) -> tuple[Array, Array]:
    """Return the scale and the zero point of a quantized tensor, or of each of its channels."""
    import numpy as np

    quantizer: Quantizer = tensor.quantizer or Quantizer("per_tensor_affine")
    if quantizer.axis is None:
        return np.asarray(quantizer.scale), np.asarray(quantizer.zero_point)
    scales, zeros = tensor.part("scales"), tensor.part("zero_points")
    if scales is None or zeros is None:
        return np.asarray(quantizer.scales), np.asarray(quantizer.zero_points)
    for part in (scales, zeros):
        require_honest(part)
    return values_of(checkpoint, scales).reshape(-1), values_of(checkpoint, zeros).reshape(-1)


def _channels(tensor: Tensor) -> Region:
    """Return the channel number of each element as a region of 0, 1, 2…"""
    shape = tensor.shape or ()
    axis = tensor.quantizer.axis if tensor.quantizer else None
    return Region(shape, tuple(int(dim == axis) for dim in range(len(shape))), 0)


# --- quantized and plain ----------------------------------------------------------------------------------------------


def codec_of(checkpoint: Checkpoint, tensor: Tensor) -> Codec:
    """Return the codec of a tensor's elements, quantized or plain; raises UnsupportedError for other layouts."""
    if tensor.layout != "quantized":
        return Codec(tensor)
    return QuantizedCodec(checkpoint, tensor)


def values_of(checkpoint: Checkpoint, tensor: Tensor, index: Index = ()) -> Array:
    """The decoded values of a tensor, or of what an index selects of it, reading no more than their bytes.

    Raises LimitError for a view that repeats few elements without end and whose values would have to be copied.
    """
    codec, region = codec_of(checkpoint, tensor).at(index), Region.of(tensor).at(index)
    if codec.copies:
        require_bounded(tensor, region)
    return codec.decode(stored_of(tensor, codec, region))


def array_of(checkpoint: Checkpoint, tensor: Tensor, index: Index = ()) -> Array:
    """Return what `values_of` does, but bfloat16 as that of ml_dtypes, over the bytes of the file."""
    if tensor.dtype.name != "bfloat16" or tensor.layout == "quantized":
        return values_of(checkpoint, tensor, index)
    import ml_dtypes
    import numpy as np

    stored = values_of(checkpoint, replace(tensor, dtype=BY_NAME["uint16"]), index)
    return stored.astype(np.uint16, copy=False).view(ml_dtypes.bfloat16)
