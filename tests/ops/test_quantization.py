"""Scaled and packed weights: casts refuse them with what they are, and ordinary models are none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import pt
from builders.pickles import Ops, call, named, tensor
from conftest import Ckpt
from contract import quietly
from safetensors.torch import load_file, save_file

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.quantization import Group, quantized_groups

State = dict[str, torch.Tensor]


def fp8(*shape: int) -> torch.Tensor:
    """Stored numbers of a weight."""
    return torch.randn(*shape).to(torch.float8_e4m3fn)


def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Packed numbers of any kind."""
    return torch.randint(0, 100, shape).to(dtype)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scales."""
    return torch.rand(shape).to(dtype)


E4M3, E8M0, HALF = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float16
U8, I8, I16, I32, I64 = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64

SCHEMES: dict[str, tuple[str, str, State]] = {
    "DeepSeek-V3": ("fp8 with block scales", "l.weight",
                    {"l.weight": fp8(256, 130), "l.weight_scale_inv": floats(2, 2)}),
    "experts of fp8": ("fp8 with block scales", "l.experts.gate_up_proj",
                       {"l.experts.gate_up_proj": fp8(2, 9, 9), "l.experts.gate_up_proj_scale_inv": floats(2, 1, 1)}),
    "DeepSeek's own names": ("fp8 with scales", "l.weight", {"l.weight": fp8(8, 8), "l.scale": floats(1, 1)}),
    "fp8 by tensor": ("fp8 with scales", "l.weight",
                      {"l.weight": fp8(8, 8), "l.weight_scale": floats(), "l.input_scale": floats()}),
    "fp8 by channel": ("fp8 with scales", "l.weight",
                       {"l.weight": fp8(8, 8), "l.weight_scale": floats(8, 1, dtype=torch.bfloat16)}),
    "ComfyUI": ("fp8 with scales", "l.weight",
                {"l.weight": fp8(8, 8), "l.scale_weight": floats(), "l.scale_input": floats()}),
    "Mistral": ("fp8 with scales", "l.weight",
                {"l.weight": fp8(8, 8), "l.qscale_weight": floats(), "l.qscale_act": floats()}),
    "MXFP8": ("MXFP8", "l.weight", {"l.weight": fp8(8, 64), "l.weight_scale": integers(U8, 8, 2)}),
    "MXFP8 of its own dtype": ("MXFP8", "l.weight", {"l.weight": fp8(8, 64), "l.weight_scale": floats(8, 2).to(E8M0)}),
    "ModelOpt's NVFP4": ("NVFP4", "l.weight", {"l.weight": integers(U8, 8, 16), "l.weight_scale": fp8(8, 2),
                                               "l.weight_scale_2": floats(), "l.input_scale": floats()}),
    "NVFP4 of compressed-tensors": ("NVFP4", "l.weight_packed", {
        "l.weight_packed": integers(U8, 8, 16), "l.weight_scale": fp8(8, 2), "l.weight_global_scale": floats(1)}),
    "gpt-oss": ("MXFP4", "m.down_proj_blocks",
                {"m.down_proj_blocks": integers(U8, 2, 8, 3, 16), "m.down_proj_scales": integers(U8, 2, 8, 3)}),
    "int8 of compressed-tensors": ("integers with scales", "l.weight",
                                   {"l.weight": integers(I8, 8, 8), "l.weight_scale": floats(8, 1)}),
    "int4 of compressed-tensors": ("packed integers of compressed-tensors", "l.weight_packed", {
        "l.weight_packed": integers(I32, 8, 2), "l.weight_scale": floats(8, 1, dtype=torch.bfloat16),
        "l.weight_zero_point": integers(I32, 1, 1), "l.weight_shape": torch.tensor([8, 16])}),
    "GPTQ": ("GPTQ", "l.qweight", {"l.qweight": integers(I32, 8, 16), "l.qzeros": integers(I32, 2, 2),
                                   "l.scales": floats(2, 16, dtype=HALF), "l.g_idx": integers(I32, 64)}),
    "AWQ": ("AWQ", "l.qweight", {"l.qweight": integers(I32, 64, 2), "l.qzeros": integers(I32, 2, 2),
                                 "l.scales": floats(2, 16, dtype=HALF)}),
    "bitsandbytes nf4": ("bitsandbytes 4-bit", "l.weight", {
        "l.weight": integers(U8, 32, 1), "l.weight.absmax": integers(U8, 1), "l.weight.quant_map": floats(16),
        "l.weight.nested_absmax": floats(1), "l.weight.nested_quant_map": floats(256),
        "l.weight.quant_state.bitsandbytes__nf4": integers(U8, 90)}),
    "bitsandbytes stored as bfloat16": ("bitsandbytes 4-bit", "l.weight", {
        "l.weight": floats(32, 1, dtype=torch.bfloat16), "l.weight.absmax": floats(1), "l.weight.quant_map": floats(16),
        "l.weight.quant_state.bitsandbytes__fp4": integers(U8, 90)}),
    "bitsandbytes int8": ("bitsandbytes int8", "l.weight",
                          {"l.weight": integers(I8, 8, 8), "l.SCB": floats(8), "l.weight_format": integers(U8)}),
    "bitsandbytes' Adam": ("bitsandbytes 8-bit optimizer state", "state.0.state1",
                           {"state.0.state1": integers(U8, 256), "state.0.absmax1": floats(1),
                            "state.0.qmap1": floats(256)}),
    "HQQ": ("HQQ", "l.W_q", {"l.W_q": integers(U8, 32, 4), "l.scale": floats(64, 1, dtype=HALF),
                             "l.zero": floats(64, 1, dtype=HALF)}),
    "HQQ in a pickle": ("HQQ", "l.W_q", {"l.W_q": integers(U8, 32, 4), "l.meta.scale": floats(64, 1, dtype=HALF),
                                         "l.meta.zero": floats(64, 1, dtype=HALF)}),
    "MLX": ("MLX's packed integers", "l.weight", {
        "l.weight": integers(torch.uint32, 8, 2), "l.scales": floats(8, 1, dtype=HALF),
        "l.biases": floats(8, 1, dtype=HALF)}),
    "gpt-fast": ("integers with scales", "l.weight",
                 {"l.weight": integers(I32, 1, 1, 32, 4), "l.scales_and_zeros": floats(1, 8, 2, dtype=torch.bfloat16)}),
    "quanto": ("quanto", "l.weight._data", {"l.weight._data": integers(I8, 8, 8), "l.weight._scale": floats(8, 1)}),
    "EXL2": ("EXL2", "l.q_weight", {"l.q_weight": integers(I32, 8, 8), "l.q_scale": integers(I32, 2, 1),
                                    "l.q_scale_max": floats(2, dtype=HALF), "l.q_groups": integers(I16, 4)}),
    "EXL3": ("EXL3", "l.trellis", {"l.trellis": integers(I16, 1, 1, 64), "l.suh": floats(16, dtype=HALF),
                                   "l.svh": floats(16, dtype=HALF)}),
    "AQLM": ("AQLM", "l.codes", {"l.codes": integers(I8, 8, 1, 2), "l.codebooks": floats(2, 16, 1, 8, dtype=HALF),
                                 "l.scales": floats(8, 1, 1, 1, dtype=HALF)}),
    "torchao": ("torchao", "l._weight_qdata", {"l._weight_qdata": integers(I8, 8, 8), "l._weight_scale": floats(8, 1)}),
}  # fmt: skip
"""The name of each scheme, the stored numbers, and everything that belongs to them, as its library writes it."""

BESIDE: State = {"norm.weight": torch.ones(8), "norm.scale": torch.ones(8), "logit_scale": torch.ones(())}
"""What no scheme has a part in."""

PARAMETRIZED = pytest.mark.parametrize(("scheme", "weight", "state"), SCHEMES.values(), ids=SCHEMES.keys())


def groups(path: Path) -> list[Group]:
    """What is recognised in a file."""
    checkpoint = open_checkpoint(str(path))
    try:
        return quantized_groups(checkpoint.path, checkpoint.tensors)
    finally:
        checkpoint.close()


@pytest.fixture(params=["m.pt", "m.safetensors"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a state is to be saved."""
    found: Path = tmp_path / request.param
    return found


def save(state: State, path: Path) -> Path:
    """Save a state as the suffix says."""
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def load(path: Path) -> State:
    """A state that was saved."""
    state: State = torch.load(path) if path.suffix == ".pt" else load_file(path)
    return state


def same(a: State, b: State) -> bool:
    """Whether two states have the same bytes under the same names."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].reshape(-1).view(U8), b[name].reshape(-1).view(U8))
        for name in a
    )


@PARAMETRIZED
def test_every_part_of_a_weight_is_known(path: Path, scheme: str, weight: str, state: State) -> None:
    (group,) = groups(save({**BESIDE, **state}, path))
    assert (group.scheme, group.weight.name) == (scheme, weight)
    assert {tensor.name for tensor in group.tensors} == set(state)


@PARAMETRIZED
def test_casts_of_scaled_and_packed_weights_are_refused_with_what_they_are(
    path: Path, ckpt: Ckpt, scheme: str, weight: str, state: State
) -> None:
    save({**BESIDE, **state}, path)
    before = path.read_bytes()
    one_of_it = [name for name in state if state[name].is_floating_point()][:1]
    for arguments in (["cast", path, "float64"], ["cast", path, "float64", "-n"], ["cast", path, "float64", *one_of_it],
                      ["convert", path, path.with_name("o.pt"), "--dtype", "float64"],
                      ["convert", path, path.with_name("o.safetensors"), "--dtype", "float64"]):  # fmt: skip
        if arguments[-1] == "float64" or one_of_it:
            done = ckpt(*arguments)
            assert done.code == 2, arguments
            assert f"{scheme}: 1, such as '{weight}' with '" in done.err
            assert "hint: --raw" in done.err
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


@PARAMETRIZED
def test_raw_casts_the_stored_numbers(path: Path, ckpt: Ckpt, scheme: str, weight: str, state: State) -> None:
    whole = {**BESIDE, **state}
    save(whole, path)
    wanted = {name: value.double() if value.is_floating_point() else value for name, value in whole.items()}
    output = path.with_name(f"o{path.suffix}")
    assert ckpt("cast", path, "float64", "--raw", "-o", output).code == 0
    assert same(load(output), wanted)
    output.unlink()
    assert ckpt("convert", path, output, "--dtype", "float64", "--raw").code == 0
    assert same(load(output), wanted)


@PARAMETRIZED
def test_other_tensors_are_cast_by_name(path: Path, ckpt: Ckpt, scheme: str, weight: str, state: State) -> None:
    whole = {**BESIDE, **state}
    save(whole, path)
    assert ckpt("cast", path, "float64", "norm", "logit_scale").code == 0
    assert same(load(path), {**whole, **{name: value.double() for name, value in BESIDE.items()}})


@PARAMETRIZED
def test_a_conversion_carries_them_as_they_are_stored(
    path: Path, ckpt: Ckpt, scheme: str, weight: str, state: State
) -> None:
    save({**BESIDE, **state}, path)
    for name in ("o.pt", "o.safetensors"):
        assert ckpt("convert", path, path.with_name(name)).code == 0
        assert same(load(path.with_name(name)), {**BESIDE, **state})


ORDINARY: dict[str, State] = {
    "norms": {"norm.weight": floats(8), "norm.scale": floats(8), "norm.bias": floats(8), "layer_scale": floats(8)},
    "a learned scale": {"l.weight": floats(8, 8), "l.weight_scale": floats(8, 1), "l.scales": floats(8)},
    "fp8 without scales": {"l.weight": fp8(8, 8), "l.bias": floats(8), "other.weight_scale": floats(1)},
    "quantization aware training": {"l.weight": floats(8, 8), "l.weight_fake_quant.scale": floats(1),
                                    "l.weight_fake_quant.zero_point": integers(I32, 1), "l.input_scale": floats()},
    "counters": {"bn.weight": floats(8), "bn.num_batches_tracked": integers(I64), "position_ids": integers(I64, 1, 8),
                 "table": integers(U8, 4, 4), "mask": integers(U8, 4), "index.weight": integers(I32, 4)},
    "blocks and scales": {"blocks": integers(U8, 4, 4), "scales": integers(U8, 4), "x_blocks": floats(2, 16),
                          "x_scales": floats(2), "absmax": floats(1), "l.absmax": floats(1), "codes": integers(I8, 2)},
    "SVH": {"svh": floats(8), "qzeros": floats(8), "SCB": floats(8), "zero": floats(1), "meta.scale": floats(1)},
}  # fmt: skip


@pytest.mark.parametrize("state", ORDINARY.values(), ids=ORDINARY.keys())
def test_ordinary_models_are_cast(path: Path, ckpt: Ckpt, state: State) -> None:
    assert groups(save(state, path)) == []
    assert ckpt("cast", path, "float64").code == 0
    wanted = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    assert same(load(path), wanted)


# --- a config beside it ----------------------------------------------------------------------------------------------


def config(folder: Path, **what: Any) -> None:
    """Write a config."""
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **what}))


def test_a_config_tells_of_weights_whose_scales_are_in_another_file(tmp_path: Path, ckpt: Ckpt) -> None:
    path = save({"l.weight": fp8(8, 8), "norm.weight": floats(8)}, tmp_path / "model-00001-of-00002.safetensors")
    assert ckpt("cast", path, "bfloat16", "-n").code == 0
    config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    done = ckpt("cast", path, "bfloat16", "-n")
    assert (done.code, "fp8 (as its config says): 1, such as 'l.weight'" in done.err) == (2, True)
    assert ckpt("cast", path, "bfloat16", "norm", "-n").code == 0


def test_scales_whose_weights_are_in_another_file_are_known(tmp_path: Path, ckpt: Ckpt) -> None:
    path = save({"l.weight_scale_inv": floats(2, 2), "l.weight_scale": floats(2)}, tmp_path / "m.safetensors")
    assert [group.weight.name for group in groups(path)] == ["l.weight_scale_inv"]
    config(tmp_path, quantization_config={"quant_method": "modelopt"})
    assert len(groups(path)) == 2


def test_a_config_makes_no_ordinary_tensor_a_scaled_one(tmp_path: Path, ckpt: Ckpt) -> None:
    path = save({**BESIDE, "position_ids": integers(I32, 2, 8)}, tmp_path / "adapter_model.safetensors")
    for said in ({"quant_method": "bitsandbytes"}, {}, None, 3):
        config(tmp_path, quantization_config=said)
        assert groups(path) == []


# --- tensors that hold it themselves ---------------------------------------------------------------------------------


def test_what_torch_quantizes_stays_and_is_named(tmp_path: Path, ckpt: Ckpt) -> None:
    with quietly():
        quantized = torch.quantize_per_channel(
            floats(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
        )
        torch.save({"q": quantized, "w": floats(2)}, tmp_path / "m.pt")
        assert json.loads(ckpt("cast", tmp_path / "m.pt", "float16", "--json").out)["left"] == ["q"]
        assert torch.equal(torch.load(tmp_path / "m.pt")["q"].dequantize(), quantized.dequantize())


def test_the_scale_beside_what_torch_packs_is_not_cast_alone(tmp_path: Path, ckpt: Ckpt) -> None:
    with quietly():
        packed = torch.quantize_per_tensor(floats(2, 3), 0.1, 0, torch.qint8)
        state = {
            "fc.scale": floats(),
            "fc.zero_point": integers(I64),
            "fc._packed_params._packed_params": (packed, None),
        }
        torch.save(state, tmp_path / "m.pt")
    done = ckpt("cast", tmp_path / "m.pt", "float16")
    assert (done.code, "torch's quantized modules: 1" in done.err) == (2, True)


def wrapper(kind: str, parts: dict[str, Ops]) -> Ops:
    """A tensor subclass of two by four without data of its own, as torch pickles it."""
    func, layout = (
        named("torch._utils._rebuild_wrapper_subclass"),
        call("torch.serialization._get_layout", "torch.strided"),
    )
    args = (named(kind), named("torch.float32"), (2, 4), (4, 1), 0, layout, call("torch.device", "cpu"), False)
    return call("torch._tensor._rebuild_from_type_v2", func, named(kind), args, parts)


@pytest.mark.parametrize("kind", ["torchao.quantization.Int4Tensor", "own.Packed"])
def test_tensors_of_classes_that_hold_packed_numbers_are_refused(tmp_path: Path, ckpt: Ckpt, kind: str) -> None:
    parts = {"qdata": tensor("0", (2, 2), "Char"), "scale": tensor("1", (2,))}
    path = pt.write(
        tmp_path / "m.pt",
        {"w": wrapper(kind, parts), "b": tensor("2", (2,))},
        {"0": bytes(4), "1": bytes(8), "2": bytes(8)},
    )
    done = ckpt("cast", path, "float16")
    assert (done.code, f"{kind.split('.')[0]}'s {kind.split('.')[-1]}: 1, such as 'w'" in done.err) == (2, True)
    told = json.loads(ckpt("cast", path, "float16", "--raw", "--json").out)
    assert (told["changed"], told["left"]) == (["b"], ["w"])


def test_tensors_of_other_classes_are_left_and_named(tmp_path: Path, ckpt: Ckpt) -> None:
    parts = {"inner": tensor("0", (2, 4))}
    path = pt.write(
        tmp_path / "m.pt", {"w": wrapper("own.Wrapped", parts), "b": tensor("1", (2,))}, {"0": bytes(32), "1": bytes(8)}
    )
    told = json.loads(ckpt("cast", path, "float16", "--json").out)
    assert (told["changed"], told["left"]) == (["b"], ["w"])
