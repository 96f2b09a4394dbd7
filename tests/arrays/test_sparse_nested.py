"""Sparse and nested tensors: an element has one place or none, and parts have names of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, jagged, saved, sparse

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


def test_elements_of_an_optimizer_of_sparse_parameters_are_found(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"state": {0: {"exp_avg": torch.eye(2).to_sparse()}}}
    path = saved(tmp_path, optimizer=state)
    assert ckpt("show", path, "optimizer.state.0.exp_avg[1,1]").out == "tensor(1.)\n"
