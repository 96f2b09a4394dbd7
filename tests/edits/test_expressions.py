"""Tensors that `set --new` makes of others: held against torch, in any pieces, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckpt_cli import limits
from ckpt_cli.parallel import made

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors are the same bit for bit."""
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and one.equal(other)


def state() -> State:
    torch.manual_seed(0)
    return {
        "q": torch.randn(6, 8), "k": torch.randn(3, 8), "v": torch.randn(3, 8), "bias": torch.randn(8),
        "h.w": torch.randn(4, 6).bfloat16(), "h.s": torch.randn(4, 1).bfloat16(), "f16": torch.randn(6).half(),
        "scale": torch.tensor(3.5), "d": torch.randn(6, 8, dtype=torch.float64), "i": torch.arange(24).reshape(2, 3, 4),
        "u8": torch.arange(6, dtype=torch.uint8), "flag": torch.tensor([True, False]), "c": torch.randn(2, 2) + 1j,
        "view": torch.randn(9, 7).t(), "odd-name": torch.ones(2), "7.w": torch.ones(3), "empty": torch.ones(0, 8),
    }  # fmt: skip


def wide(text: str, names: State) -> torch.Tensor:
    """Compute in float32 and round once, as is promised."""
    return eval(text, {"torch": torch}, names)


CASES: dict[str, Any] = {
    "cat(q, k, v)": lambda t: torch.cat([t["q"], t["k"], t["v"]]),
    "cat(q.T, k.T, dim=1)": lambda t: torch.cat([t["q"].T, t["k"].T], 1),
    "cat([q, empty, k], dim=-2)": lambda t: torch.cat([t["q"], t["k"]]),
    "stack(k, v)": lambda t: torch.stack([t["k"], t["v"]]),
    "stack(k, v, dim=2)": lambda t: torch.stack([t["k"], t["v"]], 2),
    "stack(scale, scale*2)": lambda t: torch.stack([t["scale"], t["scale"] * 2]),
    "split(q, 3)[1]": lambda t: t["q"][2:4],
    "split(q, [1, 5])[-1]": lambda t: t["q"][1:],
    "split(q, 2, dim=1)[1]": lambda t: t["q"][:, 4:],
    "cat(split(q, 3))": lambda t: t["q"],
    "q[0:10, :]": lambda t: t["q"],
    "q[::-2, 1]": lambda t: t["q"][torch.tensor([5, 3, 1]), 1],
    "i[..., 2]": lambda t: t["i"][..., 2],
    "i[1]": lambda t: t["i"][1],
    "q.T": lambda t: t["q"].T,
    "T(q)": lambda t: t["q"].T,
    "(q+1).T": lambda t: (t["q"] + 1).T,
    "transpose(i, 0, 2)": lambda t: t["i"].transpose(0, 2),
    "i.transpose(0, -1)": lambda t: t["i"].transpose(0, 2),
    "permute(i, 2, 0, 1)": lambda t: t["i"].permute(2, 0, 1),
    "permute(i, [1, 2, 0])": lambda t: t["i"].permute(1, 2, 0),
    "q.reshape(2, 3, 8)": lambda t: t["q"].reshape(2, 3, 8),
    "reshape(q.T, -1, 4)": lambda t: t["q"].T.reshape(-1, 4),
    "reshape(view, 63)[1:60:7]": lambda t: t["view"].reshape(63)[1:60:7],
    "reshape(cat(q, k), 3, 3, 8).permute(1, 0, 2)": lambda t: torch.cat(
        [t["q"], t["k"]]
    ).reshape(3, 3, 8).permute(1, 0, 2),
    "cat(q, k)[::2]": lambda t: torch.cat([t["q"], t["k"]])[::2],
    "cat(q, k, v)[10:1:-3, ::-1]": lambda t: torch.cat([t["q"], t["k"], t["v"]]).flip(0)[1:10:3].flip(1),
    "cat(q, k)[7]": lambda t: t["k"][1],
    "cat(q, k)[2:2]": lambda t: t["q"][2:2],
    "permute(cat(q, k), 1, 0)[2:5]": lambda t: torch.cat([t["q"], t["k"]]).T[2:5],
    "zeros([2, 3])": lambda t: torch.zeros(2, 3),
    "ones((4,), int8)": lambda t: torch.ones(4, dtype=torch.int8),
    "zeros(3, dtype=bool)": lambda t: torch.zeros(3, dtype=torch.bool),
    "full([2, 2], -1.5, float16)": lambda t: torch.full((2, 2), -1.5, dtype=torch.float16),
    "full(2, 7)": lambda t: torch.full((2,), 7),
    "cat(q, zeros([2, 8]), ones([1, 8]))": lambda t: torch.cat([t["q"], torch.zeros(2, 8), torch.ones(1, 8)]),
    "q + bias": lambda t: t["q"] + t["bias"],
    "q*2 - k[0:1]/4": lambda t: t["q"] * 2 - t["k"][:1] / 4,
    "-q": lambda t: -t["q"],
    "1/3*q": lambda t: t["q"] * (1 / 3),
    "(q - 1) * (q + 1)": lambda t: (t["q"] - 1) * (t["q"] + 1),
    "q / k[0]": lambda t: t["q"] / t["k"][0],
    "d * q": lambda t: t["d"] * t["q"],
    "h.w * h.s + 0.1": lambda t: (t["h.w"].float() * t["h.s"].float() + 0.1).bfloat16(),
    "h.w[0] + f16": lambda t: t["h.w"][0].float() + t["f16"].float(),
    "h.w * scale": lambda t: (t["h.w"].float() * 3.5).bfloat16(),
    "i * 2 + 1": lambda t: t["i"] * 2 + 1,
    "i * 0.5": lambda t: t["i"] * 0.5,
    "i / 7": lambda t: t["i"] / 7,
    "u8 + i[0, 0, 1]": lambda t: t["u8"] + 1,
    "cast(q*q, float16)": lambda t: (t["q"] * t["q"]).half(),
    "cast(i, float32).reshape(6, 4)": lambda t: t["i"].float().reshape(6, 4),
    "cast(flag, uint8)": lambda t: t["flag"].to(torch.uint8),
    "cast(q, bfloat16) + 0": lambda t: t["q"].bfloat16() + 0,
    "copy(c)": lambda t: t["c"],
    "c[1].reshape(2, 1)": lambda t: t["c"][1].reshape(2, 1),
    "copy(view)": lambda t: t["view"],
    '"odd-name" * 2': lambda t: t["odd-name"] * 2,
    "7.w * 2": lambda t: t["7.w"] * 2,
    "copy(scale)": lambda t: t["scale"],
}  # fmt: skip


@pytest.mark.parametrize("piece", [7, 256 << 10])
@pytest.mark.parametrize("jobs", [1, 3])
def test_each_expression_is_what_torch_makes(
    ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, piece: int, jobs: int
) -> None:
    monkeypatch.setattr(made, "PIECE", piece)
    tensors = state()
    torch.save(tensors, "m.pt")
    arguments = [f"new{number}={text}" for number, text in enumerate(CASES)]
    answer = ckpt("set", "m.pt", *arguments, "--new", "-j", jobs, "-o", "out.pt")
    assert answer.code == 0, answer.err
    found = torch.load("out.pt")
    for number, (text, make) in enumerate(CASES.items()):
        assert same(found[f"new{number}"], make(tensors)), text
    assert list(found)[: len(tensors)] == list(tensors)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_tensors_of_other_files_are_operands(ckpt: Ckpt, name: str) -> None:
    tensors = {"w": torch.randn(5, 4), "b": torch.randn(4)}
    Path("sub").mkdir()
    save_file({"w": torch.randn(2, 4), "an-odd name": torch.ones(4)}, "sub/o-1.safetensors")
    other = load_file("sub/o-1.safetensors")
    (save_file if name.endswith("safetensors") else torch.save)(tensors, name)
    edits = ["a=cat(w, sub/o-1.safetensors:w)", "c=sub/o-1.safetensors:w-0.5",
             'd=copy("sub/o-1.safetensors:an-odd name")', 'e=sub/o-1.safetensors:"an-odd name" + b']  # fmt: skip
    answer = ckpt("set", name, *edits, "--new", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["changed"] == ["a", "c", "d", "e"]
    found = load_file(name) if name.endswith("safetensors") else torch.load(name)
    assert same(found["a"], torch.cat([tensors["w"], other["w"]]))
    assert same(found["c"], other["w"] - 0.5)
    assert same(found["d"], other["an-odd name"])
    assert same(found["e"], other["an-odd name"] + tensors["b"])
    assert ckpt("check", name, "--deep").code == 0


def test_normal_numbers_depend_on_seed_name_and_place_only(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, "m.pt")
    shape = "[100, 90]"
    edits = [f"a=normal({shape}, std=0.02, seed=1)", f"b=normal({shape}, std=0.02, seed=1)",
             f"c=normal({shape}, mean=5, dtype=bfloat16, seed=1)", f"d=normal({shape}, std=0.02, seed=2)"]  # fmt: skip
    assert ckpt("set", "m.pt", *edits, "--new", "-j", 1, "-o", "one.pt").code == 0
    monkeypatch.setattr(made, "PIECE", 1001)
    assert ckpt("set", "m.pt", *edits, "--new", "-j", 4, "-o", "two.pt").code == 0
    one, two = torch.load("one.pt"), torch.load("two.pt")
    assert all(same(one[name], two[name]) for name in one)
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], one["d"])
    for name, mean, std in (("a", 0, 0.02), ("b", 0, 0.02), ("c", 5, 1)):
        values = one[name].double()
        assert abs(values.mean().item() - mean) < 5 * std / 9000**0.5
        assert abs(values.std().item() / std - 1) < 0.05
    assert one["a"].abs().max() < 0.1


SHAPES = {"a": (4, 6), "b": (6,), "s": (4, 1), "z": ()}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """Expressions of the shape 4 x 6 in the words that Python's torch takes too."""
    if not depth:
        return draw(st.sampled_from(["a", "a", "(a.T).T", "a[::-1][::-1]" if False else "a[0:4]"]))
    one = draw(expressions(depth - 1))
    kind = draw(st.sampled_from(["+", "-", "*", "number", "small", "turn", "shape", "cut", "leaf"]))
    if kind in "+-*":
        return f"({one} {kind} {draw(expressions(depth - 1))})"
    if kind == "number":
        return f"({one} {draw(st.sampled_from('+-*'))} {draw(st.sampled_from(['2', '0.3', '1e-3']))})"
    if kind == "small":
        return f"({one} {draw(st.sampled_from('+-*/'))} {draw(st.sampled_from('bsz'))})"
    return {"turn": f"({one}).transpose(0, 1).reshape(4, 6)", "shape": f"({one}).reshape(2, 12).reshape(4, 6)",
            "cut": f"({one})[:, 1:5].reshape(2, 8)[:, 0:6].reshape(2, 6)[0:1] * a", "leaf": "a"}[kind]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expressions())
def test_any_expression_in_any_pieces_is_what_torch_computes(ckpt: Ckpt, text: str) -> None:
    torch.manual_seed(1)
    tensors = {name: torch.randn(shape) + 2 for name, shape in SHAPES.items()}
    torch.save(tensors, "m.pt")
    before = made.PIECE
    try:
        made.PIECE = 5
        answer = ckpt("set", "m.pt", f"new=copy({text})", "--new", "-o", "out.pt")
    finally:
        made.PIECE = before
    assert answer.code == 0, answer.err
    assert same(torch.load("out.pt")["new"], wide(text, tensors))


def test_a_large_tensor_is_made_in_pieces_of_many_shapes(ckpt: Ckpt) -> None:
    tensors = {"w": torch.randn(1100, 900), "b": torch.randn(1100).bfloat16()}
    torch.save(tensors, "m.pt")
    edits = ["t=w.T*b", "c=cat(w.T, w.T[:, 5:17], dim=1)", "s=stack(w, w*2, dim=2)", "n=cast(w, float16)"]
    assert ckpt("set", "m.pt", *edits, "--new", "-o", "out.pt").code == 0
    found, w = torch.load("out.pt"), tensors["w"]
    assert same(found["t"], w.T * tensors["b"].float())
    assert same(found["c"], torch.cat([w.T, w.T[:, 5:17]], 1))
    assert same(found["s"], torch.stack([w, w * 2], 2))
    assert same(found["n"], w.half())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cat(q, k", "')' is missing (character 9 of 'cat(q, k')"),
        ("cat(q, x)", "nothing is called 'x'"),
        ("cat(q, h.w)", "cat of bfloat16, float32 (character 1 of"),
        ("cat(q, bias)", "cannot be joined along dimension 0 (character 1 of"),
        ("cat(q, k, dim=1)", "cannot be joined along dimension 1"),
        ("cat(q, k, axis=1)", "cat has no option 'axis' (character 16 of"),
        ("stack(q, k)", "cannot be stacked"),
        ("split(q, 4)[0]", "6 rows cannot be split into 4 equal parts (character 10 of"),
        ("split(q, [1, 2])[0]", "the sizes come to 3"),
        ("split(q, 3)", "split makes 3 tensors"),
        ("split(q, 3)[3]", "an index from 0 to 2"),
        ("q[9]", "index 9 is out of range for size 6 in shape [6, 8] (character 2 of"),
        ("q[a]", "'a' is not an index"),
        ("q * h.w", "shapes [6, 8] and [4, 6] do not go together (character 3 of"),
        ("q + flag", "nothing is computed with bool"),
        ("reshape(q, 5, -1)", "[6, 8] does not become [5, -1]"),
        ("permute(q, 0, 0)", "permute takes each of 2 dimensions once"),
        ("q.flatten(1)", "'q.flatten' is not a function"),
        ("concat(q, k)*2", "'concat' is not a function (character 1 of"),
        ("cast(q, float17)", "'float17' is not a dtype"),
        ("cast(q*1e38, float16)", "would become infinite in float16"),
        ("cast(q, int8)", "int8 cannot hold"),
        ("q * 1e39", "1e+39 is too large for float32"),
        ("i * 9000000000000000000", "int64 cannot hold a result"),
        ("normal([2], std=-1)", "std is not negative"),
        ("zeros([-1])", "is not a shape that can be made"),
        ("zeros([1000000000000])", "is not a shape that can be made"),
        ("zeros([100000, 1000000])", "would have 400,000,000,000 bytes"),
        ("full([2], 1e10, float16)", "float16 cannot hold"),
        ("no.pt:w * q", "there is no file 'no.pt' (character 1 of"),
        ("q * 2 2", "unexpected '2' (character 7 of"),
        ("q", "'q' is the name of a tensor, and could be a text"),
        ("h.v * 2", "nothing is called 'h.v'"),
        ("copy(q)[" + "0" * 30 + "]", "is not an index"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_says_where(ckpt: Ckpt, value: str, message: str) -> None:
    torch.save(state(), "m.pt")
    before = Path("m.pt").read_bytes()
    for more in ([], ["-n"]):
        answer = ckpt("set", "m.pt", f"new={value}", "--new", *more)
        assert answer.code == 2, value
        assert message in answer.err.splitlines()[0]
        assert "hint" not in answer.err.splitlines()[0]
        assert len(answer.err.splitlines()) <= 2
    assert Path("m.pt").read_bytes() == before


@pytest.mark.parametrize(
    "value",
    ["(" * 500 + "q", "-" * 500 + "q", "copy(" + "+".join(["q"] * 500) + ")", "cat(" * 300 + "q", "q" + "[0:1]" * 500,
     "q.T" + ".T" * 400 + "*1", "cat(" + "q," * 60_000 + "q)", "copy(q" + ".transpose(0, 1)" * 300 + ")"],
)  # fmt: skip
def test_an_expression_that_is_too_long_or_too_deep_is_refused_or_a_text(ckpt: Ckpt, value: str) -> None:
    torch.save(state(), "m.pt")
    answer = ckpt("set", "m.pt", f"new={value}", "--new", "-o", "out.pt")
    if answer.code == 0:
        assert torch.load("out.pt")["new"] == value
    else:
        assert answer.code == 2
        assert "Traceback" not in answer.err
        assert any(word in answer.err for word in ("deep", "too long", "more than", "nothing is called"))
    assert limits.EXPRESSION_DEPTH < 100


@pytest.mark.parametrize(
    "text", ["hello", "a-b", "v1.0/2", "(maybe)", "x[0]", "runs/7:best", "2024-01-01", "a*b", '"cat(q)"']
)
def test_texts_stay_texts(ckpt: Ckpt, text: str) -> None:
    torch.save({"q": torch.ones(2)}, "m.pt")
    assert ckpt("set", "m.pt", f"note={text}", "--new").code == 0
    assert torch.load("m.pt")["note"] == text.strip('"')


def test_dtype_converts_what_an_expression_makes(ckpt: Ckpt) -> None:
    tensors = state()
    torch.save(tensors, "m.pt")
    assert ckpt("set", "m.pt", "new=q*k[0]", "--new", "--dtype", "bfloat16").code == 0
    assert same(torch.load("m.pt")["new"], (tensors["q"] * tensors["k"][0]).bfloat16())


def test_cast_lets_values_be_lost(ckpt: Ckpt) -> None:
    tensors = state()
    torch.save(tensors, "m.pt")
    assert ckpt("set", "m.pt", "new=cast(q*1e30, float16)", "whole=cast(q*10, int8)", "--new", "--cast").code == 0
    found = torch.load("m.pt")
    assert same(found["new"], (tensors["q"] * 1e30).half())
    assert same(found["whole"], (tensors["q"] * 10).to(torch.int8))


def test_pieces_that_are_copied_are_not_made(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_cli.parallel import lazy

    def refuse(*_: object) -> None:
        raise AssertionError("bytes were made")

    monkeypatch.setattr(lazy.EvaluatedBytes, "__init__", refuse)
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(5, 3)}
    save_file(tensors, "m.safetensors")
    assert ckpt("set", "m.safetensors", "new=cat(a, b[1:3], a)[1:].reshape(3, 9)[0:2]", "--new").code == 0
    wanted = torch.cat([tensors["a"], tensors["b"][1:3], tensors["a"]])[1:].reshape(3, 9)[:2]
    assert same(load_file("m.safetensors")["new"], wanted)
