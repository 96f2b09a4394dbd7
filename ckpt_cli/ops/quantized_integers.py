"""Layouts of weights stored as integers within words: compressed-tensors, GPTQ and AWQ."""

from __future__ import annotations

from math import prod
from typing import Any

from ckpt_cli.arrays.formula import Codes, Formula, Scales, Zeros
from ckpt_cli.errors import UnfittingError
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.quantization import Group
from ckpt_cli.ops.quantized_floats import fp4
from ckpt_cli.ops.quantized_layout import (
    FLOAT32,
    LONGEST_ROW,
    Config,
    Layout,
    Source,
    made_layout,
    matrix,
    native_dtype,
    refused,
    transposed,
    unfitting,
)

# --- integers packed by compressed-tensors ----------------------------------------------------------------------------


def packed(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Integers of 1 to 8 bits without gaps in words along a row, or e2m1 with exponents (mxfp4-pack-quantized)."""
    from ckpt_cli.arrays.quantized import values_of

    weight, scale = group.weight, group.parts["scale"]
    if weight.dtype.name not in ("int32", "uint32"):
        if scale.dtype.name not in ("uint8", "float8_e8m0fnu") or weight.dtype.name != "uint8":
            raise refused(group, f"of {weight.dtype} is packed in a way that is not certain")
        return fp4(group, config, 32, {})
    shape = tuple(weight.shape or ())
    if "shape" not in group.parts or len(shape) != 2 or "global_scale" in group.parts:
        raise refused(group, "has no weight_shape, so that its columns are not certain")
    new = tuple(int(size) for size in values_of(checkpoint, group.parts["shape"]).reshape(-1)[:8])
    if len(new) != 2 or new[0] != shape[0] or new[1] < 1:
        raise UnfittingError(
            f"tensor {weight.name!r} {list(shape)} does not fit its weight_shape, which says {list(new)}"
        )
    rows, columns = new
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == shape[1]]
    said = said_bits(config)
    bits = next((bits for bits in fitting if len(fitting) == 1 or said == {bits}), None)
    if bits is None or (said and bits not in said):
        raise refused(group, f"{list(shape)} for {list(new)} does not say of how many bits its integers are")
    grid = tuple(scale.shape or ())
    if len(grid) == 1:
        grid = (*grid, 1)
    if grid == (1, 1):
        block = (max(rows, 1), columns)
    elif len(grid) == 2 and grid[0] == rows and grid[1] > 0 and (columns % grid[1] == 0 or "order" in group.parts):
        block = (1, -(-columns // grid[1]))
    else:
        raise unfitting(group, "scale")
    offset = 1 << (bits - 1)
    stored = [Source(matrix(group, scale, grid[1]), "grid")]
    zeros = None
    if "zero_point" in group.parts:
        zeros = packed_zeros(group, grid, bits, block, stored)
    groups = column_groups(checkpoint, group, columns, grid[1]) if "order" in group.parts else None
    stored.append(Source(weight))
    scales = Scales(scale.dtype, grid[0], grid[1], block)
    formula = Formula(Codes("bits", bits=bits, offset=offset), max(rows, 1), columns, FLOAT32, scales, zeros, groups)
    name = weight.name.removesuffix("_packed")
    return made_layout(group, name, new, native_dtype(config, scale), formula, stored)


def packed_zeros(group: Group, grid: tuple[int, ...], bits: int, block: tuple[int, int], stored: list[Source]) -> Zeros:
    """Return the zero points of compressed-tensors: of the dtype of integers, or packed along the rows."""
    zero = group.parts["zero_point"]
    shape = tuple(zero.shape or ())
    if zero.dtype.name in ("int8", "uint8", "int16", "int64") and prod(shape) == prod(grid):
        stored.append(Source(matrix(group, zero, grid[1]), "grid"))
        return Zeros(zero.dtype)
    if block[0] != 1 or zero.dtype.name not in ("int32", "uint32") or shape != (-(-grid[0] * bits // 32), grid[1]):
        raise unfitting(group, "scale", "zero_point")
    stored.append(Source(zero, "rows", bits, 32))
    return Zeros(zero.dtype, "bits", bits, 1 << (bits - 1))


def said_bits(config: Config) -> set[int]:
    """Return the numbers of bits that the groups of a config of compressed-tensors name."""
    groups = config.get("config_groups")
    found = set()
    for one in groups.values() if isinstance(groups, dict) else ():
        weights = one.get("weights") if isinstance(one, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if type(bits) is int:
            found.add(bits)
    return found


def column_groups(checkpoint: Checkpoint, group: Group, columns: int, count: int) -> Any:
    """Return the number of the group of each column, as an array; None where these are in order and of one size.

    Raises RefusedError for numbers of groups that there are not.
    """
    import numpy as np

    from ckpt_cli.arrays.quantized import values_of

    order = group.parts["order"]
    if order.dtype.category != "int" or order.shape != (columns,) or columns > LONGEST_ROW:
        raise unfitting(group, "order")
    numbers = values_of(checkpoint, order).astype(np.int64)
    if columns and numbers.min() == numbers.max() == -1:  # compressed-tensors' way to say that there is no order
        return None
    if columns and (numbers.min() < 0 or numbers.max() >= count):
        raise UnfittingError(
            f"tensor {group.weight.name!r} has {count} groups, and its g_idx names {numbers.min()} to {numbers.max()}"
        )
    if columns % count == 0 and np.array_equal(numbers, np.arange(columns) // (columns // count)):
        return None
    return numbers.astype(np.int32)


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------

_WORDS = ("int32", "uint32")


def gptq(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Integers in words down the columns of a transposed weight, zero points along the rows.

    A value is `scales[g] * (q - z)`, with 1 added to z in files of the first version (AutoGPTQ's
    nn_modules/qlinear/qlinear_cuda.py, which adds after the mask; GPTQModel's `gptq_v2` does not add).
    """
    from ckpt_cli.arrays.quantized import values_of

    weight, scale, zero = group.weight, group.parts["scale"], group.parts.get("zero_point")
    shape, scale_shape = tuple(weight.shape or ()), tuple(scale.shape or ())
    if zero is None or zero.dtype.name not in _WORDS or len(shape) != 2 or 0 in (*shape, *scale_shape):
        raise refused(group, "has no qzeros, or none of words, so that its zero points are not certain")
    count, rows = scale_shape
    bits, rest = divmod(32 * (zero.shape or (0, 0))[-1], rows)
    columns = shape[0] * 32 // bits if bits in (2, 3, 4, 8) else 0
    if rest or not columns or tuple(zero.shape or ()) != (count, rows * bits // 32) or shape[0] * 32 % bits:
        raise unfitting(group, "scale", "zero_point")
    if config.get("bits") not in (None, bits):
        raise refused(group, f"has integers of {bits} bits, and the config says {config.get('bits')}")
    if "order" in group.parts:
        groups = column_groups(checkpoint, group, columns, count)
    elif columns % count:
        raise unfitting(group, "scale")
    else:
        groups = None
    plus_one = _adds_one(group, config)
    if plus_one is None:  # all are the middle, as those of symmetric integers are
        found = {int(word) & 0xFFFFFFFF for word in set(values_of(checkpoint, zero).reshape(-1).tolist())}
        middle = sum((1 << (bits - 1)) << at for at in range(0, 32, bits)) if bits != 3 else 0
        one = sum(1 << at for at in range(0, 32, bits))
        if found not in ({middle}, {middle - one}) or not middle:
            raise refused(group, "has zero points of which no config says whether 1 is to be added (gptq or gptq_v2)")
        plus_one = found == {middle - one}
    stored = [
        Source(transposed(scale)),
        Source(transposed(zero), "rows", bits, 32),
        Source(transposed(weight)),
    ]
    scales = Scales(scale.dtype, rows, count, (1, -(-columns // count)))
    zeros = Zeros(zero.dtype, "bits", bits, plus_one=plus_one)
    formula = Formula(Codes("bits", bits=bits), rows, columns, FLOAT32, scales, zeros, groups)
    return _named(group, (rows, columns), config, formula, stored)


def _adds_one(group: Group, config: Config) -> bool | None:
    """Return whether 1 is added to zero points, as a config says it; None where there is none."""
    form = config.get("checkpoint_format")
    if config.get("quant_method") not in (None, "gptq"):
        raise refused(group, f"is GPTQ, and the config says {config.get('quant_method')}")
    if form in ("gptq", "gptq_v2"):
        return bool(form == "gptq")
    if form is not None or config.get("is_marlin_format"):
        raise refused(group, f"is packed in the way of {form or 'marlin'}, which is not known here")
    return True if config.quantization else None


def awq(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Eight columns of a transposed weight in a word, in the order of AutoAWQ's GEMM kernel: `(q - z) * s`.

    AutoAWQ's awq/utils/packing_utils.py (`dequantize_gemm`).
    """
    del checkpoint
    weight, scale, zero = group.weight, group.parts["scale"], group.parts.get("zero_point")
    shape, scale_shape = tuple(weight.shape or ()), tuple(scale.shape or ())
    if zero is None or zero.dtype.name not in _WORDS or len(shape) != 2 or len(scale_shape) != 2:
        raise refused(group, "has no qzeros of words, so that its zero points are not certain")
    columns, rows = shape[0], 8 * shape[1]
    count = scale_shape[0]
    if (
        0 in (*shape, count)
        or scale_shape[1] != rows
        or tuple(zero.shape or ()) != (count, shape[1])
        or columns % count
    ):
        raise unfitting(group, "scale", "zero_point")
    said = config.get("quant_method"), config.get("version") or "gemm", config.get("bits") or config.get("w_bit") or 4
    if said[0] not in (None, "awq") or str(said[1]).lower() != "gemm" or said[2] != 4:
        raise refused(group, f"is packed as AWQ's GEMM of 4 bits, and the config says {' '.join(map(str, said))}")
    stored = [
        Source(transposed(scale)),
        Source(transposed(zero), "rows", 4, 32),
        Source(transposed(weight), "rows", 4, 32),
    ]
    scales = Scales(scale.dtype, rows, count, (1, columns // count))
    zeros = Zeros(zero.dtype, "awq", 4)
    formula = Formula(Codes("awq", bits=4), rows, columns, FLOAT32, scales, zeros)
    return _named(group, (rows, columns), config, formula, stored)


def _named(group: Group, shape: tuple[int, int], config: Config, formula: Formula, stored: list[Source]) -> Layout:
    """Return the layout of a `qweight`, which becomes `weight`."""
    name = f"{group.weight.name.removesuffix('qweight')}weight"
    return made_layout(group, name, shape, native_dtype(config, group.parts["scale"]), formula, stored)
