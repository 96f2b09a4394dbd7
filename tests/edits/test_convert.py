"""Conversions: every container that can be read into every format that can be written, by the reference readers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import FORMATS, Format, State
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_readers import TARGETS, assert_same_state
from safetensors import safe_open
from safetensors.torch import save_model
from torch import nn

NOT_IN_NPZ = ("0.bias",)
"""bfloat16."""


def selection(source: Format, target: str) -> list[str]:
    """The options that take the sample out of what is around it."""
    if source.variant == "lightning":
        return ["--select", "state_dict"]
    return ["--tensors-only"] if source.variant == "module" and target == "npz" else []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", FORMATS, ids=lambda source: source.label)
def test_every_container_becomes_every_format(tmp_path: Path, ckpt: Ckpt, source: Format, target: str) -> None:
    path = tmp_path / f"in{source.suffix}"
    wanted = source.sample()
    source.put(path)
    name, options, read = TARGETS[target]
    answer = ckpt("convert", path, tmp_path / name, *options, *selection(source, target))
    assert answer.code == 0, answer.err
    if target == "npz":
        wanted = {name: tensor for name, tensor in wanted.items() if name not in NOT_IN_NPZ}
    found = read(tmp_path / name, wanted)
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].contiguous().view(-1), tensor.contiguous().view(-1)), key
        assert found[key].shape == tensor.shape, key
    tied = source.keeps_ties and target in ("pt", "safetensors", "hf", "hf-bin")
    answered = ckpt("ties", tmp_path / name, "0.weight", "2.weight") if target != "dcp" else None
    assert answered is None or answered.code == (0 if tied else 1)
    if tied:
        assert found["0.weight"].data_ptr() == found["2.weight"].data_ptr()


def state_of_all_kinds() -> State:
    """Everything that a state_dict has and safetensors can hold, ties in between."""
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 3), torch.randn(2)
    return {
        "scale": torch.tensor(1.5),
        "b": bias,
        "lm_head.weight": weight,
        "half": torch.randn(3).half(),
        "a.bias": bias,
        "columns": torch.randn(3, 4).t(),
        "embed.weight": weight,
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "wide": torch.tensor([1, 65535], dtype=torch.uint16),
        "none": torch.empty(0, 2),
        "pairs": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }


@pytest.mark.parametrize("through", ["x.safetensors", "set", "bins"])
def test_there_and_back_keeps_order_dtypes_and_ties(tmp_path: Path, ckpt: Ckpt, through: str) -> None:
    path, middle, back = tmp_path / "a.pt", tmp_path / through, tmp_path / "b.pt"
    torch.save(state_of_all_kinds(), path)
    options = {"set": ["--max-shard", "1MB"], "bins": ["--to", "hf-bin"]}.get(through, [])
    assert ckpt("convert", path, middle, *options).code == 0
    answer = ckpt("convert", middle, back)
    assert answer.code == 0, answer.err
    assert_same_state(torch.load(back), state_of_all_kinds())


_NAMES = st.text("abcXYZ.01_é", min_size=1, max_size=8)


@given(st.lists(st.tuples(_NAMES, st.integers(0, 3)), min_size=1, max_size=8, unique_by=lambda pair: pair[0]))
@settings(max_examples=25, deadline=None)
def test_through_safetensors_and_back_involution(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[str, int]]
) -> None:
    from ckpt_cli.edits.convert import convert
    from ckpt_cli.edits.convert_options import ConvertOptions

    folder = tmp_path_factory.mktemp("involution")
    dtypes = (torch.float32, torch.float64, torch.int8, torch.bfloat16)
    pool = [torch.arange(number + 1).to(dtypes[number]) for number in range(4)]
    state = {name: pool[number] for name, number in chosen}
    torch.save(state, folder / "a.pt")
    convert(str(folder / "a.pt"), str(folder / "a.safetensors"), ConvertOptions())
    convert(str(folder / "a.safetensors"), str(folder / "b.pt"), ConvertOptions())
    assert_same_state(torch.load(folder / "b.pt"), state)


def test_the_kept_name_of_a_tie_is_the_one_that_save_model_keeps(tmp_path: Path, ckpt: Ckpt) -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    save_model(net, str(tmp_path / "theirs.safetensors"), metadata={"format": "pt"})
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert ckpt("convert", tmp_path / "a.pt", tmp_path / "ours.safetensors").code == 0
    noted = []
    for name in ("theirs", "ours"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            noted.append({key: value for key, value in file.metadata().items() if key != "ckpt.order"})
            assert sorted(file.keys()) == ["0.bias", "0.weight"]
    assert noted[0] == noted[1]


def test_aliases_keep_their_places_when_they_are_renamed(tmp_path: Path, ckpt: Ckpt) -> None:
    weight = torch.ones(2)
    save = {"z": weight, "m": torch.zeros(1), "a": weight}
    torch.save(save, tmp_path / "a.pt")
    path = tmp_path / "a.safetensors"
    assert ckpt("convert", tmp_path / "a.pt", path).code == 0
    assert ckpt("rename", path, "--add", "x").code == 0
    assert [row.split("\t")[0] for row in ckpt("ls", path).lines] == ["x.z", "x.m", "x.a"]
