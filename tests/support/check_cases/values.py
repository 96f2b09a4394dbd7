"""Configs and values with one fault each, and their twins without it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from builders.pt import archive, torch_records
from safetensors.torch import save_file

from check_cases.case import PT, case, patched, saved

# configs


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


def llama() -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": torch.randn(11, 8), "lm_head.weight": torch.randn(11, 8),
             "model.norm.weight": torch.randn(8)}  # fmt: skip
    for layer in range(2):
        at = f"model.layers.{layer}."
        state[at + "input_layernorm.weight"] = torch.randn(8)
        for name, rows in (("q", 8), ("k", 4), ("v", 4), ("o", 8)):
            state[f"{at}self_attn.{name}_proj.weight"] = torch.randn(rows, 8)
        for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
            state[f"{at}mlp.{name}_proj.weight"] = torch.randn(*shape)
    return state


def configured(folder: Path, state: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    save_file(llama() if state is None else state, folder / "model.safetensors", PT)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@case("config-shape")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, vocab_size=12 if fault else 11)


@case("config-layers")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, num_hidden_layers=3 if fault else 2)


@case("no-head")
def _(folder: Path, fault: bool) -> Path:
    state = llama()
    del state["lm_head.weight"]
    return configured(folder, state, tie_word_embeddings=not fault)


@case("untied")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, tie_word_embeddings=fault)


@case("config-dtype")
def _(folder: Path, fault: bool) -> Path:
    return configured(folder, torch_dtype="bfloat16" if fault else "float32")


@case("adapter-rank")
def _(folder: Path, fault: bool) -> Path:
    state = {"q.lora_A.weight": torch.randn(4, 8), "q.lora_B.weight": torch.randn(8, 4)}
    save_file(state, folder / "adapter_model.safetensors", PT)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8 if fault else 4}))
    return folder


@case("quantized-shape")
def _(folder: Path, fault: bool) -> Path:
    state = {"q.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "q.weight_scale": torch.ones(5 if fault else 4, 1)}
    save_file(state, folder / "model.safetensors", PT)
    return folder / "model.safetensors"


@case("no-scales")
def _(folder: Path, fault: bool) -> Path:
    state = {"q.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "q.weight_scale_inv": torch.ones(1, 1)}
    if fault:
        del state["q.weight_scale_inv"]
    save_file(state, folder / "model.safetensors", PT)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    return folder


@case("no-weights")
def _(folder: Path, fault: bool) -> Path:
    weight = torch.ones(4, 8, dtype=torch.bfloat16 if fault else torch.float8_e4m3fn)
    save_file({"q.weight": weight, "q.weight_scale_inv": torch.ones(1, 1)}, folder / "model.safetensors", PT)
    return folder


# values


@case("crc")
def _(folder: Path, fault: bool) -> Path:
    path = saved(folder, {"n": torch.arange(8)})
    old, new = struct.pack("<2q", 6, 7), struct.pack("<2q", 6, 8)
    return patched(path, lambda data: data.replace(old, new) if fault else data)


@case("no-crc", "no-tensors")
def _(folder: Path, fault: bool) -> Path:
    records = torch_records({"n": 1})
    if fault:
        records[-1].crc = 0
    (folder / "m.pt").write_bytes(archive(records))
    return folder / "m.pt"


@case("nan")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.tensor([1.0, float("nan") if fault else 2.0])})


@case("inf")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.tensor([1.0, float("-inf") if fault else 2.0])})


@case("zeros")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.zeros(3, 4) if fault else torch.randn(3, 4)})


@case("constant")
def _(folder: Path, fault: bool) -> Path:
    return saved(folder, {"x": torch.full((3, 4), 0.5) if fault else torch.randn(3, 4)})


@case("dead-lines")
def _(folder: Path, fault: bool) -> Path:
    weight = torch.randn(20, 30)
    if fault:
        weight[3] = 0
        weight[:, 7] = 0.5
    return saved(folder, {"x": weight})


@case("zero-tail")
def _(folder: Path, fault: bool) -> Path:
    state = {"a": torch.randn(10), "b": torch.randn(200_000), "c": torch.randn(200_000)}
    save_file(state, folder / "m.safetensors", PT)
    return patched(folder / "m.safetensors", lambda data: data[:-1_600_000] + bytes(1_600_000) if fault else data)


@case("unchecked")
def _(folder: Path, fault: bool) -> Path:
    """More bytes in views of one storage than anyone would go through."""
    wide = torch.randn(10_000)
    return saved(folder, {"v": wide.as_strided((5000, 5000), (1, 1)) if fault else wide})


def is_deep(code: str) -> bool:
    from ckpt_cli.ops.check.values import CHECKS

    return code in {each.code for each in CHECKS}
