"""Layouts of weights stored as fp8, int8 or fp4 with scales: which tensor each is, and by which formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ckpt_cli.arrays.formula import FP4, Codes, Formula, Scales, Zeros
from ckpt_cli.dtypes import UINT8, DType
from ckpt_cli.model.checkpoint import Checkpoint, Tensor
from ckpt_cli.ops.quantization import Group
from ckpt_cli.ops.quantized_layout import (
    BFLOAT16,
    FLOAT32,
    Config,
    Layout,
    Source,
    made_layout,
    matrix,
    native_dtype,
    number_of,
    refused,
    unfitting,
)

# --- bytes with scales ------------------------------------------------------------------------------------------------


def _table(dtype: DType) -> tuple[float, ...]:
    """Return the values of all bytes of a dtype."""
    import numpy as np

    from ckpt_cli.arrays.cast import Cast, Losses

    data = bytes(range(256))
    values = np.frombuffer(bytes(Cast(dtype, FLOAT32, "").run(memoryview(data), Losses())), np.float32)
    return tuple(values.tolist())


def with_scales(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """fp8 and int8 with a scale for the tensor, for each row, for groups of columns, or for blocks."""
    del checkpoint
    weight, scale = group.weight, group.parts["scale"]
    shape, is_integer = tuple(weight.shape or ()), weight.dtype.name == "int8"
    if weight.dtype.name not in _BYTES_OF_VALUES or "global_scale" in group.parts or "order" in group.parts:
        raise refused(group, f"of {weight.dtype} is packed in a way that is not certain")
    if len(shape) < 2 and scale.numel != 1:
        raise unfitting(group, "scale")
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, prod(shape))
    grid, block = _grid(group, shape, config)
    codes = Codes("int8") if is_integer else Codes("table", _table(weight.dtype))
    scales = Scales(scale.dtype, *grid, block, is_exponent=scale.dtype.name == "uint8")
    whole = len(shape) > 2 and scale.numel == 1
    stored = [Source(matrix(group, scale, grid[1]), "all" if whole else "grid")]
    zeros = None
    if "zero_point" in group.parts:
        zero = group.parts["zero_point"]
        if zero.numel != scale.numel or not is_integer:
            raise unfitting(group, "scale", "zero_point")
        zeros = Zeros(zero.dtype)
        stored.append(Source(matrix(group, zero, grid[1]), stored[0].kind))
    if whole:  # one scale for all matrices, as if they were one
        rows, scales = prod(shape[:-1]), replace(scales, block=(prod(shape[:-1]), columns))
    stored.append(Source(matrix(group, weight, columns)))
    formula = Formula(codes, max(rows, 1), columns, FLOAT32, scales, zeros)
    return made_layout(group, group.weight.name, shape, native_dtype(config, scale), formula, stored)


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
        raise unfitting(group, "scale")
    grid = said[-2], said[-1]
    for block in [*_blocks(config), *([(128, 128)] if group.scheme == "fp8 with block scales" else [])]:
        if (-(-rows // block[0]), -(-columns // block[1])) == grid:
            return grid, block
    if rows % grid[0] or columns % grid[1]:
        raise unfitting(group, "scale")
    block = rows // grid[0], columns // grid[1]
    if group.scheme == "MXFP8" and block != (1, 32):
        raise unfitting(group, "scale")
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


def nvfp4(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Pairs of e2m1 with a scale of e4m3 for every 16, which the scale of the tensor divides or multiplies."""
    number = number_of(checkpoint, group, "global_scale")
    is_divided = group.weight.name.endswith("_packed")
    return fp4(group, config, 16, {"divisor" if is_divided else "factor": number})


def fp4(group: Group, config: Config, width: int, more: Mapping[str, Any]) -> Layout:
    """Pairs of e2m1, the first in the low four bits, with a scale for every so many columns."""
    weight, scale = group.weight, group.parts["scale"]
    shape = tuple(weight.shape or ())
    if len(shape) < 2:
        raise unfitting(group, "scale")
    columns = shape[-1] * (1 if weight.dtype.name == "float4_e2m1fn" else 2)
    if tuple(scale.shape or ()) != (*shape[:-1], columns // width) or columns % width:
        raise unfitting(group, "scale")
    scales = Scales(
        scale.dtype, shape[-2], columns // width, (1, width), is_exponent=scale.dtype.name == "uint8", **more
    )
    formula = Formula(Codes("nibbles", FP4), shape[-2], columns, FLOAT32, scales)
    stored = [
        Source(matrix(group, scale, columns // width), "grid"),
        Source(matrix(group, weight, columns // 2, UINT8)),
    ]
    name = weight.name.removesuffix("_packed")
    return made_layout(group, name, (*shape[:-1], columns), native_dtype(config), formula, stored)


def mxfp4(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """gpt-oss: blocks of 32 as 16 bytes with an exponent each.

    transformers names them `NAME_blocks` and turns each expert's matrix; the original files have `NAME.blocks`, not
    turned.
    """
    del checkpoint, config
    weight, scale = group.weight, group.parts["scale"]
    shape = tuple(weight.shape or ())
    is_turned = weight.name.endswith("_blocks")
    if is_turned and len(shape) != 4:
        raise refused(group, f"{list(shape)} has not four dimensions, those of experts, rows, blocks and bytes")
    if len(shape) < 3:
        raise unfitting(group, "scale")
    *before, rows, blocks, _ = shape
    columns = 32 * blocks
    scales = Scales(scale.dtype, rows, blocks, (1, 32), is_exponent=True)
    formula = Formula(Codes("nibbles", FP4), max(rows, 1), columns, FLOAT32, scales, turned=is_turned)
    if is_turned:
        stored = [Source(scale, "turned"), Source(weight, "turned")]
        new = (*before, columns, rows)
    else:
        stored = [Source(matrix(group, scale, blocks), "grid"), Source(matrix(group, weight, 16 * blocks))]
        new = (*before, rows, columns)
    name = weight.name[: -len("_blocks")]
    return made_layout(group, name, new, BFLOAT16, formula, stored)


# --- tensors of torchao -----------------------------------------------------------------------------------------------

_OF_TORCHAO = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
"""Its classes that keep a number for each value; others pack them for a kernel."""


def is_of_torchao(group: Group) -> bool:
    """True for a tensor of a class of torchao whose parts are stored numbers, scales and perhaps zero points."""
    module, _, name = (group.weight.python_type or "").rpartition(".")
    return module.startswith("torchao") and name in _OF_TORCHAO


def torchao(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Return the layout of a tensor of torchao: `(q - z) * s` (quantization/quant_primitives.py)."""
    tensor = group.weight
    parts = {part.name: part for part in tensor.parts}
    stored, scale = parts.get("qdata"), parts.get("scale")
    if stored is None or scale is None or not parts.keys() <= {"qdata", "scale", "zero_point"}:
        raise refused(group, f"is made of {', '.join(parts)}, of which it is not certain what they mean")
    if stored.shape != tensor.shape:
        raise unfitting(replace(group, parts={"qdata": stored}), "qdata")
    roles: dict[str, Tensor] = {role: parts[role] for role in ("scale", "zero_point") if role in parts}
    layout = with_scales(checkpoint, Group(group.scheme, replace(stored, name=tensor.name), roles), config)
    return replace(layout, weight=tensor, native=tensor.dtype, helpers=())
