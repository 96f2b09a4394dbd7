"""One table of every dtype that a checkpoint can hold.

Names are torch's spelling without `torch.`. The two columns of spellings are what safetensors' header says and the
prefix of torch's storage class (`Float` of `FloatStorage`), which only the dtypes of torch's first generation have;
newer ones name themselves in `_rebuild_tensor_v3`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype: how it is spelled, how wide it is, how its bytes decode."""

    name: str
    """Torch's spelling, such as `bfloat16`."""
    bits: int
    """Bits of one element in a file."""
    category: str
    """`float`, `int`, `bool`, `complex`, `quantized` or `bits`."""
    safetensors: str | None = None
    """The spelling in a safetensors header."""
    storage: str | None = None
    """The prefix of torch's typed storage class."""
    numpy: str | None = None
    """The name in numpy or ml_dtypes of one element, None where neither decodes it."""

    @property
    def itemsize(self) -> int:
        """Bytes of one element; raises ValueError for elements that are not whole bytes."""
        if self.bits % 8:
            raise ValueError(f"{self.name} has {self.bits} bits an element")
        return self.bits // 8

    @property
    def is_plain_float(self) -> bool:
        """Whether each element is one floating number of whole bytes."""
        return self.category == "float" and self.bits % 8 == 0 and not self.name.endswith("_x2")

    def nbytes(self, numel: int) -> int:
        """Bytes that `numel` packed elements take, rounded up to whole bytes."""
        return (numel * self.bits + 7) // 8

    def __str__(self) -> str:
        return self.name


# fmt: off
_TABLE = (
    #     name                 bits category      safetensors   storage          numpy / ml_dtypes
    DType("float64",            64, "float",      "F64",        "Double",        "float64"),
    DType("float32",            32, "float",      "F32",        "Float",         "float32"),
    DType("float16",            16, "float",      "F16",        "Half",          "float16"),
    DType("bfloat16",           16, "float",      "BF16",       "BFloat16",      "bfloat16"),
    DType("float8_e5m2",         8, "float",      "F8_E5M2",    None,            "float8_e5m2"),
    DType("float8_e4m3fn",       8, "float",      "F8_E4M3",    None,            "float8_e4m3fn"),
    DType("float8_e5m2fnuz",     8, "float",      "F8_E5M2FNUZ", None,           "float8_e5m2fnuz"),
    DType("float8_e4m3fnuz",     8, "float",      "F8_E4M3FNUZ", None,           "float8_e4m3fnuz"),
    DType("float8_e8m0fnu",      8, "float",      "F8_E8M0",    None,            "float8_e8m0fnu"),
    DType("float4_e2m1fn_x2",    8, "float",      None,         None,            "float4_e2m1fn"),
    DType("float4_e2m1fn",       4, "float",      "F4",         None,            None),
    DType("float6_e2m3fn",       6, "float",      "F6_E2M3",    None,            None),
    DType("float6_e3m2fn",       6, "float",      "F6_E3M2",    None,            None),
    DType("int64",              64, "int",        "I64",        "Long",          "int64"),
    DType("int32",              32, "int",        "I32",        "Int",           "int32"),
    DType("int16",              16, "int",        "I16",        "Short",         "int16"),
    DType("int8",                8, "int",        "I8",         "Char",          "int8"),
    DType("uint64",             64, "int",        "U64",        None,            "uint64"),
    DType("uint32",             32, "int",        "U32",        None,            "uint32"),
    DType("uint16",             16, "int",        "U16",        None,            "uint16"),
    DType("uint8",               8, "int",        "U8",         "Byte",          "uint8"),
    DType("bool",                8, "bool",       "BOOL",       "Bool",          "bool"),
    DType("complex128",        128, "complex",    None,         "ComplexDouble", "complex128"),
    DType("complex64",          64, "complex",    "C64",        "ComplexFloat",  "complex64"),
    DType("complex32",          32, "complex",    None,         None,            "float16"),
    DType("qint8",               8, "quantized",  None,         "QInt8",         "int8"),
    DType("quint8",              8, "quantized",  None,         "QUInt8",        "uint8"),
    DType("qint32",             32, "quantized",  None,         "QInt32",        "int32"),
    DType("quint4x2",            4, "quantized",  None,         "QUInt4x2",      None),
    DType("quint2x4",            2, "quantized",  None,         "QUInt2x4",      None),
    DType("bits8",               8, "bits",       None,         None,            "uint8"),
    DType("bits16",             16, "bits",       None,         None,            "uint16"),
    DType("bits1x8",             8, "bits",       None,         None,            "uint8"),
    DType("bits2x4",             8, "bits",       None,         None,            "uint8"),
    DType("bits4x2",             8, "bits",       None,         None,            "uint8"),
    # torch's shell dtypes: one element a byte until a kernel says otherwise
    *(DType(f"{sign}int{width}", 8, "bits", numpy=f"{sign}int8") for sign in ("", "u") for width in range(1, 8)),
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
"""What numpy's codes without a byte order mean: `f4` is float32."""

UINT8 = BY_NAME["uint8"]
