"""The layouts of all schemes whose weights can be made plain floats."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.quantization import Group
from ckpt_cli.ops.quantized_floats import is_of_torchao, mxfp4, nvfp4, torchao, with_scales
from ckpt_cli.ops.quantized_integers import awq, gptq, packed, said_bits
from ckpt_cli.ops.quantized_layout import LONGEST_ROW, Config, Layout, refused
from ckpt_cli.ops.quantized_states import four_bits, int8

_LAYOUTS: dict[str, Callable[[Checkpoint, Group, Config], Layout]] = {
    "fp8 with block scales": with_scales,
    "MXFP8": with_scales,
    "fp8 with scales": with_scales,
    "integers with scales": with_scales,
    "NVFP4": nvfp4,
    "MXFP4": mxfp4,
    "packed integers of compressed-tensors": packed,
    "GPTQ": gptq,
    "AWQ": awq,
    "bitsandbytes 4-bit": four_bits,
    "bitsandbytes int8": int8,
}
"""By the names of schemes in ops/quantization.py."""


def layout_of(checkpoint: Checkpoint, group: Group, config: Config) -> Layout:
    """Return the layout of a weight; raises RefusedError where it is not certain, or not of a scheme known here."""
    find = torchao if is_of_torchao(group) else _LAYOUTS.get(group.scheme)
    if (group.layout is None and find is not torchao) or find is None:
        if not group.parts:
            raise refused(group, f"seems to be {group.scheme}, and what belongs to it is not there")
        raise refused(group, f"is of {group.scheme}, which has no dequantizer here")
    layout = find(checkpoint, group, config)
    if layout.formula.columns > LONGEST_ROW:
        raise refused(group, f"has rows of {layout.formula.columns:,} elements; {LONGEST_ROW:,} are the most")
    return layout


def parameters_in(group: Group, config: Config) -> int | None:
    """Return how many numbers a quantized weight stands for, by shapes alone; None where these do not say it."""
    weight, numel = group.weight, group.weight.numel
    if is_of_torchao(group):
        return numel
    if group.scheme in ("fp8 with block scales", "MXFP8", "fp8 with scales", "bitsandbytes int8"):
        return numel
    if group.scheme in ("NVFP4", "MXFP4"):
        return numel if weight.dtype.name == "float4_e2m1fn" else 2 * numel
    if group.scheme == "integers with scales":
        return numel if weight.dtype.name == "int8" else None
    if group.scheme == "bitsandbytes 4-bit":
        return 2 * weight.nbytes
    bits = _bits(group, config)
    return numel * 8 * weight.dtype.itemsize // bits if bits else None


def _bits(group: Group, config: Config) -> int:
    """Return the bits of an integer within words; 0 where it is not certain."""
    if group.scheme == "AWQ":
        return 4
    if group.scheme == "GPTQ":
        zero, scale = group.parts.get("zero_point"), group.parts["scale"]
        shapes = (zero.shape or (0,))[-1] if zero is not None else 0, (scale.shape or (0,))[-1]
        return 32 * shapes[0] // shapes[1] if all(shapes) else 0
    if group.scheme == "packed integers of compressed-tensors":
        said = said_bits(config) if group.weight.dtype.name in ("int32", "uint32") else {4}
        return next(iter(said)) if len(said) == 1 and 0 < min(said) <= 8 else 0
    return 0
