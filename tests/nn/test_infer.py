"""`ckpt tree` of state_dicts: layers inferred from names and shapes, optimizers that make none."""

from __future__ import annotations

import cProfile
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file
from torch import nn
from trees import Network, graph_tree, text_of

KINDS: list[tuple[nn.Module, str]] = [
    (nn.Linear(4, 8), "Linear(in_features=4, out_features=8, bias=True)"),
    (nn.Linear(4, 8, bias=False), "Linear(in_features=4, out_features=8, bias=False)"),
    (nn.Conv1d(3, 4, 5), "Conv1d(3, 4, kernel_size=(5,), stride=?)"),
    (nn.Conv2d(3, 16, (3, 5), bias=False), "Conv2d(3, 16, kernel_size=(3, 5), stride=?, bias=False)"),
    (nn.Conv3d(3, 4, 2), "Conv3d(3, 4, kernel_size=(2, 2, 2), stride=?)"),
    (nn.Conv2d(4, 4, 3, groups=4), "Conv2d(1, 4, kernel_size=(3, 3), stride=?, groups=?)"),
    (nn.ConvTranspose2d(3, 16, 3), "ConvTranspose2d(3, 16, kernel_size=(3, 3), stride=?)"),
    (nn.BatchNorm2d(6), "BatchNorm(6)"),
    (nn.BatchNorm1d(6, affine=False), "BatchNorm(6)"),
    (nn.LayerNorm(6), "LayerNorm((6,))"),
    (nn.RMSNorm(6), "RMSNorm((6,))"),
    (nn.PReLU(), "PReLU(num_parameters=1)"),
    (nn.LSTM(2, 3, 2, bidirectional=True), "LSTM(2, 3, num_layers=2, bidirectional=True)"),
    (nn.LSTM(2, 6, proj_size=3), "LSTM(2, 6, proj_size=3)"),
    (nn.GRU(2, 3, bias=False), "GRU(2, 3, bias=False)"),
    (nn.RNN(2, 3), "RNN(2, 3)"),
    (nn.LSTMCell(2, 3), "LSTMCell(2, 3)"),
    (nn.GRUCell(2, 3, bias=False), "GRUCell(2, 3, bias=False)"),
]


@pytest.mark.parametrize(("layer", "text"), KINDS, ids=[text for _, text in KINDS])
def test_a_layer_is_inferred_from_the_names_and_shapes_of_its_tensors(tree: Any, layer: nn.Module, text: str) -> None:
    state = nn.ModuleDict({"layer": layer}).state_dict()
    assert tree(state) == f"Module(  # inferred from names and shapes\n  (layer): {text}\n)\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wte", "Embedding"),
        ("embed_tokens", "Embedding"),
        ("token_embd", "Embedding"),
        ("pos_emb", "Embedding"),
        ("lm_head", "Linear"),
        ("embed_out", "Linear"),
        ("time_emb_proj", "Linear"),
        ("stoken", "Linear"),
    ],
)
def test_a_table_of_vectors_is_told_from_a_linear_layer_by_its_name(tree: Any, name: str, kind: str) -> None:
    assert f"({name}): {kind}(" in tree({f"{name}.weight": torch.ones(5, 4)})


def test_what_makes_no_layer_is_listed(tree: Any) -> None:
    out = tree(
        {"cls": torch.ones(1, 2), "a.gate": torch.ones(3), "b.weight": torch.ones(2, 2), "b.scale": torch.ones(2)}
    )
    assert out == (
        "Module(  # inferred from names and shapes\n"
        "  cls: float32[1,2]\n"
        "  (a): Module(gate: float32[3])\n"
        "  (b): Linear(in_features=2, out_features=2, bias=False, scale: float32[2])\n"
        ")\n"
    )


def test_low_rank_transposed_packed_and_quantized_layers_are_told(tree: Any) -> None:
    out = tree(
        {
            "q.base_layer.weight": torch.ones(6, 4),
            "q.lora_A.default.weight": torch.ones(2, 4),
            "q.lora_B.default.weight": torch.ones(6, 2),
            "c_attn.weight": torch.ones(4, 12),
            "c_attn.bias": torch.ones(12),
            "nf4.weight": torch.ones(32, 1, dtype=torch.uint8),
            "gptq.qweight": torch.ones(1, 4, dtype=torch.int32),
            "gptq.qzeros": torch.ones(1, 1, dtype=torch.int32),
            "gptq.scales": torch.ones(1, 4),
        }
    )
    assert "(q): LoRA(\n    in_features=4, out_features=6, r=2\n    (base_layer): Linear(in_features=4" in out
    assert "(c_attn): Conv1D(nf=12, nx=4)" in out
    assert "(nf4): Module(weight: uint8[32,1])" in out
    assert "(gptq): QuantLinear(qweight: int32[1,4], qzeros: int32[1,1], scales: float32[1,4])" in out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_packed_weight_of_a_quantized_layer_tells_its_shape(tree: Any) -> None:
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 4)))
    assert "(0): QuantizedLinear(in_features=3, out_features=4)" in tree(net.state_dict())
    assert "(0): DynamicQuantizedLinear(in_features=3, out_features=4)" in tree(net)


def test_an_attention_layer_and_equal_blocks_are_inferred(tree: Any) -> None:
    block = (
        "(attn): MultiheadAttention(\n"
        "        (out_proj): NonDynamicallyQuantizableLinear(in_features=8, out_features=8, bias=True)\n"
        "      )\n"
        "      (norm): LayerNorm((8,))\n"
        "      (mlp): Sequential(\n"
        "        (0): Linear(in_features=8, out_features=16, bias=True)\n"
        "        (2): Linear(in_features=16, out_features=8, bias=True)\n"
    )
    state = Network().state_dict()
    assert f"(h): ModuleList(\n    (0-2): 3 x Module(\n      {block}" in tree(state)
    full = tree(state, "--full")
    assert full.count(block) == 3
    assert "(2): Module(" in full


def test_blocks_that_differ_do_not_collapse(tree: Any) -> None:
    shapes = {0: 2, 1: 2, 2: 3, 4: 3}
    out = tree({f"m.{number}.fc.weight": torch.ones(size, 2) for number, size in shapes.items()})
    assert [line.split(":")[0].strip() for line in out.splitlines() if " x " in line] == ["(0-1)"]
    assert "(2): Module(" in out
    assert "(4): Module(" in out


def test_equal_layers_of_a_sequential_stay_apart_as_torch_shows_them(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    assert tree(net) == f"{net!r}\n"
    assert tree(net.state_dict(), "--bare") == f"{net!r}\n"


def test_the_numbers_of_a_safetensors_file_come_in_their_order(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({f"net.{number}.weight": torch.ones(number + 1, 2) for number in range(12)}, tmp_path / "x.safetensors")
    rows = [line.split("\t")[0] for line in ckpt("tree", "-f", "tsv", tmp_path / "x.safetensors").lines]
    assert rows[2:] == [f"net.{number}" for number in range(12)]


# --- training checkpoints ---------------------------------------------------------------------------------------------


def test_an_optimizers_tensors_are_counted_and_make_no_layers(tree: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 8))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    out = tree({"model": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 1})
    assert out == (
        "dict(\n"
        "  (model): Sequential(  # inferred from names and shapes\n"
        "    (0): Linear(in_features=4, out_features=8, bias=True)\n"
        "  )\n"
        "  (optimizer_states): list(\n"
        "    (0): dict(6 tensors)\n"
        "  )\n"
        ")\n"
    )


def test_where_only_names_tell_an_optimizer_is_known_by_its_name(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({"model.0.weight": torch.ones(2, 2), "optimizer.state.0.exp_avg": torch.ones(2, 2)}, tmp_path / "x")
    out = ckpt("tree", tmp_path / "x").out
    assert "(optimizer): dict(1 tensor)\n" in out
    assert "(0): Linear(in_features=2, out_features=2, bias=False)" in out


def test_a_tensor_beside_state_dicts_does_not_make_a_module_of_them(tree: Any) -> None:
    state = {"0.weight": torch.ones(2, 2)}
    out = tree({"model": state, "ema": {"0.weight": torch.zeros(2, 2)}, "rng": torch.ones(3, dtype=torch.uint8)})
    assert out.startswith("dict(\n  rng: uint8[3]\n  (model): Sequential(  # inferred")
    assert tree({"model": nn.Tanh(), "rng": torch.ones(3)}) == "dict(\n  rng: float32[3]\n  (model): Tanh()\n)\n"
    nested = tree({"a": {"model": state, "args": {"b": {}}}, "step": torch.ones(())})
    assert nested.startswith("dict(\n  step: float32[]\n  (a): dict(\n    (model): Sequential(  # inferred")


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (torch.ones(2), "Module('': float32[2])"),
        ([torch.ones(2)], "list(0: float32[2])"),
        ({}, "dict()"),
        (3, "dict()"),
    ],
)
def test_what_holds_no_modules_is_told_too(tree: Any, saved: object, text: str) -> None:
    assert tree(saved).startswith(text)


def _calls_to_find_layers(blocks: int) -> int:
    """How many functions are called to find the layers of a mixture of experts with so many blocks."""
    state = {
        f"layers.{a}.experts.{b}.w{c}.weight": torch.ones(1, 2)
        for a in range(blocks)
        for b in range(64)
        for c in range(3)
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    with cProfile.Profile() as profile:
        found = graph_tree(data)
        assert len(text_of(found).splitlines()) < 20
    return sum(entry.callcount for entry in profile.getstats())


def test_the_work_to_find_layers_grows_with_the_number_of_tensors() -> None:
    few, many = _calls_to_find_layers(10), _calls_to_find_layers(20)
    assert many < 2.1 * few
    assert many < 400 * 3840
