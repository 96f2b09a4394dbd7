"""Layouts of the weights of bitsandbytes: four bits with a state beside them, and int8 of LLM.int8()."""

from __future__ import annotations

import json
from math import prod
from typing import Any

from ckpt_cli import limits
from ckpt_cli.arrays.formula import Codes, Formula, Scales
from ckpt_cli.dtypes import BY_NAME, UINT8
from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.quantization import Group
from ckpt_cli.ops.quantized_layout import (
    FLOAT32,
    Config,
    Layout,
    Source,
    made_layout,
    matrix,
    native_dtype,
    refused,
    unfitting,
)

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The sizes of blocks that bitsandbytes takes."""

_PER_127 = 7.874015718698502e-3
"""What bitsandbytes multiplies by where the largest value is stored as 127 (`int8_vectorwise_dequant`)."""


def four_bits(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """nf4 and fp4: `map[q] * absmax` in float32, the first value in the high four bits.

    Where absmax is itself bytes, it is `map2[a] * absmax2 + offset` (bitsandbytes' functional.py, `dequantize_4bit`).
    """
    del config
    from ckpt_cli.arrays.quantized import values_of

    state = _state(checkpoint, group)
    shape, block = _shape_of(group, state), state.get("blocksize")
    numel, weight, absmax = prod(shape), group.weight, group.parts["scale"]
    codebook = group.parts["codebook"]
    if block not in _BLOCKS or type(block) is not int:
        raise refused(group, f"has blocks of {str(block)[:20]} values in its quant_state")
    if weight.nbytes != -(-numel // 2) or absmax.numel != -(-numel // block) or codebook.numel != 16:
        raise unfitting(group, "scale", "codebook")
    dtype = str(state.get("dtype")).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise refused(group, f"has {dtype[:20]!r} as the dtype in its quant_state")
    table = tuple(values_of(checkpoint, codebook).reshape(-1).tolist())
    stored = [Source(matrix(group, absmax, 1))]
    scales = Scales(absmax.dtype, absmax.numel, 1, (1, block))
    if absmax.dtype.name == "uint8":
        further, inner = _further(checkpoint, group, state, absmax.numel)
        scales = Scales(absmax.dtype, absmax.numel, 1, (1, block), **further)
        stored.append(Source(matrix(group, group.parts["global_scale"], 1), "rows", 1, inner))
    elif absmax.dtype.name != "float32":
        raise refused(group, f"has an absmax of {absmax.dtype}")
    stored.append(Source(matrix(group, weight, 1, UINT8), "rows", block, 2))
    codes = Codes("nibbles", table, high_first=True)
    formula = Formula(codes, absmax.numel, block, FLOAT32, scales, flat=numel)
    return made_layout(group, weight.name, shape, BY_NAME[dtype], formula, stored)


def _state(checkpoint: Checkpoint, group: Group) -> dict[str, Any]:
    """Return what is said of a weight in the JSON beside it; raises RefusedError where that cannot be read."""
    from ckpt_cli.arrays.quantized import values_of

    part = group.parts.get("state")
    if part is None or part.dtype.name != "uint8" or part.numel > limits.QUANT_STATE:
        raise refused(group, f"has no quant_state, or one of more than {limits.QUANT_STATE:,} bytes")
    try:
        state = json.loads(values_of(checkpoint, part).tobytes())
    except (ValueError, RecursionError):
        state = None
    kind = part.name.rpartition("__")[2]
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise refused(group, f"has a quant_state that is not that of {kind}")
    return state


def _shape_of(group: Group, state: dict[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not 0 < len(shape) <= 8 or any(type(n) is not int or n < 1 for n in shape):
        raise refused(group, "has a quant_state without a shape")
    return tuple(shape)


def _further(checkpoint: Checkpoint, group: Group, state: dict[str, Any], count: int) -> tuple[dict[str, Any], int]:
    """Return the facts of an absmax that is quantized itself, and how many of it share a scale."""
    from ckpt_cli.arrays.quantized import values_of

    scale, codebook = group.parts.get("global_scale"), group.parts.get("scale_codebook")
    inner, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if scale is None or codebook is None or type(inner) is not int or inner < 1 or not isinstance(offset, (int, float)):
        raise refused(group, "has an absmax of bytes, and nothing certain that says what they mean")
    if scale.dtype.name != "float32" or scale.numel != -(-count // inner) or codebook.numel != 256:
        raise unfitting(group, "scale", "global_scale", "scale_codebook")
    table = tuple(values_of(checkpoint, codebook).reshape(-1).tolist())
    return {"table": table, "inner": inner, "shift": float(offset)}, inner


def int8(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """LLM.int8(): `q * SCB / 127` of each row, the quotient as a second product, all in float32."""
    from ckpt_cli.arrays.quantized import values_of

    weight, scale, form = group.weight, group.parts["scale"], group.parts.get("state")
    shape = tuple(weight.shape or ())
    if len(shape) != 2 or scale.numel != shape[0]:
        raise unfitting(group, "scale")
    if form is not None and (form.numel != 1 or int(values_of(checkpoint, form).reshape(-1)[0]) != 0):
        raise refused(group, "is not stored row by row, as its weight_format says")
    scales = Scales(scale.dtype, shape[0], 1, (1, max(shape[1], 1)), after=_PER_127)
    formula = Formula(Codes("int8"), max(shape[0], 1), shape[1], FLOAT32, scales)
    stored = [Source(matrix(group, scale, 1)), Source(weight)]
    return made_layout(group, weight.name, shape, native_dtype(config), formula, stored)
