"""Quantized tensors: what their integers stand for is shown, written and set as torch does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, by_channel, quantized, saved
from set_elements import edit

import ckpt_cli

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tensor support is in beta",
    "ignore:.*The PyTorch API of nested tensors is in prototype",
    "ignore:.*torch.quantize_per_tensor",
    "ignore:.*Quantized tensor creation",
    "ignore:.*quantized",
    "ignore:.*TypedStorage is deprecated",
    "ignore:.*ComplexHalf",
    "ignore:Please use DTensor instead",
    "ignore:Sparse invariant checks",
)


QUANTIZED = [name for name in KINDS if "quant" in name or "channel" in name or "bits" in name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_numpy_gives_what_the_integers_stand_for(name: str, tmp_path: Path) -> None:
    made = KINDS[name]()
    with ckpt_cli.open(saved(tmp_path, x=made)) as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"].numpy(), made.dequantize().numpy())


@pytest.mark.parametrize("name", ["quantized torch.qint8", "by channel", "by the other channel", "quantized qint32"])
def test_raw_shows_the_integers(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    made = KINDS[name]()
    path = saved(tmp_path, x=made)
    assert ckpt("show", "--raw", path, "x").out == f"{made.int_repr()}\n"
    assert ckpt("show", "--raw", path, "x[1,::2]").out == f"{made.int_repr()[1, ::2]}\n"


@pytest.mark.parametrize("index", ["0", "-1,2", "1:3", "::2,1:5:2", "...,0", "3:1:-1", "1,4:0:-2"])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_index_takes_the_scales_of_its_channels_along(axis: int, index: str, tmp_path: Path) -> None:
    made = by_channel(torch.qint8, axis)
    with ckpt_cli.open(saved(tmp_path, x=made)) as checkpoint:
        from ckpt_cli.ops.show import Shown, show

        (shown,) = show(checkpoint._opened, [f"x[{index}]"])
        assert isinstance(shown, Shown)
        expected = eval(f"made.dequantize().numpy()[{index}]")
        np.testing.assert_array_equal(shown.array(), expected)


def test_an_index_of_one_scale_is_shown_as_torch_shows_it(tmp_path: Path, ckpt: Ckpt) -> None:
    made = quantized(torch.quint8, 4, 6)
    assert ckpt("show", saved(tmp_path, x=made), "x[1]").out == f"{made[1]}\n"


def test_json_has_the_scales(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, a=quantized(torch.qint8, 2), b=by_channel(torch.qint8, 0))
    a, b = json.loads(ckpt("show", "--json", path).out)
    assert a["quantization"] == {"scheme": "per_tensor_affine", "scale": 0.1, "zero_point": 10, "axis": None}
    assert (len(b["quantization"]["scale"]), b["quantization"]["axis"]) == (4, 0)
    assert b["quantization"]["zero_point"] == [0, 1, 2, 3]
    assert np.shape(b["values"]) == (4, 6)


def test_quantized_values_are_written_as_floats_or_as_integers(tmp_path: Path, ckpt: Ckpt) -> None:
    made = by_channel(torch.qint8, 1)
    path, out = saved(tmp_path, x=made), tmp_path / "x.npy"
    assert ckpt("show", path, "x[1:]", "-o", out).code == 0
    np.testing.assert_array_equal(np.load(out), made.dequantize()[1:].numpy())
    assert ckpt("show", path, "x", "--raw", "-o", out).code == 0
    np.testing.assert_array_equal(np.load(out), made.int_repr().numpy())


def test_tensors_over_the_same_integers_are_tied_where_their_scales_are(tmp_path: Path, ckpt: Ckpt) -> None:
    made = quantized(torch.qint8, 3)
    other = torch._empty_affine_quantized((3,), scale=2.0, zero_point=0, dtype=torch.qint8)
    other.set_(made.untyped_storage(), 0, (3,), (1,))
    path = saved(tmp_path, a=made, b=made, c=other)
    assert [group["names"] for group in json.loads(ckpt("ties", "--json", path).out)["tied"]] == [["a", "b"]]
    assert "b, c also changed" in ckpt("set", path, "a[0]=0.5").err
    loaded = ckpt_cli.load(path)
    assert loaded["a"] is loaded["b"]
    assert (loaded["a"].q_scale(), loaded["c"].q_scale()) == (0.1, 2.0)


SCALES = st.floats(1e-3, 1e3)
DTYPES = {torch.quint8: (0, 255), torch.qint8: (-128, 127), torch.qint32: (-(2**31), 2**31 - 1)}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_channels_are_used_to_their_last_digit(dtype: torch.dtype, axis: int, tmp_path: Path) -> None:
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * 3
    scales = 0.01 + torch.rand(values.shape[axis], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    made = torch.quantize_per_channel(values, scales, torch.arange(len(scales)) % 7, axis, dtype)
    with ckpt_cli.open(saved(tmp_path, x=made)) as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"].numpy(), made.dequantize().numpy())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_quantized_tensor_is_dequantized_and_set_as_torch_does(data: st.DataObject, tmp_path_factory: Any) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    least, most = DTYPES[dtype]
    scale = data.draw(SCALES)
    zero = data.draw(st.integers(max(least, -1000), min(most, 1000)))
    ints = data.draw(st.lists(st.integers(max(least, -(2**20)), min(most, 2**20)), min_size=1, max_size=8))
    repr_dtype = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}[dtype]
    made = torch._make_per_tensor_quantized_tensor(torch.tensor(ints, dtype=repr_dtype), scale, zero)
    folder = tmp_path_factory.mktemp("q")
    path = saved(folder, x=made)
    with ckpt_cli.open(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint["x"].numpy(), made.dequantize().numpy())
    low, high = (max(least, -(2**20)) - zero) * scale, (min(most, 2**20) - zero) * scale
    wanted = low + (high - low) * data.draw(st.floats(-0.1, 1.1))
    edit(path, f"x[0]={wanted!r}", cast=True)
    expected = torch.quantize_per_tensor(torch.tensor([wanted]), scale, zero, dtype).int_repr()[0]
    assert torch.load(path)["x"].int_repr().tolist() == [int(expected), *ints[1:]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_halfway_between_two_integers_torch_is_followed(dtype: torch.dtype, tmp_path: Path, ckpt: Ckpt) -> None:
    made = torch.quantize_per_tensor(torch.zeros(40), 73.5, 2, dtype)
    path = saved(tmp_path, x=made)
    wanted = [(number + 0.5) * 73.5 for number in range(40)]
    assert ckpt("set", path, f"x={wanted}").code == 0
    expected = torch.quantize_per_tensor(torch.tensor(wanted), 73.5, 2, dtype)
    assert torch.equal(torch.load(path)["x"].int_repr(), expected.int_repr())


def test_each_channel_is_set_by_its_own_scale(tmp_path: Path, ckpt: Ckpt) -> None:
    for axis in (0, 1):
        made = by_channel(torch.qint8, axis)
        path = saved(tmp_path, x=made)
        assert ckpt("set", path, "x[1:3,::2]=0.5").code == 0
        dense = made.dequantize()
        dense[1:3, ::2] = 0.5
        expected = torch.quantize_per_channel(
            dense, made.q_per_channel_scales(), made.q_per_channel_zero_points(), axis, torch.qint8
        )
        assert torch.equal(torch.load(path)["x"].int_repr(), expected.int_repr())


def test_arithmetic_is_on_what_the_integers_stand_for(tmp_path: Path, ckpt: Ckpt) -> None:
    made = quantized(torch.qint8, 6)
    path = saved(tmp_path, x=made)
    assert ckpt("set", path, "x*=0.5").code == 0
    expected = torch.quantize_per_tensor(made.dequantize() * 0.5, 0.1, 10, torch.qint8)
    assert torch.equal(torch.load(path)["x"].int_repr(), expected.int_repr())


def test_what_a_scale_cannot_reach_is_refused_without_cast(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=quantized(torch.quint8, 3), four=by_channel(torch.quint4x2, 0, torch.float32))
    refused = ckpt("set", path, "x[0]=1000")
    assert refused.code == 2
    assert "quint8 with its scale cannot hold 1000.0 (tensor 'x')" in refused.err
    assert ckpt("set", "--cast", path, "x[0]=1000").code == 0
    assert torch.load(path)["x"].int_repr()[0] == 255
    assert "NaN" not in ckpt("show", path, "x").out
    assert ckpt("set", "--cast", path, "x[0]=nan").code == 2
    assert ckpt("set", path, "x[0]=1+2j").code == 2
    assert "packs several integers into a byte" in ckpt("set", path, "four[0,0]=0").err
    assert "packs 2 integers into a byte" in ckpt("show", "--raw", path, "four").err
