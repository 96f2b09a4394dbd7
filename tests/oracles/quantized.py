"""Write small quantized checkpoints with the tools that others write them with, and what these dequantize them to.

Run by `make oracles` in an environment of its own (requirements.txt beside this file): `python quantized.py FOLDER`
writes, for each scheme, `FOLDER/NAME/model.safetensors` (or `.pt`) with its `config.json`, and
`FOLDER/NAME/expected.safetensors` with the plain weights as the tool's own dequantizer gives them. Where that does not
run on a CPU, it is the formula in its source, said so at the function.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # bitsandbytes would compile what is done once here

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


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------


def _module(path: str):
    """Return one module of an installed package that would import far more as a whole."""
    found = next(Path(folder, path) for folder in sys.path if Path(folder, path).is_file())
    spec = importlib.util.spec_from_file_location(found.stem, found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gptq(folder: Path, bits: int, *, ordered: bool, second: bool = False) -> None:
    """AutoGPTQ's own module packs; its forward of the identity gives the transposed weight, in float16.

    GPTQModel's second form of the file is the first one without 1 taken off the zero points: by that formula.
    """
    quant_linear = _module("auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    generator = torch.Generator().manual_seed(bits)
    state, expected = {}, {}
    for number, (rows, columns) in enumerate([(32, 64), (64, 96)]):
        module, size = f"model.layers.{number}.mlp.up_proj", 32
        count = columns // size
        scales = torch.rand(rows, count, generator=generator).half() * 0.01 + 0.001
        zeros = torch.randint(1, 1 << bits, (rows, count), generator=generator).float()
        order = torch.arange(columns) // size
        if ordered:
            order = order[torch.randperm(columns, generator=generator)]
        integers = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
        wide = (integers - zeros[:, order]) * scales[:, order].float()
        layer = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float16)
        layer.weight.data = wide.half()
        packed = quant_linear(bits, size, columns, rows, bias=False)
        packed.pack(layer, scales.clone(), zeros.clone(), order.to(torch.int32))
        state |= {f"{module}.{name}": value.clone() for name, value in packed.state_dict().items()}
        expected[f"{module}.weight"] = packed(torch.eye(columns, dtype=torch.float16)).t().contiguous()
        if second:
            one = sum(1 << at for at in range(0, 32, bits))
            stored = state[f"{module}.qzeros"].to(torch.int64) + one
            state[f"{module}.qzeros"] = (stored + 2**31).remainder(2**32).sub(2**31).to(torch.int32)
        if not ordered and number:
            del state[f"{module}.g_idx"]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": ordered, "sym": False}
    written(folder, state, config | ({"checkpoint_format": "gptq_v2"} if second else {}), expected, "float16")


def awq(folder: Path) -> None:
    """AWQ's GEMM form, packed by the order in its source and dequantized by its own `dequantize_gemm`."""
    utils = _module("awq/utils/packing_utils.py")
    generator = torch.Generator().manual_seed(4)
    state, expected = {}, {}
    for number, (rows, columns) in enumerate([(32, 64), (24, 96)]):
        module = f"model.layers.{number}.mlp.up_proj"
        scales = torch.rand(columns // 32, rows, generator=generator).half() * 0.01 + 0.001
        packed = []
        for height in (columns, columns // 32):
            integers = torch.randint(0, 16, (height, rows // 8, 8), generator=generator)
            words = sum(integers[:, :, place] << (4 * nibble) for nibble, place in enumerate(utils.AWQ_ORDER))
            packed.append((words + 2**31).remainder(2**32).sub(2**31).to(torch.int32))
        state |= {f"{module}.qweight": packed[0], f"{module}.qzeros": packed[1], f"{module}.scales": scales}
        expected[f"{module}.weight"] = utils.dequantize_gemm(*packed, scales, 4, 32).t().contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    written(folder, state, config, expected, "float16")


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def four_bits(folder: Path, kind: str, *, nested: bool, dtype: torch.dtype) -> None:
    """bitsandbytes both ways, on the CPU, by its kernel in torch.

    Its kernel in C++ (0.50.2) reads other scales where rows are not whole blocks, twice as far from what was quantized,
    and gives -0.0 for the fp4 code 8 that its map calls 0.0; apart from those it gives the same.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, quantize_4bit

    state, expected = {}, {}
    for number, (rows, columns) in enumerate([(40, 96), (20, 128), (7, 9), (130, 130)]):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        weight = weights(rows, columns, number).to(dtype)
        stored, said = quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
        state[name] = stored
        state |= {f"{name}.{key}": value for key, value in said.as_dict(packed=True).items()}
        absmax = dequantize_blockwise(said.absmax, said.state2) + said.offset if nested else said.absmax
        plain = _dequantize_4bit_compute(stored.reshape(-1), absmax, said.code, 64, weight.shape, dtype)
        if columns % 64 == 0:
            assert plain.equal(dequantize_4bit(stored, said))
        expected[name] = plain
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
              "bnb_4bit_use_double_quant": nested}  # fmt: skip
    written(folder, state, config, expected, str(dtype).removeprefix("torch."))


def int8(folder: Path) -> None:
    """LLM.int8() of bitsandbytes both ways, on the CPU."""
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight = weights(40, 96).half()
    stored, scale, _ = int8_vectorwise_quant(weight)
    module = "model.layers.0.mlp.up_proj"
    state = {f"{module}.weight": stored, f"{module}.SCB": scale,
             f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
    expected = {f"{module}.weight": int8_vectorwise_dequant(stored, scale).half()}
    written(folder, state, {"quant_method": "bitsandbytes", "load_in_8bit": True}, expected, "float16")


# --- ModelOpt, by formula ---------------------------------------------------------------------------------------------


def modelopt(folder: Path) -> None:
    """NVFP4 and fp8 of ModelOpt, by the formula in its torch/quantization/qtensor: it needs a GPU's packages.

    `e2m1 * (float32(weight_scale) * weight_scale_2)`, and `float32(weight) * weight_scale`.
    """
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])
    generator = torch.Generator().manual_seed(6)
    stored = torch.randint(0, 256, (20, 32), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(20, 4, generator=generator) * 400).to(torch.float8_e4m3fn)
    second = torch.tensor(0.00071)
    values = torch.stack([table[(stored & 15).long()], table[(stored >> 4).long()]], -1).reshape(20, 4, 16)
    plain = (values * (scale.float() * second)[..., None]).reshape(20, 64)
    fp8 = (weights(16, 24) / 0.01).to(torch.float8_e4m3fn)
    state = {"a.weight": stored, "a.weight_scale": scale, "a.weight_scale_2": second, "a.input_scale": torch.ones(()),
             "b.weight": fp8, "b.weight_scale": torch.tensor(0.0123), "b.input_scale": torch.ones(())}  # fmt: skip
    expected = {"a.weight": plain.bfloat16(), "b.weight": (fp8.float() * state["b.weight_scale"]).bfloat16()}
    written(folder, state, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, expected)


# --- torchao ----------------------------------------------------------------------------------------------------------


def torchao(folder: Path) -> None:
    """Tensors of torchao's classes in a file of torch.save, and what their own `dequantize()` gives."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    configs = {
        "int8": Int8WeightOnlyConfig(version=2),
        "float8": Float8WeightOnlyConfig(version=2),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), version=2),
    }
    state, expected = {}, {}
    for number, (name, config) in enumerate(configs.items()):
        layer = torch.nn.Sequential(torch.nn.Linear(64, 24, bias=False, dtype=torch.bfloat16))
        layer[0].weight.data = weights(24, 64, number).bfloat16()
        quantize_(layer, config)
        state[f"{name}.weight"] = layer[0].weight.detach()
        expected[f"{name}.weight"] = layer[0].weight.detach().dequantize()
    state["norm.weight"] = expected["norm.weight"] = torch.ones(3)
    written(folder, {}, {"quant_method": "torchao"}, expected)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "model.pt")


def main(folder: Path) -> None:
    """Write all cases."""
    torch.manual_seed(0)
    deepseek(folder / "deepseek")
    gpt_oss(folder / "gpt-oss")
    for name in _COMPRESSED:
        compressed(folder / f"compressed-{name}", name)
    for bits in (2, 3, 4, 8):
        gptq(folder / f"gptq-{bits}", bits, ordered=False)
    gptq(folder / "gptq-ordered", 4, ordered=True)
    gptq(folder / "gptq-v2", 4, ordered=False, second=True)
    awq(folder / "awq")
    four_bits(folder / "bnb-nf4", "nf4", nested=False, dtype=torch.bfloat16)
    four_bits(folder / "bnb-nf4-nested", "nf4", nested=True, dtype=torch.float16)
    four_bits(folder / "bnb-fp4", "fp4", nested=False, dtype=torch.float32)
    int8(folder / "bnb-int8")
    modelopt(folder / "modelopt")
    torchao(folder / "torchao")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
