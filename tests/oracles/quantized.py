"""Write small quantized checkpoints with the tools that others write them with, and what these dequantize them to.

Run by `make oracles` in an environment of its own (requirements.txt beside this file): `python quantized.py FOLDER`
writes, for each scheme, `FOLDER/NAME/model.safetensors` (or `.pt`) with its `config.json`, and
`FOLDER/NAME/expected.safetensors` with the plain weights as the tool's own dequantizer gives them. Where that does not
run on a CPU, it is the formula in its source, said so at the function.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def written(folder: Path, state: State, config: dict, expected: State, dtype: str = "bfloat16") -> None:
    """Write one case."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")
    said = {"model_type": "oracle", "dtype": dtype, "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Return weights with a few large and small ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 0.05
    values[0, 0], values[-1, -1], values[0, 1] = 3.0, -2.5, 1e-6
    return values


# --- DeepSeek, by transformers ----------------------------------------------------------------------------------------


def deepseek(folder: Path) -> None:
    """fp8 with scales of blocks: dequantized by transformers' Fp8Dequantize; a partial last block by its formula.

    DeepSeek-V3's inference/kernel.py (`weight_dequant`) is a kernel for GPUs of the same formula: `x * s` in float32.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    whole, state, expected = Fp8Dequantize(None), {}, {}
    for number, (rows, columns, block) in enumerate(
        [(128, 256, (128, 128)), (130, 200, (128, 128)), (64, 64, (128, 128))]
    ):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        grid = -(-rows // block[0]), -(-columns // block[1])
        scales = torch.rand(grid, generator=torch.Generator().manual_seed(number)) * 0.01 + 1e-4
        wide = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        stored = (weights(rows, columns, number) / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        state[name], state[f"{name}_scale_inv"] = stored, scales
        expected[name] = (stored.to(torch.float32) * wide).to(torch.bfloat16)
        if not (rows % grid[0] or columns % grid[1] or (rows // grid[0] != block[0] and grid[0] > 1)):
            assert expected[name].equal(whole._dequantize_one(stored, scales, torch.bfloat16))
    state["model.norm.weight"] = expected["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    written(folder, state, config, expected)


def gpt_oss(folder: Path) -> None:
    """MXFP4 by transformers' convert_moe_packed_tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    state: State = {"model.layers.0.self_attn.sinks": torch.ones(4, dtype=torch.bfloat16)}
    expected = dict(state)
    for name, shape in (("gate_up_proj", (3, 10, 4, 16)), ("down_proj", (3, 7, 5, 16))):
        stem = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(100, 140, shape[:-1], dtype=torch.uint8, generator=generator)
        scales[0, 0, 0], scales[0, 0, 1] = 0, 254
        state[f"{stem}_blocks"], state[f"{stem}_scales"] = blocks, scales
        expected[stem] = convert_moe_packed_tensors(blocks, scales).contiguous()
        state[f"{stem}_bias"] = expected[f"{stem}_bias"] = torch.zeros(3, shape[1], dtype=torch.bfloat16)
    written(folder, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, expected)


# --- compressed-tensors -----------------------------------------------------------------------------------------------

_COMPRESSED = {
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 48]}),
    "int8-channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8-asymmetric": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "int4-group": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4-asymmetric": (
        "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
    "int3-group": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
}  # fmt: skip


def compressed(folder: Path, name: str) -> None:
    """Each format of compressed-tensors, by its own compressors both ways."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    kind, said = _COMPRESSED[name]
    args = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(kind)
    state: State = {}
    expected: State = {}
    for number, (rows, columns) in enumerate([(40, 96), (33, 64)]):
        module = f"model.layers.{number}.self_attn.q_proj"
        weight = weights(rows, columns, number).to(torch.bfloat16)
        inner = {"weight": weight, **_scales(weight, args, calculate_qparams)}
        packed = compressor.compress(inner, scheme)
        plain = compressor.decompress(packed, scheme)["weight"]
        state |= {f"{module}.{key}": value for key, value in packed.items() if value is not None}
        expected[f"{module}.weight"] = plain
        state[f"{module}.bias"] = expected[f"{module}.bias"] = torch.ones(rows, dtype=torch.bfloat16)
    config = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed",
              "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}}}  # fmt: skip
    written(folder, state, config, expected)


def _scales(weight: torch.Tensor, args, calculate) -> State:
    """Return scales and zero points as an observer of minima and maxima would."""
    rows, columns = weight.shape
    strategy = getattr(args.strategy, "value", args.strategy)
    if strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        parts = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    else:
        width = {"tensor": None, "channel": columns}.get(strategy, args.group_size)
        parts = weight.reshape(1, -1) if width is None else weight.unflatten(1, (-1, width))
    if strategy == "tensor":
        parts = parts[None]
    low, high_ = parts.amin(-1), parts.amax(-1)
    more = {}
    if strategy == "tensor_group":
        more["global_scale"] = (448.0 * 6.0 / weight.abs().max().to(torch.float32)).reshape(1)
    scale, zero = calculate(low, high_, args, **more)
    found = {"weight_scale": scale.reshape(-1) if strategy == "tensor" else scale}
    if not args.symmetric:
        found["weight_zero_point"] = zero
    if more:
        found["weight_global_scale"] = more["global_scale"]
    return found


def main(folder: Path) -> None:
    """Write all cases."""
    torch.manual_seed(0)
    deepseek(folder / "deepseek")
    gpt_oss(folder / "gpt-oss")
    for name in _COMPRESSED:
        compressed(folder / f"compressed-{name}", name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
