"""`ckpt set`: what an assignment may say, and which elements it reaches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from set_editor import Editor, problem_of


def cube() -> torch.Tensor:
    return torch.arange(24.0).reshape(2, 3, 4)


# --- where values go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "assignment",
    [
        "x=7",
        "x[...]=7",
        "x[0]=7",
        "x[-1,2]=7",
        "x[1,2,3]=7",
        "x[ 0 , : , -1 ]=7",
        "x[...,0]=7",
        "x[0,...]=7",
        "x[:,1:3]=7",
        "x[:,::2,::-3]=7",
        "x[5:]=7",
        "x[:,100:-100:-1]=7",
        "x[+1]=7",
        "x=[1,2,3,4]",
        "x=[[1],[2],[3]]",
        "x=[[[1]],[[2]]]",
        "x[0]=[[1,2,3,4],[5,6,7,8],[9,10,11,12]]",
        "x[0,1]=[4,3,2,1]",
        "x[0,1,::-1]=[4,3,2,1]",
        "x[::-1,0,:2]=[[1,2],[3,4]]",
        "x[1,::-2,1]=[-1,-2]",
        "x[0:1]=[[[[1,2,3,4]]]]",
        "x=5",
        "x = 5",
        "x[0]= [1, 2, 3, 4] ",
        "x[0:0]=[1,2,3,4]",
    ],
)
def test_an_assignment_does_what_numpy_does(editor: Editor, assignment: str) -> None:
    expected = cube().numpy().copy()
    target, _, value = assignment.partition("=")
    index = eval(f"np.s_{target.strip()[1:]}") if "[" in target else ...
    expected[index] = np.array(eval(value))
    after = editor.edited({"x": cube(), "y": torch.ones(3)}, assignment)
    assert np.array_equal(after["x"].numpy(), expected)
    assert torch.equal(after["y"], torch.ones(3))


@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
@pytest.mark.parametrize("index", ["", "[1]", "[...,1:3]", "[:,::-1]"])
@pytest.mark.parametrize("value", ["2", "-0.5", "[[1],[2],[4]]"])
def test_an_operator_computes_on_what_stands_there(editor: Editor, operator: str, index: str, value: str) -> None:
    expected = cube().numpy().copy()
    exec(f"x{index or '[...]'} {operator}= np.float32({value})", {"x": expected, "np": np})
    after = editor.edited({"x": cube()}, f"x{index}{operator}={value}")
    assert np.array_equal(after["x"].numpy(), expected)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("x=nan", [float("nan")] * 2),
        ("x=[inf,-inf]".replace("inf", "Infinity"), [float("inf"), -float("inf")]),
        ("x=-inf", [-float("inf")] * 2),
        ('x=["nan","-inf"]', [float("nan"), -float("inf")]),
        ("x=NaN", [float("nan")] * 2),
        ("x=true", [1.0, 1.0]),
        ("x=[true,false]", [1.0, 0.0]),
        ("x=1e-3", [0.001, 0.001]),
        ("x=.5", [0.5, 0.5]),
        ("x=+3", [3.0, 3.0]),
        ("x=-0.0", [-0.0, -0.0]),
        ("x=3+0j", [3.0, 3.0]),
    ],
)
def test_a_number_may_be_written_in_many_ways(editor: Editor, assignment: str, expected: list[float]) -> None:
    after = editor.edited({"x": torch.ones(2)}, assignment)["x"]
    assert repr(after.tolist()) == repr(torch.tensor(expected).tolist())


def test_complex_numbers_and_booleans_are_values_too(editor: Editor) -> None:
    state = {"c": torch.zeros(3, dtype=torch.complex64), "b": torch.tensor([True, False, True])}
    after = editor.edited(state, "c[0]=1-2j", "c[1]=3", 'c[2]=["-1e3j"]', "b=[false,1,0]")
    assert after["c"].tolist() == [1 - 2j, 3, -1000j]
    assert after["b"].tolist() == [False, True, False]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
        np.arange(4, dtype=np.float16),
        np.arange(4, dtype=">f8"),
        np.array([[True], [False], [True]]),
        np.array(5, dtype=np.uint8),
    ],
    ids=["plain", "fortran", "half", "big-endian", "bool", "0-d"],
)
def test_values_may_come_from_a_numpy_file(editor: Editor, array: np.ndarray) -> None:
    np.save("v.npy", array)
    after = editor.edited({"x": torch.full((2, 3, 4), -1.0)}, "x[1]=@v.npy")["x"]
    assert np.array_equal(after[1].numpy(), np.broadcast_to(array, (3, 4)).astype(np.float32))
    assert (after[0] == -1).all()


def test_what_show_writes_set_reads_is_an_involution(editor: Editor) -> None:
    state = {"x": torch.randn(3, 5).to(torch.bfloat16)}
    torch.save(state, "a.pt")
    assert editor.ckpt("show", "a.pt", "x", "-o", "x.npy").code == 0
    assert torch.equal(editor.edited({"x": torch.zeros(3, 5).bfloat16()}, "x=@x.npy")["x"], state["x"])


# --- which names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "set_names"),
    [
        ("net=0", {"net.0.w", "net.0.b", "net.1.w"}),
        ("net.0=0", {"net.0.w", "net.0.b"}),
        ("*.w=0", {"net.0.w", "net.1.w", "other.w"}),
        ("net.*=0", {"net.0.w", "net.0.b", "net.1.w"}),
        ("*=0", {"net.0.w", "net.0.b", "net.1.w", "other.w", "a=b", "x[0]", "x"}),
        ("net.?.w[0]*=0", {"net.0.w", "net.1.w"}),
        ('"a=b"=0', {"a=b"}),
        ("'a=b'[1]=0", {"a=b"}),
        ("x[0]=0", {"x[0]"}),
        ("x[0][1]=0", {"x[0]"}),
        ("x[1]=0", {"x"}),
        ("other.w*=0", {"other.w"}),
    ],
)
def test_one_assignment_may_set_many_names(editor: Editor, assignment: str, set_names: set[str]) -> None:
    names = ["net.0.w", "net.0.b", "net.1.w", "other.w", "a=b", "x[0]", "x"]
    after = editor.edited({name: torch.ones(2) for name in names}, assignment)
    assert {name for name in names if not after[name].all()} == set_names


def test_assignments_see_what_those_before_them_did(editor: Editor) -> None:
    shared = torch.tensor([1.0, 2.0, 3.0])
    after = editor.edited({"a": shared, "b": shared, "c": shared[1:]}, "a+=1", "b[1]*=10", "c=[5,6]", "a[::-1]-=1")
    assert after["a"].tolist() == after["b"].tolist() == [1, 4, 5]
    assert after["c"].tolist() == [4, 5]


def test_one_bad_assignment_undoes_all(editor: Editor) -> None:
    torch.save({"x": torch.ones(2), "i": torch.ones(2, dtype=torch.int8)}, "a.pt")
    before = Path("a.pt").read_bytes()
    for bad in ("i=1.5", "nope=1", "x[2]=0", "x=[1,2,3]", "x=abc", "x"):
        assert editor.ckpt("set", "a.pt", "x=0", "i[0]=5", bad).code == 2
        assert Path("a.pt").read_bytes() == before
    assert os.listdir() == ["a.pt"]


@pytest.mark.parametrize(
    "args",
    [
        *(["x"], ["=1"], ["x="], ["x=1", "y=1"], ["x=1 2"], ["x=0x10"], ["x=@"], ["x=[]"], ["x=[1,2"], ["x=[1,[2]]"]),
        *(["x=[null]"], ['x=[{"a":1}]'], ["x=" + "[" * 5000], ["x[0,0]=1"], ["x[1.5]=1"], ["x[a]=1"], ["x[]=1"]),
        *(["x[=1"], ["x[0:0]=[1,2]"], ["x==1"], ["x=1+"], ["x=1e999"], ["x=[1e999,1,1]"], ["x=9" + "9" * 5000]),
    ],
    ids=lambda args: args[-1][:12],
)
def test_what_makes_no_sense_is_refused_in_one_line(editor: Editor, args: list[str]) -> None:
    torch.save({"x": torch.ones(3)}, "a.pt")
    answer = editor.ckpt("set", "a.pt", *args)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) <= 2
    assert len(answer.err) < 400
    assert torch.load("a.pt")["x"].tolist() == [1, 1, 1]


def test_a_numpy_file_of_anything_but_numbers_is_refused_and_never_unpickled(editor: Editor) -> None:
    np.save("o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save("s.npy", np.array(["a", "b"]))
    np.savez("z.npz", a=np.ones(2))
    Path("empty.npy").touch()
    Path("cut.npy").write_bytes(b"\x93NUMPY\1\0")
    for name in ("o.npy", "s.npy", "z.npz", "empty.npy", "cut.npy"):
        torch.save({"x": torch.ones(2)}, "a.pt")
        assert "numbers" in problem_of(editor.ckpt("set", "a.pt", f"x=@{name}"), name)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_views_keep_their_strides_and_share_what_is_set(editor: Editor) -> None:
    flat = torch.arange(24.0)
    state = {
        "flat": flat,
        "t": flat.reshape(4, 6).t(),
        "every": flat[::3],
        "tail": flat[20:],
        "apart": torch.arange(24.0),
    }
    after = editor.edited(state, "t[5,:2]=[-1,-2]", "every[-1]=9")
    flat[5], flat[11], flat[21] = -1, -2, 9
    for name, tensor in state.items():
        assert torch.equal(after[name], tensor)
        assert after[name].stride() == tensor.stride()
        assert after[name].storage_offset() == tensor.storage_offset()


def test_an_expanded_tensor_takes_one_value_for_elements_that_are_one(editor: Editor) -> None:
    row = torch.arange(3.0)
    state = {"x": row.expand(4, 3), "row": row}
    assert editor.edited(state, "x=5")["row"].tolist() == [5, 5, 5]
    assert editor.edited(state, "x[2]=[7,8,9]")["x"].tolist() == [[7, 8, 9]] * 4
    assert editor.edited(state, "x[:,1]=4")["row"].tolist() == [0, 4, 2]
    for assignment in ("x+=1", "x=[[1],[2],[3],[4]]", "x=[1,2,3]"):
        assert editor.refused(state, assignment) == (
            "elements of tensor 'x' share bytes with each other: only one value for all can be set"
        )


def test_elements_that_overlap_within_a_tensor_take_one_value_only(editor: Editor) -> None:
    state = {"x": torch.arange(6.0).as_strided((4, 3), (1, 1))}
    assert editor.edited(state, "x[1]=9")["x"].tolist()[0] == [0, 9, 9]
    assert "share bytes" in editor.refused(state, "x*=2")


def test_0_d_and_empty_tensors_can_be_set(editor: Editor) -> None:
    state = {"s": torch.tensor(1.0), "e": torch.empty(0, 3), "n": torch.tensor(3)}
    after = editor.edited(state, "s=5", "s[...]*=2", "e=1", "e[:,0]+=2", "n+=[4]")
    assert (after["s"].item(), after["n"].item(), after["e"].shape) == (10, 7, (0, 3))
    assert "out of range" in editor.refused(state, "e[0]=1")
    assert "does not fit" in editor.refused(state, "s[0]=1")


def test_conjugated_and_negated_views_take_the_values_that_they_show(editor: Editor) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    state = {"c": values.conj(), "raw": values, "n": values.clone().conj().imag}
    after = editor.edited(state, "c[0]=5+6j", "n[1]=9", "n[0]+=1")
    assert (after["c"].is_conj(), after["n"].is_neg()) == (True, True)
    assert after["c"].tolist() == [5 + 6j, 3 + 4j]
    assert after["raw"].tolist() == [5 - 6j, 3 - 4j]
    assert after["n"].tolist() == [-1, 9]


def test_a_tensor_larger_than_a_piece_is_set_whole(editor: Editor) -> None:
    values = np.arange(6_000_000, dtype=np.float32)
    np.save("v.npy", values)
    state = {"x": torch.zeros(2000, 3000), "t": torch.zeros(3000, 2000).t()}
    after = editor.edited(state, "x=[0]", "x+=1", "t=-1", "t[::500,::-1]*=2")
    assert (after["x"] == 1).all()
    assert after["t"].sum() == -6_000_000 - 4 * 3000
    np.save("v.npy", values.reshape(2000, 3000))
    after = editor.edited(state, "x=@v.npy", "t+=@v.npy", "x[:,::-1]=@v.npy")
    assert torch.equal(after["x"], torch.from_numpy(values.reshape(2000, 3000)).flip(1))
    assert torch.equal(after["t"], torch.from_numpy(values.reshape(2000, 3000)))
