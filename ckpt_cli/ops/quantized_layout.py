"""The layout of a scaled or packed weight: the tensor that it stands for, and how that is made of what is stored.

Whatever names, shapes, dtypes and the config do not say without doubt is refused, with the tensor and the reason.
Sources of the layouts: ops/quantization.py. Of the formulas: DeepSeek-V3's inference/kernel.py (`weight_dequant`);
transformers' integrations/finegrained_fp8.py (`Fp8Dequantize`) and integrations/mxfp4.py
(`convert_moe_packed_tensors`); compressed-tensors' quantization/lifecycle/forward_helpers.py (`_dequantize`) and
compressors; ModelOpt's torch/quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ckpt_cli.arrays.dequantize import FP4, Codes, Dequantizing, Formula, Scales, Zeros
from ckpt_cli.arrays.indexing import Index
from ckpt_cli.dtypes import BY_NAME, UINT8, DType
from ckpt_cli.errors import RefusedError
from ckpt_cli.facts import dataclass
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.hf_config import config_beside
from ckpt_cli.ops.quantization import Group

_PIECE = 512 << 10
"""Elements that are made at a time, about."""

_ROW = 4 << 20
"""The most elements of a row, which is made at once."""

_FLOAT32, _BFLOAT16 = BY_NAME["float32"], BY_NAME["bfloat16"]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of which each piece needs a part."""

    tensor: Tensor
    kind: str = "rows"
    """`rows` (times `times`, divided by `per`), `grid` for the rows of scales, `all`, or `turned` for some columns of
    one of several matrices."""
    times: int = 1
    per: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight as it is stored, and as it will be; a recipe of `parallel/pieces.py`."""

    scheme: str
    """In words."""
    weight: Tensor
    """The stored numbers."""
    name: str
    """The name of the plain tensor."""
    shape: tuple[int, ...]
    native: DType
    """The dtype that the scheme's own dequantizer gives, as far as is known."""
    formula: Formula
    stored: Sequence[Source]
    """What is read for it, in the order in which the formula takes it."""
    helpers: tuple[str, ...] = ()
    """The names of the tensors beside it that mean nothing without it."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def piece(self) -> int:
        """Elements of a piece: some whole rows of what is made."""
        formula = self.formula
        if formula.turned:
            return formula.rows * formula.scales.block[1] * _divisor(formula)
        rows = max(_PIECE // max(formula.columns, 1), 1)
        step = 8 if formula.codes.kind == "awq" else formula.scales.block[0]
        return max(formula.columns, 1) * (rows // step * step if 1 < step <= rows else rows)

    def of(self, target: DType) -> Layout:
        """Return the layout that makes another dtype."""
        return replace(self, formula=replace(self.formula, target=target))

    def making(self, begin: int, end: int) -> Dequantizing:
        """Return what makes a range of elements."""
        return Dequantizing(self.formula, begin, end)

    def sources(self, begin: int, end: int) -> list[tuple[Tensor, Index]]:
        """Return the parts of what is stored that a range of elements is made of."""
        formula = self.formula
        if formula.turned:
            return [(source.tensor, self._turned(begin, end)) for source in self.stored]
        columns = max(formula.columns, 1)
        first, last = begin // columns, -(-end // columns)
        found: list[tuple[Tensor, Index]] = []
        for source in self.stored:
            part = slice(first * source.times // source.per, -(-last * source.times // source.per))
            if source.kind == "grid":
                part = slice(formula.grid_row(first), formula.grid_row(last - 1) + 1)
            found.append((source.tensor, () if source.kind == "all" else (part,)))
        return found

    def _turned(self, begin: int, end: int) -> Index:
        """Return the index of some blocks of columns of one matrix."""
        rows, width = self.formula.rows, self.formula.scales.block[1]
        matrix, at = divmod(begin // rows, self.formula.columns)
        return matrix, slice(None), slice(at // width, at // width + (end - begin) // rows // width)


def _divisor(formula: Formula) -> int:
    """Return how many blocks of columns are turned at a time: a divisor of all, so that a piece is of one matrix."""
    blocks = formula.columns // formula.scales.block[1]
    most = max(4 * _PIECE // max(formula.rows * formula.scales.block[1], 1), 1)
    return next((count for count in range(min(most, blocks), 0, -1) if blocks % count == 0), 1)


@dataclass(frozen=True, slots=True)
class Config:
    """What is said beside the weights."""

    quantization: Mapping[str, Any]
    """The `quantization_config`; empty where there is none."""
    dtype: str = ""
    """The dtype of the model; empty where it is not said."""

    def get(self, key: str) -> Any:
        """Return a value of the quantization; None where it is not said."""
        return self.quantization.get(key)


def config_of(checkpoint: Checkpoint) -> Config:
    """Return what the config files beside a checkpoint say."""
    path = checkpoint.container.files[0].path
    config = config_beside(path) or {}
    said = next((value for key in ("quantization_config", "compression_config")
                 if isinstance(value := config.get(key), dict)), None)  # fmt: skip
    if said is None:
        said = config_beside(path, "quantize_config.json") or config_beside(path, "quant_config.json") or {}
    text = config.get("text_config")
    dtype = next((value for part in (config, text if isinstance(text, dict) else {}) for key in ("dtype", "torch_dtype")
                  if isinstance(value := part.get(key), str)), "")  # fmt: skip
    return Config(said, dtype.removeprefix("torch."))


def layout_of(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Return the layout of a weight; raises RefusedError where it is not certain, or not of a scheme known here."""
    find = _LAYOUTS.get(group.scheme)
    if find is None or group.layout is None:
        what = group.scheme if group.parts else f"{group.scheme}: the tensors that belong to it are not there"
        raise _refused(group, f"is {what}" if group.layout is not None else f"has what is not known here ({what})")
    layout = find(checkpoint, group, config)
    if layout.formula.columns > _ROW:
        raise _refused(group, f"has rows of {layout.formula.columns:,} elements; {_ROW:,} are the most")
    return layout


def _refused(group: Group, why: str) -> RefusedError:
    return RefusedError(f"tensor {group.weight.name!r} {why}", hint="ckpt info says what it is taken for")


def _shapes(group: Group, *roles: str) -> RefusedError:
    """Return the error for shapes that do not fit each other."""
    shapes = [f"{role} {list(group.parts[role].shape or ())}" for role in roles if role in group.parts]
    return _refused(group, f"{list(group.weight.shape or ())} does not fit its {' and '.join(shapes)}")


# --- tensors as they are read -----------------------------------------------------------------------------------------


def _matrix(group: Group, tensor: Tensor, columns: int, dtype: DType | None = None) -> Tensor:
    """Return a tensor as a matrix of rows; of more dimensions than two, all matrices one after the other."""
    shape = tensor.shape or ()
    if dtype is not None or tensor.dtype.elements > 1:
        from ckpt_cli.arrays.codec import as_bytes

        tensor = as_bytes(tensor) if tensor.dtype.elements > 1 else replace(tensor, dtype=dtype or tensor.dtype)
        if len(tensor.shape or ()) == len(shape) > 1:
            shape = tensor.shape or ()
        elif not tensor.is_contiguous:
            raise _refused(group, "is not contiguous")
        else:
            return replace(tensor, shape=(tensor.numel // max(columns, 1), columns), stride=(columns, 1))
    if len(shape) == 2 and shape[1] == columns:
        return tensor
    if not tensor.is_contiguous:
        raise _refused(group, f"has {tensor.name!r}, which is not contiguous")
    return replace(tensor, shape=(tensor.numel // max(columns, 1), columns), stride=(columns, 1))


def _transposed(tensor: Tensor) -> Tensor:
    """Return a view of a matrix whose rows are its columns."""
    shape, stride = tensor.shape or (), tensor.stride
    return replace(tensor, shape=shape[::-1], stride=stride[::-1])


def _number(checkpoint: Checkpoint, group: Group, role: str) -> float:
    """Return the one value of a tensor beside the weight."""
    from ckpt_cli.arrays.quantized import values_of

    tensor = group.parts[role]
    if tensor.numel != 1:
        raise _refused(group, f"has a {role} {list(tensor.shape or ())}, not one number")
    return float(values_of(checkpoint, tensor).reshape(-1)[0])


def _native(config: Config, scale: Tensor | None = None) -> DType:
    """Return the dtype of the model before it was quantized: that of 16-bit scales, else what the config says."""
    if scale is not None and scale.dtype.name in ("float16", "bfloat16"):
        return scale.dtype
    return BY_NAME[config.dtype] if config.dtype in ("float16", "bfloat16", "float32") else _BFLOAT16


# --- bytes with scales ------------------------------------------------------------------------------------------------


def _table(dtype: DType) -> tuple[float, ...]:
    """Return the values of all bytes of a dtype."""
    import numpy as np

    from ckpt_cli.arrays.cast import Cast, Losses

    data = bytes(range(256))
    values = np.frombuffer(bytes(Cast(dtype, _FLOAT32, "").run(memoryview(data), Losses())), np.float32)
    return tuple(values.tolist())


def _with_scales(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """fp8 and int8 with a scale for the tensor, for each row, for groups of columns, or for blocks."""
    del checkpoint
    weight, scale = group.weight, group.parts["scale"]
    shape, is_integer = tuple(weight.shape or ()), weight.dtype.name == "int8"
    if weight.dtype.name not in _BYTES_OF_VALUES or "global_scale" in group.parts or "order" in group.parts:
        raise _refused(group, f"of {weight.dtype} is packed in a way that is not certain")
    if len(shape) < 2 and scale.numel != 1:
        raise _shapes(group, "scale")
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, prod(shape))
    grid, block = _grid(group, shape, config)
    codes = Codes("int8") if is_integer else Codes("table", _table(weight.dtype))
    scales = Scales(scale.dtype, *grid, block, is_exponent=scale.dtype.name == "uint8")
    whole = len(shape) > 2 and scale.numel == 1
    stored = [Source(_matrix(group, scale, grid[1]), "all" if whole else "grid")]
    zeros = None
    if "zero_point" in group.parts:
        zero = group.parts["zero_point"]
        if zero.numel != scale.numel or not is_integer:
            raise _shapes(group, "scale", "zero_point")
        zeros = Zeros(zero.dtype)
        stored.append(Source(_matrix(group, zero, grid[1]), stored[0].kind))
    if whole:  # one scale for all matrices, as if they were one
        rows, scales = prod(shape[:-1]), replace(scales, block=(prod(shape[:-1]), columns))
    stored.append(Source(_matrix(group, weight, columns)))
    formula = Formula(codes, max(rows, 1), columns, _FLOAT32, scales, zeros)
    return _layout(group, group.weight.name, shape, _native(config, scale), formula, stored)


_BYTES_OF_VALUES = ("int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def _grid(group: Group, shape: tuple[int, ...], config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and columns of the scales of one matrix, and those of a block; raises RefusedError.

    A config's size of blocks holds where it fits; 128 by 128 where only the names say that there are blocks.
    """
    said = tuple(group.parts["scale"].shape or ())
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, prod(shape))
    everything = max(rows, 1), max(columns, 1)
    if prod(said) == 1 or (len(shape) > 2 and said in (shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1))):
        return (1, 1), everything
    if said in (shape[:-1], (*shape[:-1], 1)):
        return (rows, 1), (1, everything[1])
    if len(said) != len(shape) or said[:-2] != shape[:-2] or 0 in said:
        raise _shapes(group, "scale")
    grid = said[-2], said[-1]
    for block in [*_blocks(config), *([(128, 128)] if group.scheme == "fp8 with block scales" else [])]:
        if (-(-rows // block[0]), -(-columns // block[1])) == grid:
            return grid, block
    if rows % grid[0] or columns % grid[1]:
        raise _shapes(group, "scale")
    block = rows // grid[0], columns // grid[1]
    if group.scheme == "MXFP8" and block != (1, 32):
        raise _shapes(group, "scale")
    return grid, block


def _blocks(config: Config) -> list[tuple[int, int]]:
    """Return the sizes of blocks that a config names."""
    found = [config.get("weight_block_size")]
    groups = config.get("config_groups")
    for one in groups.values() if isinstance(groups, dict) else ():
        weights = one.get("weights") if isinstance(one, dict) else None
        found.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    return [
        (size[0], size[1])
        for size in found
        if isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)
    ]


# --- four bits, with scales of small blocks ---------------------------------------------------------------------------


def _nvfp4(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Pairs of e2m1 with a scale of e4m3 for every 16, which the scale of the tensor divides or multiplies."""
    number = _number(checkpoint, group, "global_scale")
    is_divided = group.weight.name.endswith("_packed")
    return _fp4(group, config, 16, {"divisor" if is_divided else "factor": number})


def _fp4(group: Group, config: Config, width: int, more: Mapping[str, Any]) -> Layout:
    """Pairs of e2m1, the first in the low four bits, with a scale for every so many columns."""
    weight, scale = group.weight, group.parts["scale"]
    shape = tuple(weight.shape or ())
    if len(shape) < 2:
        raise _shapes(group, "scale")
    columns = shape[-1] * (1 if weight.dtype.name == "float4_e2m1fn" else 2)
    if tuple(scale.shape or ()) != (*shape[:-1], columns // width) or columns % width:
        raise _shapes(group, "scale")
    scales = Scales(
        scale.dtype, shape[-2], columns // width, (1, width), is_exponent=scale.dtype.name == "uint8", **more
    )
    formula = Formula(Codes("nibbles", FP4), shape[-2], columns, _FLOAT32, scales)
    stored = [
        Source(_matrix(group, scale, columns // width), "grid"),
        Source(_matrix(group, weight, columns // 2, UINT8)),
    ]
    name = weight.name.removesuffix("_packed")
    return _layout(group, name, (*shape[:-1], columns), _native(config), formula, stored)


def _mxfp4(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """gpt-oss: blocks of 32 as 16 bytes with an exponent each.

    transformers names them `NAME_blocks` and turns each expert's matrix; the original files have `NAME.blocks`, not
    turned.
    """
    del checkpoint
    weight, scale = group.weight, group.parts["scale"]
    shape = tuple(weight.shape or ())
    is_turned = weight.name.endswith("_blocks")
    if is_turned and len(shape) != 4:
        raise _refused(group, f"{list(shape)} has not four dimensions, those of experts, rows, blocks and bytes")
    if len(shape) < 3:
        raise _shapes(group, "scale")
    *before, rows, blocks, _ = shape
    columns = 32 * blocks
    scales = Scales(scale.dtype, rows, blocks, (1, 32), is_exponent=True)
    formula = Formula(Codes("nibbles", FP4), max(rows, 1), columns, _FLOAT32, scales, turned=is_turned)
    if is_turned:
        stored = [Source(scale, "turned"), Source(weight, "turned")]
        new = (*before, columns, rows)
    else:
        stored = [Source(_matrix(group, scale, blocks), "grid"), Source(_matrix(group, weight, 16 * blocks))]
        new = (*before, rows, columns)
    name = weight.name[: -len("_blocks")]
    return _layout(group, name, new, _BFLOAT16, formula, stored)


# --- integers packed by compressed-tensors ----------------------------------------------------------------------------


def _packed(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Integers of 1 to 8 bits without gaps in words along a row, or e2m1 with exponents (mxfp4-pack-quantized)."""
    from ckpt_cli.arrays.quantized import values_of

    weight, scale = group.weight, group.parts["scale"]
    if weight.dtype.name not in ("int32", "uint32"):
        if scale.dtype.name not in ("uint8", "float8_e8m0fnu") or weight.dtype.name != "uint8":
            raise _refused(group, f"of {weight.dtype} is packed in a way that is not certain")
        return _fp4(group, config, 32, {})
    shape = tuple(weight.shape or ())
    if "shape" not in group.parts or len(shape) != 2 or "global_scale" in group.parts:
        raise _refused(group, "has no weight_shape, so that its columns are not certain")
    new = tuple(int(size) for size in values_of(checkpoint, group.parts["shape"]).reshape(-1)[:8])
    if len(new) != 2 or new[0] != shape[0] or new[1] < 1:
        raise _refused(group, f"{list(shape)} does not fit its weight_shape, which says {list(new)}")
    rows, columns = new
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == shape[1]]
    said = _said_bits(config)
    bits = next((bits for bits in fitting if len(fitting) == 1 or said == {bits}), None)
    if bits is None or (said and bits not in said):
        raise _refused(group, f"{list(shape)} for {list(new)} does not say of how many bits its integers are")
    grid = tuple(scale.shape or ())
    if len(grid) == 1:
        grid = (*grid, 1)
    if grid == (1, 1):
        block = (max(rows, 1), columns)
    elif len(grid) == 2 and grid[0] == rows and grid[1] > 0 and (columns % grid[1] == 0 or "order" in group.parts):
        block = (1, -(-columns // grid[1]))
    else:
        raise _shapes(group, "scale")
    offset = 1 << (bits - 1)
    stored = [Source(_matrix(group, scale, grid[1]), "grid")]
    zeros = None
    if "zero_point" in group.parts:
        zeros = _packed_zeros(group, grid, bits, block, stored)
    groups = _groups(checkpoint, group, columns, grid[1]) if "order" in group.parts else None
    stored.append(Source(weight))
    scales = Scales(scale.dtype, grid[0], grid[1], block)
    formula = Formula(Codes("bits", bits=bits, offset=offset), max(rows, 1), columns, _FLOAT32, scales, zeros, groups)
    name = weight.name.removesuffix("_packed")
    return _layout(group, name, new, _native(config, scale), formula, stored)


def _packed_zeros(
    group: Group, grid: tuple[int, ...], bits: int, block: tuple[int, int], stored: list[Source]
) -> Zeros:
    """Return the zero points of compressed-tensors: of the dtype of integers, or packed along the rows."""
    zero = group.parts["zero_point"]
    shape = tuple(zero.shape or ())
    if zero.dtype.name in ("int8", "uint8", "int16", "int64") and prod(shape) == prod(grid):
        stored.append(Source(_matrix(group, zero, grid[1]), "grid"))
        return Zeros(zero.dtype)
    if block[0] != 1 or zero.dtype.name not in ("int32", "uint32") or shape != (-(-grid[0] * bits // 32), grid[1]):
        raise _shapes(group, "scale", "zero_point")
    stored.append(Source(zero, "rows", bits, 32))
    return Zeros(zero.dtype, "bits", bits, 1 << (bits - 1))


def _said_bits(config: Config) -> set[int]:
    """Return the numbers of bits that the groups of a config of compressed-tensors name."""
    groups = config.get("config_groups")
    found = set()
    for one in groups.values() if isinstance(groups, dict) else ():
        weights = one.get("weights") if isinstance(one, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if type(bits) is int:
            found.add(bits)
    return found


def _groups(checkpoint: Checkpoint, group: Group, columns: int, count: int) -> Any:
    """Return the number of the group of each column, as an array; None where these are in order and of one size.

    Raises RefusedError for numbers of groups that there are not.
    """
    import numpy as np

    from ckpt_cli.arrays.quantized import values_of

    order = group.parts["order"]
    if order.dtype.category != "int" or order.shape != (columns,) or columns > _ROW:
        raise _refused(group, f"has {columns} columns, and its g_idx is {order.dtype} {list(order.shape or ())}")
    numbers = values_of(checkpoint, order).astype(np.int64)
    if columns and numbers.min() == numbers.max() == -1:  # compressed-tensors' way to say that there is no order
        return None
    if columns and (numbers.min() < 0 or numbers.max() >= count):
        raise _refused(group, f"has {count} groups, and its g_idx names {numbers.min()} to {numbers.max()}")
    if columns % count == 0 and np.array_equal(numbers, np.arange(columns) // (columns // count)):
        return None
    return numbers.astype(np.int32)


def _layout(
    group: Group,
    name: str,
    shape: Sequence[int],
    native: DType,
    formula: Formula,
    stored: Sequence[Source],
) -> Layout:
    helpers = tuple(part.name for part in group.parts.values())
    return Layout(group.scheme, group.weight, name, tuple(shape), native, formula, stored, helpers)


_LAYOUTS: dict[str, Callable[[Checkpoint, Group, Config], Layout]] = {
    "fp8 with block scales": _with_scales,
    "MXFP8": _with_scales,
    "fp8 with scales": _with_scales,
    "integers with scales": _with_scales,
    "NVFP4": _nvfp4,
    "MXFP4": _mxfp4,
    "packed integers of compressed-tensors": _packed,
}
"""By the names of schemes in ops/quantization.py."""
