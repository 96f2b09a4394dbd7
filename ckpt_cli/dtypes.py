"""One table of every dtype that a checkpoint can hold.

Names are torch's spelling without `torch.`. The two columns of spellings are what safetensors' header says and the
prefix of torch's storage class (`Float` of `FloatStorage`), which only the dtypes of torch's first generation have;
newer ones name themselves in `_rebuild_tensor_v3`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ckpt_cli.errors import MalformedError, UnsupportedError
from ckpt_cli.facts import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype: how it is spelled, how many elements share how many bytes, how these decode."""

    name: str
    """Torch's spelling, such as `bfloat16`."""
    elements: int
    """Elements of one block, the fewest that take whole bytes: 1, or 2 where two share a byte."""
    block_nbytes: int
    """Bytes of one block."""
    category: str
    """`float`, `int`, `bool`, `complex`, `quantized`, `bits`, or `block` where those of a block share a scale."""
    safetensors: str | None = None
    """The spelling in a safetensors header."""
    storage: str | None = None
    """The prefix of torch's typed storage class."""
    numpy: str | None = None
    """The name in numpy or ml_dtypes of one element, None where neither decodes it."""

    @property
    def is_block(self) -> bool:
        """True if a block has more than its elements, such as their scale: no element has bytes of its own."""
        return self.category == "block"

    @property
    def bits(self) -> int:
        """Bits of one element; raises UnsupportedError where elements have no bits of their own."""
        if self.category == "block":
            raise UnsupportedError(f"dtype {self.name} has {self.described}: no element has bytes of its own")
        return 8 * self.block_nbytes // self.elements

    @property
    def itemsize(self) -> int:
        """Bytes of one element; raises UnsupportedError for elements that are not whole bytes."""
        if self.elements > 1:
            raise UnsupportedError(f"dtype {self.name} has {self.described}: an element is not whole bytes")
        return self.block_nbytes

    @property
    def described(self) -> str:
        """A block in words."""
        nbytes = f"{self.block_nbytes} byte{'s' if self.block_nbytes > 1 else ''}"
        return f"blocks of {self.elements} elements in {nbytes}"

    @property
    def is_plain_float(self) -> bool:
        """True if each element is one floating number of whole bytes."""
        return self.category == "float" and self.elements == 1 and not self.name.endswith("_x2")

    def nbytes(self, numel: int) -> int:
        """Bytes that `numel` contiguous elements take, rounded up to whole bytes, or to whole blocks."""
        if self.elements == 1:
            return numel * self.block_nbytes
        return self.byte_range(0, numel)[1]

    def byte_range(self, begin: int, end: int) -> tuple[int, int]:
        """Return the first byte of a storage that its elements `begin` to `end` touch, and the one after the last."""
        elements, nbytes = self.elements, self.block_nbytes
        if self.category == "block":
            return begin // elements * nbytes, -(-end // elements) * nbytes
        return begin * nbytes // elements, -(-end * nbytes // elements)

    def nbytes_of(self, shape: Sequence[int]) -> int:
        """Bytes of a contiguous tensor; raises MalformedError for rows, or packed elements, that are not whole blocks.

        Readers of formats with such dtypes ask this for the bytes that a tensor should have.
        """
        numel = prod(shape)
        whole = shape[-1] if self.is_block and shape else numel
        if whole % self.elements:
            what = f"rows of {whole}" if self.is_block else numel
            raise MalformedError(f"{what} elements of dtype {self.name} are not whole {self.described}")
        return numel // self.elements * self.block_nbytes

    def __str__(self) -> str:
        return self.name


# fmt: off
_TABLE = (
    #     name         elements in bytes category      safetensors   storage          numpy / ml_dtypes
    DType("float64",            1,  8, "float",      "F64",        "Double",        "float64"),
    DType("float32",            1,  4, "float",      "F32",        "Float",         "float32"),
    DType("float16",            1,  2, "float",      "F16",        "Half",          "float16"),
    DType("bfloat16",           1,  2, "float",      "BF16",       "BFloat16",      "bfloat16"),
    DType("float8_e5m2",        1,  1, "float",      "F8_E5M2",    None,            "float8_e5m2"),
    DType("float8_e4m3fn",      1,  1, "float",      "F8_E4M3",    None,            "float8_e4m3fn"),
    DType("float8_e5m2fnuz",    1,  1, "float",      "F8_E5M2FNUZ", None,           "float8_e5m2fnuz"),
    DType("float8_e4m3fnuz",    1,  1, "float",      "F8_E4M3FNUZ", None,           "float8_e4m3fnuz"),
    DType("float8_e8m0fnu",     1,  1, "float",      "F8_E8M0",    None,            "float8_e8m0fnu"),
    DType("float4_e2m1fn_x2",   1,  1, "float",      None,         None,            "float4_e2m1fn"),
    DType("float4_e2m1fn",      2,  1, "float",      "F4",         None,            None),
    DType("float6_e2m3fn",      4,  3, "float",      "F6_E2M3",    None,            None),
    DType("float6_e3m2fn",      4,  3, "float",      "F6_E3M2",    None,            None),
    DType("int64",              1,  8, "int",        "I64",        "Long",          "int64"),
    DType("int32",              1,  4, "int",        "I32",        "Int",           "int32"),
    DType("int16",              1,  2, "int",        "I16",        "Short",         "int16"),
    DType("int8",               1,  1, "int",        "I8",         "Char",          "int8"),
    DType("uint64",             1,  8, "int",        "U64",        None,            "uint64"),
    DType("uint32",             1,  4, "int",        "U32",        None,            "uint32"),
    DType("uint16",             1,  2, "int",        "U16",        None,            "uint16"),
    DType("uint8",              1,  1, "int",        "U8",         "Byte",          "uint8"),
    DType("bool",               1,  1, "bool",       "BOOL",       "Bool",          "bool"),
    DType("complex128",         1, 16, "complex",    None,         "ComplexDouble", "complex128"),
    DType("complex64",          1,  8, "complex",    "C64",        "ComplexFloat",  "complex64"),
    DType("complex32",          1,  4, "complex",    None,         None,            "float16"),
    DType("qint8",              1,  1, "quantized",  None,         "QInt8",         "int8"),
    DType("quint8",             1,  1, "quantized",  None,         "QUInt8",        "uint8"),
    DType("qint32",             1,  4, "quantized",  None,         "QInt32",        "int32"),
    DType("quint4x2",           2,  1, "quantized",  None,         "QUInt4x2",      None),
    DType("quint2x4",           4,  1, "quantized",  None,         "QUInt2x4",      None),
    DType("bits8",              1,  1, "bits",       None,         None,            "uint8"),
    DType("bits16",             1,  2, "bits",       None,         None,            "uint16"),
    DType("bits1x8",            1,  1, "bits",       None,         None,            "uint8"),
    DType("bits2x4",            1,  1, "bits",       None,         None,            "uint8"),
    DType("bits4x2",            1,  1, "bits",       None,         None,            "uint8"),
    # torch's shell dtypes: one element a byte until a kernel says otherwise
    *(DType(f"{sign}int{width}", 1, 1, "bits", numpy=f"{sign}int8") for sign in ("", "u") for width in range(1, 8)),
)
# fmt: on

BY_NAME: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS: dict[str, DType] = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}
BY_STORAGE: dict[str, DType] = {dtype.storage: dtype for dtype in _TABLE if dtype.storage}
BY_NUMPY: dict[str, DType] = {
    **{f"f{size}": BY_NAME[f"float{8 * size}"] for size in (2, 4, 8)},
    **{f"i{size}": BY_NAME[f"int{8 * size}"] for size in (1, 2, 4, 8)},
    **{f"u{size}": BY_NAME[f"uint{8 * size}"] for size in (1, 2, 4, 8)},
    **{f"c{size}": BY_NAME[f"complex{8 * size}"] for size in (8, 16)},
    "b1": BY_NAME["bool"],
}
"""The dtype of each of numpy's codes without a byte order: `f4` is float32."""

UINT8 = BY_NAME["uint8"]
