"""Quantized weights whose parts lie: one line and exit 2 each, nothing written, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

SAMPLES = Path(__file__).parents[1] / "samples/quantized"

State = dict[str, torch.Tensor]
Lie = Callable[[State], Any]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stated(state: State, **said: Any) -> None:
    """Change what the quant_state of the first weight of bitsandbytes says."""
    name = next(name for name in state if "quant_state" in name)
    known = json.loads(bytes(state[name].tolist()))
    text = json.dumps({**known, **said}).encode()
    state[name] = torch.tensor(list(text), dtype=torch.uint8)


def put(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    """Return a lie that changes the first tensor whose name has an end."""

    def lie(state: State) -> None:
        name = next(name for name in state if name.endswith(end))
        state[name] = change(state[name]).contiguous()

    return lie


def bomb(state: State) -> None:
    name = next(name for name in state if "quant_state" in name)
    state[name] = torch.tensor(list(b"[" * 60_000), dtype=torch.uint8)


LIES: dict[str, tuple[str, Lie]] = {
    "scales of more rows": ("deepseek", put("_scale_inv", lambda scale: torch.ones(9, 9))),
    "scales of no rows": ("deepseek", put("_scale_inv", lambda scale: torch.ones(0, 2))),
    "scales of three dimensions": ("compressed-fp8-channel", put("_scale", lambda scale: scale[None, None])),
    "a group beyond all": ("gptq-ordered", put("g_idx", lambda order: order + 1)),
    "a negative group": ("gptq-ordered", put("g_idx", lambda order: order - 1)),
    "groups of too few columns": ("gptq-4", put("g_idx", lambda order: order[:-1])),
    "zero points of other groups": ("gptq-4", put("qzeros", lambda zeros: zeros[:1])),
    "no groups": ("gptq-4", put("scales", lambda scales: scales[:0])),
    "zero points of half the rows": ("awq", put("qzeros", lambda zeros: zeros[:, :2])),
    "a shape of more rows": ("compressed-int4-group", put("weight_shape", lambda shape: shape + 1)),
    "a shape of 2**62 columns": ("compressed-int4-group", put("weight_shape", lambda shape: shape * 2**56)),
    "a negative shape": ("compressed-int4-group", put("weight_shape", lambda shape: -shape)),
    "a shape of nine numbers": ("compressed-int4-group", put("weight_shape", lambda shape: shape.repeat(5))),
    "blocks of another width": ("gpt-oss", put("_blocks", lambda blocks: blocks[..., :8])),
    "a second scale of two numbers": ("compressed-nvfp4", put("_global_scale", lambda scale: scale.repeat(2))),
    "a state that is a bomb": ("bnb-nf4", bomb),
    "a state of another shape": ("bnb-nf4", lambda state: stated(state, shape=[2**40, 2**40])),
    "a state of a negative shape": ("bnb-nf4", lambda state: stated(state, shape=[-40, -96])),
    "a state without a shape": ("bnb-nf4", lambda state: stated(state, shape=None)),
    "blocks of no values": ("bnb-nf4", lambda state: stated(state, blocksize=0)),
    "blocks that are text": ("bnb-nf4", lambda state: stated(state, blocksize="64")),
    "another dtype": ("bnb-nf4", lambda state: stated(state, dtype="int8")),
    "nested blocks of no values": ("bnb-nf4-nested", lambda state: stated(state, nested_blocksize=0)),
    "a nested offset that is a list": ("bnb-nf4-nested", lambda state: stated(state, nested_offset=[1])),
    "a map of 15 values": ("bnb-nf4", put("quant_map", lambda values: values[:15])),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_part_that_lies_is_one_line(ckpt: Ckpt, lie: str) -> None:
    case, change = LIES[lie]
    state = load_file(SAMPLES / case / "model.safetensors")
    change(state)
    save_file(state, "model.safetensors")
    Path("config.json").write_text((SAMPLES / case / "config.json").read_text())
    answer = ckpt("dequantize", "model.safetensors", "-o", "out.safetensors")
    assert answer.code == 2, lie
    assert answer.err.startswith("ckpt: ")
    assert "Traceback" not in answer.err
    assert not Path("out.safetensors").exists()
    assert ckpt("info", "model.safetensors").code == 0
    assert ckpt("check", "model.safetensors").code in (0, 1)


@pytest.mark.parametrize(
    "config",
    ['{"quantization_config": {"bits": 8}}', '{"quantization_config": {"checkpoint_format": "marlin"}}', "{" * 100_000,
     '{"quantization_config": {"quant_method": "awq"}}', '{"quantization_config": {}}', "[]"],
)  # fmt: skip
def test_a_config_that_says_something_else_or_nothing_is_refused(ckpt: Ckpt, config: str) -> None:
    Path("model.safetensors").write_bytes((SAMPLES / "gptq-4/model.safetensors").read_bytes())
    Path("config.json").write_text(config)
    answer = ckpt("dequantize", "model.safetensors", "-o", "out")
    assert answer.code == 2
    assert not Path("out").exists()


def test_a_name_that_is_taken_is_refused(ckpt: Ckpt) -> None:
    state = load_file(SAMPLES / "gptq-4/model.safetensors")
    save_file({**state, "model.layers.0.mlp.up_proj.weight": torch.ones(1)}, "model.safetensors")
    Path("config.json").write_text((SAMPLES / "gptq-4/config.json").read_text())
    answer = ckpt("dequantize", "model.safetensors", "-o", "out.safetensors")
    assert answer.code == 2
    assert "which is there already" in answer.err


def test_a_sum_that_float16_cannot_hold_is_refused(ckpt: Ckpt) -> None:
    weight = torch.full((4, 4), 448.0).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.weight_scale": torch.tensor([1e6])}, "in.safetensors")
    answer = ckpt("dequantize", "in.safetensors", "-o", "out.safetensors", "--dtype", "float16")
    assert answer.code == 2
    assert "too large for the new dtype" in answer.err
    assert not Path("out.safetensors").exists()
