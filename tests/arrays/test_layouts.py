"""Tensors that are no plain views: their text and their facts are torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Answer, Ckpt
from layouts import KINDS, elements, quantized, saved
from torch import nn

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


@pytest.mark.parametrize("name", KINDS)
def test_show_prints_what_torch_prints(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=KINDS[name]())
    theirs = torch.load(path, weights_only=False)["x"]
    assert ckpt("show", path, "x") == Answer(0, f"{theirs!r}\n", "")


@pytest.mark.parametrize("name", KINDS)
def test_facts_are_those_of_torch(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, x=KINDS[name]())
    theirs = torch.load(path, weights_only=False)["x"]
    with ckpt_cli.open(path) as checkpoint:
        mine = checkpoint["x"].facts
    if not isinstance(theirs, nn.parameter.UninitializedTensorMixin):
        assert f"torch.{mine.dtype}" == str(theirs.dtype)
        assert mine.numel == theirs.numel()
    if theirs.is_nested or isinstance(theirs, nn.parameter.UninitializedTensorMixin):
        assert mine.shape is None
    else:
        assert mine.shape == tuple(theirs.shape)
    if mine.layout.startswith("sparse"):
        assert mine.nnz == theirs._nnz()
    if theirs.layout == torch.sparse_coo:
        assert mine.coalesced == theirs.is_coalesced()
    if theirs.is_quantized:
        assert f"torch.{mine.quantizer.scheme}" == str(theirs.qscheme())


@pytest.mark.parametrize("name", [name for name in KINDS if "uninit" not in name and "meta" not in name])
def test_the_torch_tensor_is_that_of_torch_load(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, x=KINDS[name]())
    theirs = torch.load(path, weights_only=False)["x"]
    mine = ckpt_cli.load(path)["x"]
    assert (mine.dtype, mine.layout, mine.requires_grad) == (theirs.dtype, theirs.layout, theirs.requires_grad)
    assert isinstance(mine, nn.Parameter) == isinstance(theirs, nn.Parameter)
    if theirs.is_nested:
        assert len(mine.unbind()) == len(theirs.unbind())
        assert all(torch.equal(a, b) for a, b in zip(mine.unbind(), theirs.unbind(), strict=True))
        return
    assert mine.shape == theirs.shape
    if theirs.layout == torch.sparse_coo:
        assert mine.is_coalesced() == theirs.is_coalesced()
    assert torch.equal(elements(mine), elements(theirs))
    if theirs.is_quantized:
        assert mine.qscheme() == theirs.qscheme()
        assert str(mine) == str(theirs)


def test_meta_and_uninitialized_tensors_are_made_without_values(tmp_path: Path) -> None:
    made = {
        "m": torch.empty(2, device="meta"),
        "p": nn.UninitializedParameter(requires_grad=False),
        "b": nn.UninitializedBuffer(),
    }
    mine = ckpt_cli.load(saved(tmp_path, **made))
    assert mine["m"].is_meta
    assert type(mine["p"]) is nn.UninitializedParameter
    assert not mine["p"].requires_grad
    assert isinstance(mine["b"], nn.UninitializedBuffer)


def test_a_copy_has_the_new_values_and_the_old_file_the_old_ones(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=torch.eye(2).to_sparse(), q=quantized(torch.qint8, 3))
    before = Path(path).read_bytes()
    assert ckpt("set", path, "x[1,1]=5", "q=0", "-o", tmp_path / "b.pt").code == 0
    assert Path(path).read_bytes() == before
    loaded = torch.load(tmp_path / "b.pt")
    assert (loaded["x"].to_dense()[1, 1], loaded["q"].dequantize().tolist()) == (5, [0, 0, 0])


def test_entries_are_sorted_by_the_place_of_their_first_part(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, a=torch.eye(2).to_sparse(), b=torch.ones(1), m=torch.empty(2, device="meta"))
    assert [line.split("\t")[0] for line in ckpt("ls", "--sort", "file", path).lines] == ["m", "a", "b"]
