"""Decode stored bytes to values and encode values, for every dtype.

A bfloat16 or float8 decodes to float32 (exactly), a complex32 to complex64, a byte of float4_e2m1fn_x2 to the pair of
values in it (the first in the low four bits), so that a pair adds a dimension of 2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ckpt_cli import limits
from ckpt_cli.arrays.indexing import Index, Region
from ckpt_cli.dtypes import UINT8, DType
from ckpt_cli.errors import LimitError, UnsupportedError, ValueRefusedError
from ckpt_cli.model.checkpoint import Storage, Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

_NATIVE = frozenset(
    ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
     "complex128", "complex64"]
)  # fmt: skip
"""Dtypes that numpy has itself."""


def require_plain(tensor: Tensor) -> None:
    """Raise UnsupportedError for a tensor whose values are not simply elements of one storage."""
    if tensor.layout == "strided" and tensor.storage is not None and tensor.dtype.numpy is not None:
        return
    made_of = f", made of {', '.join(part.name for part in tensor.parts)}" if tensor.parts else ""
    hint = f"name a part: {main_part(tensor)}" if tensor.parts and tensor.storage is None else None
    if tensor.layout in ("meta", "uninitialized"):
        what = f"is {tensor.layout}: it has no values"
    elif tensor.layout != "strided":
        what = f"is {tensor.layout}{made_of}: its values cannot be read or set one by one"
    elif tensor.dtype.is_block:
        what = f"has dtype {tensor.dtype}, {tensor.dtype.described}: its values cannot be read or set"
    else:
        what = f"has dtype {tensor.dtype}, whose packing its format does not define: its values cannot be read or set"
    raise UnsupportedError(f"tensor {tensor.name!r} {what}", hint=hint)


def main_part(tensor: Tensor) -> str:
    """Return the name of the part that has most of a tensor's values: of a sparse one these, else the largest one."""
    names = [tensor.name]
    while tensor.parts and tensor.storage is None:
        tensor = tensor.part("values") or max(tensor.parts, key=lambda part: part.nbytes)
        names.append(tensor.name)
    return ".".join(names)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor as its bytes, where its elements cannot be read one by one; any other one as it is.

    Raises MalformedError where the last dimension is not whole blocks, UnsupportedError where the view is not
    contiguous.
    """
    dtype = tensor.dtype
    if dtype.numpy is not None or tensor.storage is None or tensor.shape is None:
        return tensor
    begin, end = dtype.byte_range(tensor.storage_offset, tensor.storage_offset + tensor.numel)
    if dtype.is_block:
        dtype.nbytes_of(tensor.shape)
    if not tensor.is_contiguous or dtype.byte_range(0, tensor.storage_offset)[1] != begin:
        require_plain(tensor)
        raise UnsupportedError(f"tensor {tensor.name!r} has packed elements of dtype {dtype} and is not contiguous")
    return replace(
        tensor, dtype=UINT8, shape=(end - begin,), stride=(1,), storage_offset=begin, layout="strided", quantizer=None,
        parts=(), big_endian=False,
    )  # fmt: skip


def require_honest(part: Tensor) -> None:
    """Raise LimitError for a part that claims far more elements than it has bytes, before all are gone through."""
    begin, end = part.span
    if part.numel > max(end - begin, limits.REPEATED_PART):
        raise LimitError(f"its part {part.name!r} repeats few bytes as {part.numel:,} elements")


class Codec:
    """Decodes and encodes the elements of one tensor."""

    uniform = True
    """True if an element means the same wherever in the tensor it stands."""

    copies = True
    """True if decoding makes an array of its own rather than a view of what is stored."""

    def __init__(self, tensor: Tensor) -> None:
        import numpy as np

        require_plain(tensor)
        self.dtype = tensor.dtype
        self.name = tensor.name
        self._conj = tensor.conj
        self._neg = tensor.neg
        self._order: Literal[">", "<"] = ">" if tensor.big_endian else "<"
        self.paired = self.dtype.name == "float4_e2m1fn_x2"
        """True if each element decodes to two values."""
        if self.dtype.name in _NATIVE:
            self.stored = np.dtype(self.dtype.name).newbyteorder(self._order)
        elif self.dtype.name == "complex32":
            self.stored = np.dtype((np.void, 4))
        else:
            self.stored = np.dtype(f"{self._order}u{self.dtype.itemsize}")
        """The numpy dtype of one stored element."""
        lazy = self._conj or self._neg or self.dtype.name == "bool"
        self.copies = lazy or self.dtype.name not in _NATIVE or not self.stored.isnative
        self._size = self.dtype.itemsize
        """Bytes of one stored element once it is in an array."""

    def at(self, _index: Index) -> Codec:
        """Return the codec of the part that an index selects: of a tensor whose elements are all alike, the same."""
        return self

    def array(self, data: memoryview | bytearray, region: Region, first: int) -> Array:
        """Return the region's stored elements over `data`, which begins at element `first` of the storage."""
        import numpy as np

        size = self._size
        moves = [
            0 if not region.numel or length == 1 else step
            for length, step in zip(region.shape, region.stride, strict=True)
        ]
        begin = (region.offset - first) * size if region.numel else 0
        try:
            elements: Array = np.ndarray(region.shape, self.stored, data, begin, [step * size for step in moves])
        except (ValueError, OverflowError):
            raise UnsupportedError(f"tensor {self.name!r} has a shape that numpy cannot hold") from None
        return elements

    def decode(self, stored: Array) -> Array:
        """Return the values that stored elements mean."""
        import numpy as np

        name = self.dtype.name
        if name in _NATIVE:
            native: Array = stored.astype(self._native(), copy=False)
            values = stored.view("u1") != 0 if name == "bool" else native
        elif name == "complex32":
            halves = np.ascontiguousarray(stored).reshape(-1).view(f"{self._order}f2").astype(np.float32)
            values = halves.view(np.complex64).reshape(stored.shape)
        elif self.paired:
            nibbles = np.stack((stored & 15, stored >> 4), axis=-1).astype(np.uint8)
            values = nibbles.view(self._small()).astype(np.float32)
        else:
            codes = stored.astype(f"u{self.dtype.itemsize}")
            is_float = self.dtype.category == "float"
            values = codes.view(self._small()).astype(np.float32) if is_float else codes.view(self.dtype.numpy)
        return self._unflagged(values)

    def _unflagged(self, values: Array) -> Array:
        """Apply the lazy conjugation and negation of a view, each its own inverse."""
        import numpy as np

        values = np.asarray(values)
        if self._conj:
            values = np.asarray(np.conj(values))
        return np.asarray(-values) if self._neg else values

    def encode(self, values: Array, *, cast: bool = False) -> Array:
        """Values as stored elements.

        Raises ValueRefusedError for a value that the dtype cannot hold: one that would become another integer,
        infinite, zero or NaN. With `cast` such values convert as a C cast does.
        """
        import numpy as np

        values = self._unflagged(values)
        name = self.dtype.name
        stored: Array
        with np.errstate(all="ignore"):
            if name == "complex32":
                halves = np.ascontiguousarray(values, np.complex64)
                narrow = halves.reshape(-1).view(np.float32).astype(np.float16)
                target = narrow.astype(np.float32).view(np.complex64).reshape(values.shape)
                stored = narrow.astype(f"{self._order}f2").view(self.stored).reshape(values.shape)
            elif name in _NATIVE:
                target = _to_native(values, self._native(), cast=cast)
                stored = target.astype(self.stored, copy=False)
            elif self.paired:
                small = self._to_small(values, cast=cast)
                target = small.astype(np.float32)
                codes = small.view(np.uint8)
                stored = codes[..., 0] | (codes[..., 1] << 4)
            elif self.dtype.category != "float":
                target = _to_native(values, np.dtype(self.dtype.numpy), cast=cast)
                stored = target.view(f"u{self.dtype.itemsize}").astype(self.stored)
            else:
                small = self._to_small(values, cast=cast)
                target = small.astype(np.float32)
                stored = small.view(f"u{self.dtype.itemsize}").astype(self.stored)
            if not cast:
                self._require_fit(values, target)
        return stored

    def arithmetic(self) -> np.dtype[Any]:
        """Return the dtype in which torch computes on these elements: narrow floats in float32, integers exactly."""
        import numpy as np

        if self.dtype.category == "float":
            return np.dtype("float64" if self.dtype.name == "float64" else "float32")
        if self.dtype.category == "complex":
            return np.dtype("complex128" if self.dtype.name == "complex128" else "complex64")
        return np.dtype(object)

    def _native(self) -> np.dtype[Any]:
        import numpy as np

        return np.dtype(self.dtype.name)

    def _small(self) -> np.dtype[Any]:
        """Return the ml_dtypes type of one value."""
        import ml_dtypes
        import numpy as np

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.dtype.numpy or ""))
        return small

    def _to_small(self, values: Array, *, cast: bool) -> Array:
        """Values in the ml_dtypes type, rounded to float32 first as torch does."""
        import numpy as np

        wide = _real(values, self.dtype, cast=cast).astype(np.float32)
        if cast and self.dtype.name == "float8_e4m3fn":
            wide = np.clip(wide, -448, 448)  # where ml_dtypes gives NaN, torch saturates
        return wide.astype(self._small())

    def _require_fit(self, values: Array, target: Array) -> None:
        """Compare what was asked for with what would be stored; rounding is the only difference allowed."""
        import numpy as np

        if self.dtype.category == "complex":
            wanted = values.astype(np.complex128)
            bad = _misfits(wanted.real, target.real) | _misfits(wanted.imag, target.imag)
        elif self.dtype.category == "float":
            real = values.real if values.dtype.kind == "c" else values
            bad = _misfits(real.astype(np.float64), target)
        else:
            bad = np.asarray(values != target)
        if bad.any():
            first = values[np.unravel_index(int(np.argmax(bad)), bad.shape)] if bad.shape else values[()]
            raise ValueRefusedError(
                f"{self.dtype} cannot hold {_spell(first)} (tensor {self.name!r})",
                hint="--cast converts values to the tensor's dtype as torch would",
            )


def stored_of(tensor: Tensor, codec: Codec, region: Region) -> Array:
    """Return the stored elements of a region, over a view of the file, or gathered where they are in several places."""
    if tensor.storage is None:
        raise UnsupportedError(f"tensor {tensor.name!r} has no bytes")
    low, high = region.span()
    bits = tensor.dtype.bits
    begin, end = tensor.dtype.byte_range(low, high)
    if tensor.storage.composed and end - begin > _GATHERED_AT_ONCE:
        return _gathered(tensor.storage, codec, region)
    data = tensor.storage.view(begin, end - begin)
    if bits < 8:
        data = _unpacked(data, bits, low * bits - 8 * begin, high - low)
    return codec.array(data, region, low)


def _unpacked(data: memoryview, bits: int, first_bit: int, count: int) -> memoryview:
    """Elements of less than a byte, the first in the lowest bits, each in a byte: `count` of them from a bit on."""
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (np.frombuffer(data, np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    begin = first_bit // bits
    return memoryview(spread.reshape(-1)[begin : begin + count].tobytes())


_GATHERED_AT_ONCE = 1 << 20
"""Bytes up to which a range is gathered in one piece, whatever part of it a region touches."""


def _gathered(storage: Storage, codec: Codec, region: Region) -> Array:
    """A copy of the region's stored elements, made from pieces without large gaps."""
    import numpy as np

    found: Array = np.empty(region.shape, codec.stored)
    size = codec.dtype.itemsize
    for part in region.pieces(size, 8 * _GATHERED_AT_ONCE):
        piece = region.at(part)
        low, high = piece.span()
        data = storage.view(low * size, (high - low) * size)
        found[part] = codec.array(data, piece, low)
    return found


def little_endian(tensor: Tensor, data: bytes) -> bytes:
    """Stored elements of a tensor, one after the other, as they would be stored little-endian and without flags."""
    import numpy as np

    is_complex = tensor.dtype.category == "complex"
    width = tensor.dtype.itemsize // (2 if is_complex else 1)
    if tensor.conj or tensor.neg:
        if tensor.dtype.name not in _SIGNED:
            flat = replace(tensor, conj=False, neg=False, big_endian=False)
            with np.errstate(all="ignore"):
                values = Codec(tensor).decode(np.frombuffer(data, Codec(tensor).stored))
                return bytes(Codec(flat).encode(values, cast=True).tobytes())
        bits = np.frombuffer(data, f"{'>' if tensor.big_endian else '<'}u{width}").astype(f"<u{width}")
        sign = bits.dtype.type(1 << (8 * width - 1))  # of NaN too, whose other bits a decoded one might lose
        parts = bits.reshape(-1, 2 if is_complex else 1)
        if tensor.neg:
            parts[:, 0] ^= sign
        if is_complex and tensor.neg != tensor.conj:
            parts[:, 1] ^= sign
        return bytes(parts.tobytes())
    if not tensor.big_endian or tensor.dtype.bits <= 8:
        return data
    return bytes(np.frombuffer(data, f"u{width}").byteswap().tobytes())


_SIGNED = frozenset(["float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"])
"""Dtypes whose numbers, or the parts of them, have a sign of their own in the highest bit."""


def value_shape(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of decoded values: a pair more for packed float4."""
    return (*shape, 2) if dtype.name == "float4_e2m1fn_x2" else shape


def _to_native(values: Array, dtype: np.dtype[Any], *, cast: bool) -> Array:
    """Convert to a numpy dtype without a surprise on the way: objects are Python integers of any size."""
    import numpy as np

    if dtype.kind != "c":
        values = _real(values, dtype, cast=cast)
    if dtype.kind == "b":
        return np.asarray(values != 0)
    if values.dtype.kind == "O" and dtype.kind in "iu":
        bits = 8 * dtype.itemsize
        wrapped = [_wrap(int(value), bits, signed=dtype.kind == "i") for value in values.reshape(-1)]
        return np.array(wrapped, dtype).reshape(values.shape)
    if dtype.kind in "iu" and values.dtype.kind == "f" and not bool(np.isfinite(values).all()):
        raise ValueRefusedError(f"{dtype} cannot hold NaN or infinity, not even with a cast")
    if dtype == np.float16 and values.dtype.kind == "f" and values.dtype.itemsize != dtype.itemsize:
        values = values.astype(np.float32)  # torch's own way to float16, which rounds twice
    return values.astype(dtype)


def _wrap(value: int, bits: int, *, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def _misfits(wanted: Array, target: Array) -> Array:
    """Return which numbers became something else than a rounded number: infinity, zero, NaN, or a number from those."""
    import numpy as np

    return np.asarray(
        (np.isfinite(wanted) != np.isfinite(target))
        | (np.isnan(wanted) != np.isnan(target))
        | ((wanted != 0) & (target == 0))
        | (np.isinf(wanted) & np.isinf(target) & (wanted != target))
    )


def _real(values: Array, dtype: object, *, cast: bool) -> Array:
    """Return the real parts; refused where that would lose imaginary ones, but for a cast."""
    if values.dtype.kind != "c":
        return values
    if not cast and bool((values.imag != 0).any()):
        raise ValueRefusedError(f"{dtype} cannot hold a complex number")
    return values.real


def _spell(value: Any) -> str:
    return repr(value.item() if hasattr(value, "item") else value)
