"""`dequantize` of tensors that torch quantizes itself: its own `dequantize()`, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize.*deprecated", "ignore:.*quantization.*deprecated")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quantized() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = torch.randn(7, 5, 3)
    scales, zeros = torch.rand(5, dtype=torch.float64) + 0.01, torch.arange(5)
    return {
        "tensor": torch.quantize_per_tensor(values, 0.0373, 3, torch.qint8),
        "unsigned": torch.quantize_per_tensor(values, 0.0373, 130, torch.quint8),
        "wide": torch.quantize_per_tensor(values, 1e-6, 3, torch.qint32),
        "channels": torch.quantize_per_channel(values, scales, zeros, 1, torch.qint8),
        "rows": torch.quantize_per_channel(values.flatten(1), torch.rand(7) + 0.01, torch.zeros(7), 0, torch.qint8),
        "turned": torch.quantize_per_tensor(values[0], 0.1, 0, torch.qint8).t(),
        "one": torch.quantize_per_tensor(torch.tensor(0.5), 0.1, 0, torch.qint8),
    }


@pytest.mark.parametrize("new_zip", [True, False])
def test_the_values_are_those_of_torch_s_dequantize(ckpt: Ckpt, new_zip: bool) -> None:
    state = quantized()
    plain = torch.ones(2)
    torch.save({"model": {**state, "plain": plain}, "step": 3}, "in.pt", _use_new_zipfile_serialization=new_zip)
    answer = ckpt("dequantize", "in.pt", "-o", "out.pt")
    assert answer.code == 0, answer.err
    found = torch.load("out.pt")
    assert found["step"] == 3
    for name, tensor in state.items():
        assert found["model"][name].dtype == torch.float32
        assert found["model"][name].equal(tensor.dequantize()), name
    assert found["model"]["plain"].equal(plain)
    assert ckpt("dequantize", "in.pt", "-o", "half.pt", "--dtype", "bfloat16").code == 0
    half = torch.load("half.pt")["model"]
    assert all(half[name].equal(tensor.dequantize().bfloat16()) for name, tensor in state.items())


def test_it_can_go_to_safetensors(ckpt: Ckpt) -> None:
    from safetensors.torch import load_file

    state = quantized()
    torch.save(state, "in.pt")
    answer = ckpt("dequantize", "in.pt", "-o", "out.safetensors")
    assert answer.code == 0, answer.err
    assert all(load_file("out.safetensors")[name].equal(tensor.dequantize()) for name, tensor in state.items())


def test_the_weights_of_quantized_modules_are_refused(ckpt: Ckpt) -> None:
    model = torch.ao.nn.quantized.Linear(4, 2)
    torch.save({"fc." + name: value for name, value in model.state_dict().items()}, "in.pt")
    answer = ckpt("dequantize", "in.pt", "-o", "out.pt")
    assert answer.code == 2
    assert not Path("out.pt").exists()
