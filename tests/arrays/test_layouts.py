"""Tensors that are no plain views: their text is torch's, their elements have one place or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import pt
from builders.pickles import Ops, built, call, named, new, ordered_dict, storage, tensor
from conftest import Answer, Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ckpt_cli
from ckpt_cli.errors import FormatError, LimitError, MalformedError, UnsupportedError

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


class Named(torch.Tensor):
    """A subclass that keeps its data as torch keeps it."""


def quantized(dtype: torch.dtype = torch.quint8, *shape: int, scale: float = 0.1, zero: int = 10) -> torch.Tensor:
    values = torch.linspace(-3, 7, max(int(np.prod(shape)), 1))[: int(np.prod(shape))].reshape(shape)
    return torch.quantize_per_tensor(values, scale, zero, dtype)


def by_channel(dtype: torch.dtype, axis: int, zeros: torch.dtype = torch.int64) -> torch.Tensor:
    values = torch.linspace(-3, 7, 24).reshape(4, 6)
    count = values.shape[axis]
    scales = torch.linspace(0.05, 0.4, count)
    return torch.quantize_per_channel(values, scales, torch.arange(count).to(zeros), axis, dtype)


def sparse(layout: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    dense = (torch.arange(24).reshape(4, 6) % 5 - 2).to(torch.float32)
    made = {
        "coo": dense.to_sparse,
        "rows": lambda: dense.to_sparse(1),
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 3)),
        "bsc": lambda: dense.to_sparse_bsc((2, 3)),
    }[layout]()
    return made.to(dtype)


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3), torch.ones(3, 3)], layout=torch.jagged)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    **{f"quantized {dtype}": lambda dtype=dtype: quantized(dtype, 2, 3) for dtype in (torch.quint8, torch.qint8)},
    "quantized qint32": lambda: quantized(torch.qint32, 3, 4, scale=1e-3, zero=-7),
    "quantized and strided": lambda: quantized(torch.qint8, 4, 6).t(),
    "quantized, large": lambda: quantized(torch.quint8, 40, 50),
    "quantized, empty": lambda: quantized(torch.quint8, 0, 3),
    "quantized, a scalar": lambda: quantized(torch.quint8)[()],
    "by channel": lambda: by_channel(torch.qint8, 0),
    "by the other channel": lambda: by_channel(torch.quint8, 1),
    "by channel of floats": lambda: by_channel(torch.quint8, 0, torch.float32),
    "four bits": lambda: by_channel(torch.quint4x2, 0, torch.float32),
    "two bits": lambda: by_channel(torch.quint2x4, 0, torch.float32),
    **{f"sparse {layout}": lambda layout=layout: sparse(layout)
       for layout in ("coo", "rows", "csr", "csc", "bsr", "bsc")},
    **{f"coo {dtype}": lambda dtype=dtype: sparse("coo", dtype)
       for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.complex64, torch.bool)},
    "csr of doubles": lambda: sparse("csr", torch.float64),
    "coo, empty": lambda: torch.zeros(3, 4).to_sparse(),
    "csr, empty": lambda: torch.zeros(3, 4).to_sparse_csr(),
    "coo, not coalesced": lambda: torch.sparse_coo_tensor([[1, 1, 0], [2, 2, 0]], [1.0, 2.0, 3.0], (2, 3)),
    "coo, large": lambda: torch.eye(1200).to_sparse(),
    "csr, a batch": lambda: torch.stack([torch.eye(3), 2 * torch.eye(3)]).to_sparse_csr(),
    "coo, a parameter": lambda: nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)]),
    "nested of doubles": lambda: torch.nested.nested_tensor([torch.ones(2).double(), torch.arange(30.0).double()]),
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "meta of halves": lambda: torch.empty(2, 3, device="meta", dtype=torch.float16),
    "meta, a parameter": lambda: nn.Parameter(torch.empty(2, 3, device="meta")),
    "uninitialized": lambda: nn.UninitializedParameter(),
    "uninitialized buffer": lambda: nn.UninitializedBuffer(),
    "a subclass": lambda: torch.arange(30.0).reshape(3, 10).as_subclass(Named),
    "a frozen parameter of a subclass": lambda: nn.Parameter(torch.ones(2).as_subclass(Named), requires_grad=False),
}  # fmt: skip


def saved(folder: Path, **state: Any) -> str:
    path = str(folder / "m.pt")
    torch.save(state, path)
    return path


def elements(made: torch.Tensor) -> torch.Tensor:
    """Something that can be compared by `torch.equal`."""
    if isinstance(made, Named):
        made = made.as_subclass(torch.Tensor)
    if made.is_quantized:
        made = made.dequantize()
    if made.layout == torch.sparse_coo:
        made = made.coalesce()
    return made.detach().to_dense() if made.layout != torch.strided else made.detach()


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


# --- quantized --------------------------------------------------------------------------------------------------------

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
    from ckpt_cli.edits.patching import edit_values
    from ckpt_cli.edits.set_tensors import assign

    edit_values(path, lambda opened, overlay: assign(opened, overlay, [f"x[0]={wanted!r}"], cast=True))
    expected = torch.quantize_per_tensor(torch.tensor([wanted]), scale, zero, dtype).int_repr()[0]
    assert torch.load(path)["x"].int_repr().tolist() == [int(expected), *ints[1:]]


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


# --- sparse -----------------------------------------------------------------------------------------------------------

ELEMENTS = ["coo", "rows", "csr", "csc", "bsr", "bsc"]


@pytest.mark.parametrize("layout", ELEMENTS)
def test_an_element_of_a_sparse_tensor_is_found_and_set(layout: str, tmp_path: Path, ckpt: Ckpt) -> None:
    made = sparse(layout)
    dense = made.to_dense()
    path = saved(tmp_path, x=made)
    stored = absent = 0
    for row in range(4):
        for column in (0, 2, 5):
            assert ckpt("show", path, f"x[{row},{column}]").out == f"{dense[row, column]!r}\n"
            answer = ckpt("set", path, f"x[{row},{column}]={row}{column}.5")
            if answer.code == 0:
                stored += 1
                dense[row, column] = float(f"{row}{column}.5")
            else:
                absent += 1
                assert "does not store this element, which is zero" in answer.err
                assert dense[row, column] == 0
    assert torch.equal(torch.load(path, weights_only=False)["x"].to_dense(), dense)
    assert stored
    assert absent or layout != "coo"


def test_a_row_of_a_tensor_of_dense_rows_is_one_piece(tmp_path: Path, ckpt: Ckpt) -> None:
    made = torch.sparse_coo_tensor([[0, 2]], [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], (4, 3)).coalesce()
    path = saved(tmp_path, x=made)
    assert ckpt("show", path, "x[2]").out == "tensor([4., 5., 6.])\n"
    assert ckpt("show", path, "x[1]").out == "tensor([0., 0., 0.])\n"
    assert ckpt("show", path, "x[-2,1:]").out == "tensor([5., 6.])\n"
    answer = ckpt("set", path, "x[2,1:]=[7,8]")
    assert (answer.code, answer.err.splitlines()[0]) == (0, f"{path}: set x")
    assert torch.load(path)["x"].to_dense()[2].tolist() == [4, 7, 8]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("x[:,0]", "an index into sparse_coo tensor 'x' starts with 2 integers"),
        ("x[0]", "starts with 2 integers"),
        ("x[9,0]", "index 9 is out of range"),
        ("x[1,2]", "is the sum of several stored ones"),
    ],
)
def test_an_index_that_has_no_one_place_is_refused(index: str, words: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=KINDS["coo, not coalesced"]())
    for answer in (ckpt("show", path, index), ckpt("set", path, f"{index}=1")):
        assert answer.code == 2
        assert words in answer.err


def test_parts_have_names_of_their_own(tmp_path: Path, ckpt: Ckpt) -> None:
    made = torch.eye(3).to_sparse()
    path = saved(tmp_path, **{"emb.weight": made, "dense": torch.ones(2)})
    assert ckpt("show", path, "emb.weight.indices[0]").out == "tensor([0, 1, 2])\n"
    assert ckpt("ls", path, "emb.weight.values").out == "emb.weight.values\tfloat32\t[3]\t12\n"
    answer = ckpt("set", path, "emb.weight.values[1]=7")
    assert answer.code == 0
    assert "emb.weight also changed" in answer.err
    assert torch.load(path)["emb.weight"].to_dense()[1, 1] == 7
    assert ckpt("set", path, "emb.weight=0").err.splitlines()[1] == "hint: name a part: emb.weight.values"
    assert "nothing is called 'emb.weight.valuez'" in ckpt("show", path, "emb.weight.valuez").err


def test_an_entry_of_that_name_wins_over_a_part(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, **{"x": torch.eye(3).to_sparse(), "x.values": torch.zeros(1)})
    assert ckpt("show", path, "x.values").out == "tensor([0.])\n"


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=6, unique=True),
    row=st.integers(0, 3),
    column=st.integers(0, 4),
)
def test_any_element_of_any_sparse_tensor_is_that_of_the_dense_one(
    places: list[tuple[int, int]], row: int, column: int, tmp_path_factory: Any
) -> None:
    dense = torch.zeros(4, 5)
    for number, at in enumerate(places):
        dense[at] = number + 1
    from ckpt_cli.ops.show import Shown, show

    path = saved(
        tmp_path_factory.mktemp("s"), coo=dense.to_sparse(), csr=dense.to_sparse_csr(), csc=dense.to_sparse_csc()
    )
    with ckpt_cli.open(path) as checkpoint:
        for name in ("coo", "csr", "csc"):
            (shown,) = show(checkpoint._opened, [f"{name}[{row},{column}]"])
            assert isinstance(shown, Shown)
            assert shown.array() == dense[row, column].item()
    assert all(torch.equal(mine.to_dense(), dense) for mine in ckpt_cli.load(path).values())


def test_sparse_tensors_take_what_their_parts_take(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=torch.eye(100).to_sparse(), m=torch.empty(5, device="meta"))
    assert ckpt("ls", path).out == "x\tfloat32\t[100,100]\t2000\nm\tfloat32\t[5]\t0\n"
    (entry, _) = json.loads(ckpt("ls", "--json", path).out)["entries"]
    assert entry["details"] == {"nnz": 100, "coalesced": True}


def test_sparse_tensors_of_the_same_parts_are_tied(tmp_path: Path, ckpt: Ckpt) -> None:
    made = torch.eye(3).to_sparse()
    values = torch.ones(2)
    other = torch.sparse_coo_tensor([[0, 1]], values, (4,), is_coalesced=True)
    path = saved(tmp_path, a=made, b=made, values=values, c=other)
    ties = json.loads(ckpt("ties", "--json", path).out)
    assert [group["names"] for group in ties["tied"]] == [["values", "c.values"], ["a", "b"]]
    assert ckpt("ties", path, "a", "b").code == 0
    assert ckpt("ties", path, "a", "c").code == 1
    assert "b also changed" in ckpt("set", path, "a[0,0]=3").err
    assert "c also changed" in ckpt("set", path, "values=3").err
    loaded = ckpt_cli.load(path)
    assert loaded["a"] is loaded["b"]


# --- nested -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_constituent_is_shown_and_set(layout: torch.layout, tmp_path: Path, ckpt: Ckpt) -> None:
    pieces = [torch.ones(2, 3), torch.zeros(1, 3), torch.full((3, 3), 5.0)]
    path = saved(tmp_path, x=torch.nested.nested_tensor(pieces, layout=layout))
    assert ckpt("show", path, "x[-1,:,1]").out == "tensor([5., 5., 5.])\n"
    assert ckpt("set", path, "x[2,1]=[7,8,9]", "x[0,0,0]=4").code == 0
    loaded = torch.load(path, weights_only=False)["x"].unbind()
    assert loaded[2][1].tolist() == [7, 8, 9]
    assert loaded[0].tolist() == [[4, 1, 1], [1, 1, 1]]
    assert "index 3 is out of range for the 3 constituents" in ckpt("show", path, "x[3]").err
    assert "starts with the number of a constituent" in ckpt("set", path, "x[:]=0").err


def test_a_jagged_tensor_is_shown_with_its_constituents(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path, x=jagged())
    texts = ",\n".join("  " + str(piece).replace("\n", "\n  ") for piece in jagged().unbind())
    assert ckpt("show", path, "x").out == f"nested_tensor([\n{texts}\n], layout=torch.jagged)\n"
    mine = ckpt_cli.load(path)["x"]
    assert mine.layout == torch.jagged
    assert all(torch.equal(a, b) for a, b in zip(mine.unbind(), jagged().unbind(), strict=True))


# --- classes of their own ---------------------------------------------------------------------------------------------


def wrapper(kind: str, parts: dict[str, Ops], shape: tuple[int, ...], dtype: str = "bfloat16") -> Ops:
    """A tensor subclass without data of its own, as torch/_tensor.py pickles it; torchao's are such."""
    made = named(kind)
    layout = call("torch.serialization._get_layout", "torch.strided")
    stride = tuple(int(np.prod(shape[at + 1 :])) for at in range(len(shape)))
    args = (made, named(f"torch.{dtype}"), shape, stride, 0, layout, call("torch.device", "cpu"), False)
    func = named("torch._utils._rebuild_wrapper_subclass")
    return call("torch._tensor._rebuild_from_type_v2", func, made, args, {**parts, "block_size": (1, 2)})


INT4 = "torchao.quantization.quantize_.workflows.int4.int4_tensor.Int4Tensor"


def int4(folder: Path) -> str:
    parts = {"qdata": tensor("0", (2, 2), "Char"), "scale": tensor("1", (2,)), "zero_point": tensor("2", (2,), "Char")}
    storages = {"0": bytes([1, 2, 3, 4]), "1": np.array([0.5, 2], np.float32).tobytes(), "2": bytes(2)}
    return str(pt.write(folder / "ao.pt", {"w": wrapper(INT4, parts, (2, 4)), "n": 1}, storages))


def test_a_tensor_of_torchao_is_told_by_its_parts(tmp_path: Path, ckpt: Ckpt) -> None:
    path = int4(tmp_path)
    (entry,) = json.loads(ckpt("ls", "--json", path).out)["entries"]
    assert (entry["dtype"], entry["shape"], entry["nbytes"], entry["python_type"]) == ("bfloat16", [2, 4], 14, INT4)
    assert [part["name"] for part in entry["parts"]] == ["qdata", "scale", "zero_point"]
    assert ckpt("show", path, "w").out == (
        "Int4Tensor(size=(2, 4), dtype=torch.bfloat16,\n"
        "  qdata=tensor([[1, 2],\n"
        "                [3, 4]], dtype=torch.int8),\n"
        "  scale=tensor([0.5000, 2.0000]),\n"
        "  zero_point=tensor([0, 0], dtype=torch.int8))\n"
    )
    refused = ckpt("set", path, "w[0,0]=1")
    assert refused.code == 2
    assert "tensor 'w' is wrapper, made of qdata, scale, zero_point" in refused.err
    assert ckpt("set", path, "w.scale[0]=0.25").code == 0
    assert ckpt("show", path, "w.scale").out == "tensor([0.2500, 2.0000])\n"
    with pytest.raises(UnsupportedError, match=r"cannot be made without torch\.load"):
        ckpt_cli.load(path)
    shown = json.loads(ckpt("show", "--json", path).out)[0]
    assert (shown["values"], [part["name"] for part in shown["parts"]]) == (None, ["qdata", "scale", "zero_point"])
    assert ckpt("show", "-f", "tsv", path, "w").out.splitlines()[2] == "w.scale\t0.25\t2.0"


def test_wrappers_within_wrappers_are_told_and_named(tmp_path: Path, ckpt: Ckpt) -> None:
    inner = wrapper("ao.PlainAQTTensorImpl", {"int_data": tensor("0", (2,), "Char")}, (2,), "int8")
    made = wrapper("ao.AffineQuantizedTensor", {"tensor_impl": inner}, (2,))
    path = str(pt.write(tmp_path / "ao.pt", {"w": made}, {"0": bytes([7, 8])}))
    assert ckpt("show", path, "w.tensor_impl.int_data").out == "tensor([7, 8], dtype=torch.int8)\n"
    assert "tensor_impl=PlainAQTTensorImpl(size=(2,)" in ckpt("show", path, "w").out


def test_tensors_among_the_attributes_of_a_tensor_are_listed(tmp_path: Path, ckpt: Ckpt) -> None:
    made = nn.Parameter(torch.ones(2))
    made.running = torch.arange(3)  # type: ignore[attr-defined]
    path = saved(tmp_path, x=made)
    assert ckpt("show", path, "x").out == f"{nn.Parameter(torch.ones(2))}\n"
    assert ckpt("show", path, "x.running").out == "tensor([0, 1, 2])\n"
    assert json.loads(ckpt("ls", "--json", path).out)["nbytes"] == 8 + 24
    assert ckpt("ls", "--waste", "-f", "tsv", path).out == ""


def test_elements_of_an_optimizer_of_sparse_parameters_are_found(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"state": {0: {"exp_avg": torch.eye(2).to_sparse()}}}
    path = saved(tmp_path, optimizer=state)
    assert ckpt("show", path, "optimizer.state.0.exp_avg[1,1]").out == "tensor(1.)\n"


@pytest.fixture(scope="module")
def meshes() -> Any:
    """A world of two processes of which this is the first."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist
    dist.destroy_process_group()


def test_a_dtensor_is_told_as_torch_tells_it(meshes: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    data = torch.arange(6.0).reshape(2, 3)
    made = {
        "rows": DTensor.from_local(data.clone(), line, [Shard(0)]),
        "columns": nn.Parameter(DTensor.from_local(data.clone(), line, [Shard(1)])),
        "whole": DTensor.from_local(data.clone(), plane, [Replicate(), Shard(1)]),
        "summand": DTensor.from_local(data.clone(), line, [Partial()]),
    }
    path = saved(tmp_path, **made)
    with ckpt_cli.open(path) as checkpoint:
        for name, theirs in made.items():
            mine = checkpoint[name].facts
            assert (mine.shape, mine.kind) == (tuple(theirs.shape), "parameter" if name == "columns" else "tensor")
            assert ckpt("show", path, name).out == f"{theirs}\n"
    for name in ("rows", "columns", "whole"):
        assert ckpt("set", path, f"{name}[1,1]=7").code == 0
        assert ckpt("show", path, f"{name}._local_tensor[1]").out == "tensor([3., 7., 5.])\n"
    assert ckpt("show", path, "rows[0]").out == "tensor([0., 1., 2.])\n"
    assert "this file has only a part of tensor 'rows'" in ckpt("set", path, "rows[2,1]=7").err
    assert "made of _local_tensor" in ckpt("set", path, "summand[0,0]=7").err


def test_a_sharded_tensor_is_told_with_the_place_of_its_shards(meshes: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardMetadata
    from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

    mine = ShardMetadata([2, 0], [2, 3], "rank:0/cpu")
    metadata = ShardedTensorMetadata(
        [ShardMetadata([0, 0], [2, 3], "rank:1/cpu"), mine], torch.Size([4, 3]), TensorProperties(dtype=torch.float32)
    )
    made = ShardedTensor._init_from_local_shards_and_global_metadata([Shard(torch.ones(2, 3), mine)], metadata)
    path = saved(tmp_path, x=made)
    assert ckpt("ls", path).out == "x\tfloat32\t[4,3]\t24\n"
    assert ckpt("show", path, "x").out == (
        "ShardedTensor(size=(4, 3), dtype=torch.float32,\n"
        "  shard0 at (2, 0)=tensor([[1., 1., 1.],\n"
        "                           [1., 1., 1.]]))\n"
    )
    assert ckpt("set", path, "x[3,0]=7").code == 0
    assert ckpt("show", path, "x.shard0[1]").out == "tensor([7., 1., 1.])\n"
    assert "only a part" in ckpt("show", path, "x[0,0]").err


# --- what is refused --------------------------------------------------------------------------------------------------

LAYOUT = "torch.serialization._get_layout"


def coo(indices: Ops, values: Ops, shape: tuple[int, ...]) -> Ops:
    parts = (indices, values, call("torch.Size", shape), True)
    return call("torch._utils._rebuild_sparse_tensor", call(LAYOUT, "torch.sparse_coo"), parts)


def csr(crow: Ops, columns: Ops, values: Ops, shape: tuple[int, ...], layout: str = "csr") -> Ops:
    parts = (crow, columns, values, call("torch.Size", shape))
    return call("torch._utils._rebuild_sparse_tensor", call(LAYOUT, f"torch.sparse_{layout}"), parts)


def nested(*parts: Ops) -> Ops:
    return call("torch._utils._rebuild_nested_tensor", *parts)


def longs(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


ROW = tensor("v", (2,))
HOSTILE: dict[str, tuple[Ops, dict[str, bytes], str]] = {
    "too few values": (coo(tensor("i", (1, 3), "Long"), ROW, (4,)), {"i": longs(0, 1, 2)}, "do not fit its shape"),
    "too many indices": (coo(tensor("i", (2, 2), "Long"), ROW, (4,)), {"i": longs(0, 1, 2, 3)}, "do not fit"),
    "indices of floats": (coo(tensor("i", (1, 2)), ROW, (4,)), {"i": bytes(8)}, "are no integers"),
    "indices without end": (coo(tensor("i", (1, 1 << 40), "Long", stride=(0, 0), numel=1),
                                tensor("v", (1 << 40,), stride=(0,), numel=2), (1 << 50,)), {"i": longs(0)},
                            "repeats few bytes"),
    "csr rows of another length": (csr(tensor("i", (2,), "Long"), tensor("j", (2,), "Long"), ROW, (4, 4)),
                                   {"i": longs(0, 2), "j": longs(0, 1)}, "do not fit"),
    "bsr of no blocks": (csr(tensor("i", (3,), "Long"), tensor("j", (2,), "Long"), tensor("v", (2, 0, 0), numel=2),
                             (2, 2), "bsr"), {"i": longs(0, 1, 2), "j": longs(0, 0)}, "do not fit"),
    "a constituent beyond the buffer": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1, 1), "Long"),
                                               tensor("o", (1,), "Long")),
                                        {"s": longs(3), "t": longs(1), "o": longs(0)}, "reaches beyond its buffer"),
    "a negative size": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1, 1), "Long"),
                               tensor("o", (1,), "Long")), {"s": longs(-1), "t": longs(1), "o": longs(0)}, "no count"),
    "constituents without end": (nested(ROW, *(tensor(key, (1 << 40, 1), "Long", stride=(0, 0), numel=1)
                                               for key in "st"),
                                        tensor("o", (1 << 40,), "Long", stride=(0,), numel=1)),
                                 {"s": longs(1), "t": longs(1), "o": longs(0)}, "too many constituents to go through"),
    "sizes that do not fit": (nested(ROW, tensor("s", (1, 1), "Long"), tensor("t", (1,), "Long"),
                                     tensor("o", (1,), "Long")), {"s": longs(1), "t": longs(1), "o": longs(0)},
                              "do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_parts_that_contradict_each_other_are_refused(name: str, tmp_path: Path, ckpt: Ckpt) -> None:
    made, storages, words = HOSTILE[name]
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), **storages}))
    assert ckpt("ls", path).code == 0
    for answer in (ckpt("show", path, "x"), ckpt("show", "--json", path), ckpt("show", "-f", "tsv", path)):
        assert answer.code == 2
        assert words in answer.err
    with pytest.raises(FormatError):
        ckpt_cli.load(path)


def test_an_index_that_lies_outside_is_refused_by_torch_itself(tmp_path: Path) -> None:
    made = coo(tensor("i", (1, 2), "Long"), ROW, (4,))
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "i": longs(0, 9)}))
    with pytest.raises(MalformedError, match="torch does not take the parts of tensor 'x'"):
        ckpt_cli.load(path)


def test_constituents_of_many_tensors_count_together(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.limits.CONSTITUENTS", 5)
    piece = torch.nested.nested_tensor([torch.ones(1), torch.ones(2), torch.ones(3)])
    path = saved(tmp_path, a=piece, b=piece.clone())
    assert ckpt("show", path, "a").code == 0
    assert ckpt("show", path, "b[2]").out == "tensor([1., 1., 1.])\n"
    assert "too many constituents to go through" in ckpt("show", path).err
    with pytest.raises(LimitError, match="too many constituents"):
        ckpt_cli.load(path)


def test_scales_that_many_tensors_share_are_not_read_without_end(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.limits.READ_AGAIN", 0)
    scales, zeros = tensor("v", (1000,), "Double"), tensor("z", (1000,), "Long", stride=(0,), numel=1)
    view = (storage("q", 1, "QInt8"), 0, (1000,), (0,))
    how = (named("torch.per_channel_affine"), scales, zeros, 0)
    made = call("torch._utils._rebuild_qtensor", *view, how, False, ordered_dict())
    storages = {"q": bytes(1), "v": bytes(8000), "z": bytes(8)}
    path = str(pt.write(tmp_path / "a.pt", {str(number): made for number in range(50)}, storages))
    assert ckpt("show", path, "7").code == 0
    answer = ckpt("show", path)
    assert answer.code == 2
    assert "add up to far more than the file has" in answer.err


def test_rows_that_lie_outside_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    made = csr(tensor("i", (3,), "Long"), tensor("j", (2,), "Long"), ROW, (2, 4))
    path = str(pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "i": longs(0, 9, 2), "j": longs(0, 1)}))
    for answer in (ckpt("show", path, "x[0,0]"), ckpt("set", path, "x[0,0]=1")):
        assert answer.code == 2
        assert "says that its elements 0–9 are in one row" in answer.err


def qtensor(quantizer: tuple[Any, ...], kind: str = "QInt8") -> Ops:
    view = (storage("q", 4, kind), 0, (2, 2), (2, 1))
    return call("torch._utils._rebuild_qtensor", *view, quantizer, False, ordered_dict())


AFFINE, CHANNEL = named("torch.per_tensor_affine"), named("torch.per_channel_affine")
WRONG: dict[str, tuple[Ops, str]] = {
    "a scale that is text": (qtensor((AFFINE, "1", 0)), "its scale is '1'"),
    "a zero point that is no integer": (qtensor((AFFINE, 1.0, 0.5)), "its zero point 0.5"),
    "an unknown scheme": (qtensor((named("torch.per_row"), 1.0, 0)), "in a way that torch does not write"),
    "no quantized dtype": (qtensor((AFFINE, 1.0, 0), "Float"), "its dtype float32 is none of quantized"),
    "too few scales": (qtensor((CHANNEL, [1.0], [0], 0)), "1 scales and 1 zero points for 2 channels"),
    "an axis beyond": (qtensor((CHANNEL, [1.0, 1.0], [0, 0], 2)), "for 0 channels"),
    "scales that are text": (qtensor((CHANNEL, ["a", "b"], [0, 0], 0)), "are no numbers"),
    "parts too long": (qtensor((CHANNEL, tensor("v", (2,)), tensor("v", (1,), numel=2), 0)), "2 scales and 1 zero"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_quantizer_that_torch_would_not_take_is_refused(name: str, tmp_path: Path) -> None:
    made, words = WRONG[name]
    path = pt.write(tmp_path / "bad.pt", {"x": made}, {"q": bytes(16), "v": bytes(8)})
    with pytest.raises(MalformedError) as refused:
        ckpt_cli.open(path)
    assert words in str(refused.value)
    with pytest.raises(Exception, match=r".+"):
        torch.load(path, weights_only=False)


def test_scales_in_lists_as_torch_once_wrote_them_count(tmp_path: Path, ckpt: Ckpt) -> None:
    path = str(
        pt.write(tmp_path / "old.pt", {"x": qtensor((CHANNEL, [0.5, 2.0], [0, 1], 0))}, {"q": bytes([1, 2, 3, 4])})
    )
    assert ckpt("show", path, "x").out == f"{torch.load(path, weights_only=False)['x']}\n"
    assert torch.equal(ckpt_cli.load(path)["x"].dequantize(), torch.tensor([[0.5, 1.0], [4.0, 6.0]]))


def test_a_jagged_dimension_that_there_is_not_is_refused(tmp_path: Path) -> None:
    state = {"values": tensor("v", (2,)), "offsets": tensor("o", (2,), "Long"), "_ragged_idx": 5}
    made = call("torch.nested._internal.nested_tensor._rebuild_njt", state)
    path = pt.write(tmp_path / "bad.pt", {"x": made}, {"v": bytes(8), "o": longs(0, 2)})
    with pytest.raises(MalformedError, match="its ragged dimension is 5"):
        ckpt_cli.open(path)


def test_an_odd_spec_of_a_dtensor_is_told_as_far_as_it_goes(tmp_path: Path, ckpt: Ckpt) -> None:
    kind = "torch.distributed.tensor.DTensor"
    spec = built(new("torch.distributed.tensor._dtensor_spec.DTensorSpec"), {"mesh": 3, "placements": (1, None)})
    path = str(
        pt.write(tmp_path / "d.pt", {"x": wrapper(kind, {"_local_tensor": ROW, "_spec": spec}, (4,))}, {"v": bytes(8)})
    )
    assert "placements=(?(), ?())" in ckpt("show", path, "x").out
    assert ckpt("set", path, "x[0]=1").code == 2
