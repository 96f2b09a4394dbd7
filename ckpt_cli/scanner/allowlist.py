"""Names that an ordinary checkpoint imports and that do no harm when they are imported and called.

`ALLOWED` is what `torch.load(weights_only=True)` accepts by default (torch 2.13,
torch/_weights_only_unpickler.py `_get_allowed_globals`); a test holds it against the torch at hand. `HARMLESS` is our
own: classes that only hold data, and the functions that picklers rebuild them with. Names are given one by one and
never as whole modules, as a module hands out the modules that it imports: `collections._sys` is `sys`.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator

from ckpt_cli.dtypes import BY_NAME, BY_STORAGE


def _names(module: str, words: str) -> Iterator[str]:
    """Dotted names of what a module has."""
    return (f"{module}.{word}" for word in words.split())


_SPARSE = "BFloat16 Byte Char Double Float Half Int Long Short"
_DENSE = f"{_SPARSE} Bool"

ALLOWED = frozenset(
    (
        *_names("_codecs", "encode"),
        *_names("builtins", "bytearray complex set"),
        *_names("collections", "Counter OrderedDict"),
        *_names("torch", "Size Tensor device"),
        *_names("torch.nn.parameter", "Parameter"),
        *_names("torch.serialization", "_get_layout"),
        *_names("torch.storage", "TypedStorage UntypedStorage"),
        *_names("torch._tensor", "_rebuild_from_type_v2"),
        *_names(
            "torch._utils",
            "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy _rebuild_meta_tensor_no_storage "
            "_rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state _rebuild_qtensor "
            "_rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_wrapper_subclass",
        ),
        *_names(
            "torch",
            "per_channel_affine per_channel_affine_float_qparams per_channel_symmetric per_tensor_affine "
            "per_tensor_symmetric",
        ),
        *(f"torch.{name}" for name in BY_NAME if name not in ("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn")),
        *(f"torch.{kind}Storage" for kind in BY_STORAGE),
        *(f"torch.cuda.{kind}Storage" for kind in BY_STORAGE if not kind.startswith("Q")),
        *(f"{module}.{kind}Tensor" for module in ("torch", "torch.cuda") for kind in _DENSE.split()),
        *(f"{module}.{kind}Tensor" for module in ("torch.sparse", "torch.cuda.sparse") for kind in _SPARSE.split()),
    )
)
"""The names that torch's weights_only unpickler accepts by default."""

MEMORY_FORMATS = frozenset(_names("torch", "channels_last channels_last_3d contiguous_format preserve_format"))
"""The constants of torch that a pickle names as an attribute of any module that imported torch."""

_NUMPY_SCALARS = (
    "bool bool_ int8 int16 int32 int64 intc intp uint8 uint16 uint32 uint64 uintc uintp byte ubyte short ushort long "
    "ulong longlong ulonglong half single double longdouble float16 float32 float64 float128 complex64 complex128 "
    "complex256 csingle cdouble clongdouble str_ bytes_ object_ void datetime64 timedelta64"
)
_NUMPY_DTYPES = (
    "BoolDType Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType UInt32DType UInt64DType LongDType "
    "ULongDType LongLongDType ULongLongDType ByteDType UByteDType ShortDType UShortDType IntDType UIntDType "
    "Float16DType Float32DType Float64DType LongDoubleDType Complex64DType Complex128DType CLongDoubleDType StrDType "
    "BytesDType VoidDType ObjectDType DateTime64DType TimeDelta64DType StringDType"
)
_ML_DTYPES = (
    "bfloat16 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float6_e2m3fn float6_e3m2fn float4_e2m1fn int2 int4 uint2 uint4"
)
_TYPING = (
    "Any Callable ClassVar Dict FrozenSet Generic Iterable Iterator List Literal Mapping NamedTuple Optional Sequence "
    "Set Text Tuple Type TypeVar Union _GenericAlias _LiteralGenericAlias _UnionGenericAlias _SpecialForm"
)

HARMLESS = frozenset(
    (
        *MEMORY_FORMATS,
        *_names(
            "builtins",
            "bool bytes dict ellipsis float frozenset int list memoryview object range slice str tuple type NoneType "
            "abs all any ascii bin chr divmod enumerate format hash hex id isinstance issubclass iter len max min next "
            "oct ord pow property repr reversed round sorted staticmethod classmethod sum zip Ellipsis NotImplemented "
            "None True False",
        ),
        *(
            f"builtins.{name}"
            for name, kind in vars(builtins).items()
            if isinstance(kind, type) and issubclass(kind, BaseException)
        ),
        *_names("_codecs", "decode"),
        *_names("copyreg", "_reconstructor __newobj__ __newobj_ex__"),
        *_names("collections", "ChainMap UserDict UserList UserString defaultdict deque"),
        *_names("collections.abc", "Callable Iterable Iterator Mapping Sequence"),
        *_names("datetime", "date datetime time timedelta timezone tzinfo"),
        *_names("zoneinfo", "ZoneInfo ZoneInfo._unpickle"),
        *_names("time", "struct_time"),
        *_names("decimal", "Decimal Context"),
        *_names("fractions", "Fraction"),
        *_names("uuid", "UUID SafeUUID"),
        *_names("enum", "Enum Flag IntEnum IntFlag StrEnum auto"),
        *_names("argparse", "Namespace"),
        *_names("types", "SimpleNamespace MappingProxyType GenericAlias UnionType NoneType"),
        *_names("typing", _TYPING),
        *_names("random", "Random SystemRandom"),
        *_names("_random", "Random"),
        *_names("re", "_compile Pattern RegexFlag"),
        *_names("array", "array _array_reconstructor"),
        *_names("ipaddress", "IPv4Address IPv6Address IPv4Network IPv6Network"),
        *_names("string", "Template"),
        *_names("dataclasses", "Field MISSING _MISSING_TYPE"),
        *_names("logging", "Logger RootLogger getLogger"),
        *_names("io", "BytesIO StringIO"),
        *_names("_io", "BytesIO StringIO"),
        *_names("itertools", "chain count cycle repeat"),
        *_names("math", "ceil cos erf exp floor log log10 log2 pow sin sqrt tan tanh"),
        *_names(
            "operator", "abs add and_ eq floordiv ge getitem gt le lt matmul mod mul ne neg not_ or_ pow sub truediv"
        ),
        *_names(
            "_operator", "abs add and_ eq floordiv ge getitem gt le lt matmul mod mul ne neg not_ or_ pow sub truediv"
        ),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
        ),
        *_names("numpy.matrixlib.defmatrix", "matrix"),
        *_names("numpy", f"dtype ndarray matrix recarray record poly1d {_NUMPY_SCALARS}"),
        *_names("numpy.dtypes", _NUMPY_DTYPES),
        *(
            f"numpy.{core}.{name}"
            for core in ("core", "_core")
            for name in (
                "multiarray._reconstruct",
                "multiarray.scalar",
                "numeric._frombuffer",
                "_internal._reconstruct",
            )
        ),
        *_names("numpy.ma.core", "MaskedArray _mareconstruct"),
        *_names(
            "numpy.random._pickle", "__bit_generator_ctor __generator_ctor __randomstate_ctor __generator_ctor_legacy"
        ),
        *_names("numpy.random._mt19937", "MT19937"),
        *_names("numpy.random._pcg64", "PCG64 PCG64DXSM"),
        *_names("numpy.random._philox", "Philox"),
        *_names("numpy.random._sfc64", "SFC64"),
        *_names("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
        *_names("ml_dtypes", _ML_DTYPES),
        *_names("joblib.numpy_pickle", "NumpyArrayWrapper"),
        *_names("torch", "Generator layout memory_format qscheme dtype strided sparse_coo contiguous_format"),
        *_names("torch._C", "DisableTorchFunctionSubclass"),
        *_names("torch._utils", "_rebuild_xla_tensor"),
        *_names(
            "torch.jit._pickle",
            "build_boollist build_doublelist build_intlist build_tensor_from_id build_tensorlist restore_type_tag",
        ),
        *_names("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        *_names(  # in the .metadata that Megatron-core writes
            "torch.distributed.checkpoint.planner", "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData"
        ),
        *_names("torch.distributed.device_mesh", "DeviceMesh"),
        *_names("torch.distributed.tensor", "DTensor"),
        *_names("torch.distributed.tensor._dtensor_spec", "DTensorSpec TensorMeta"),
        *_names("torch.distributed.tensor.placement_types", "Partial Replicate Shard"),
    )
)
"""Other names in ordinary checkpoints that only build data."""

CALLING = frozenset(
    (
        *_names("builtins", "getattr"),
        *_names("functools", "partial reduce"),
        *_names("_functools", "partial reduce"),
        *_names("torch.storage", "_load_from_bytes"),
        *_names("numpy.core", "_ufunc_reconstruct"),
        *_names("numpy._core", "_ufunc_reconstruct"),
    )
)
"""Names that ordinary checkpoints call too, and that are as harmless as their arguments."""
