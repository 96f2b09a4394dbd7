"""The layouts of all schemes whose weights can be made plain floats."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_cli.model.checkpoint import Checkpoint
from ckpt_cli.ops.quantization import Group
from ckpt_cli.ops.quantized_floats import mxfp4, nvfp4, with_scales
from ckpt_cli.ops.quantized_integers import awq, gptq, packed
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
    find = _LAYOUTS.get(group.scheme)
    if group.layout is None or find is None:
        if not group.parts:
            raise refused(group, f"seems to be {group.scheme}, and what belongs to it is not there")
        raise refused(group, f"is of {group.scheme}, which has no dequantizer here")
    layout = find(checkpoint, group, config)
    if layout.formula.columns > LONGEST_ROW:
        raise refused(group, f"has rows of {layout.formula.columns:,} elements; {LONGEST_ROW:,} are the most")
    return layout
