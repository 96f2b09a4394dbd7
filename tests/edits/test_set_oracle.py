"""Random edits of random checkpoints, with the same edit made by torch as the oracle."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from examples import most
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, basic_indices
from safetensors.torch import load_file, save_file
from set_elements import edit, edited_by_torch, indexed_by_torch, same_states

import ckpt_cli
from ckpt_cli.errors import CkptError
from ckpt_cli.ops.show import spell_index

FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
FLOATS = ["float64", "float32", "float16", "bfloat16", *FLOAT8]
SIGNED = ["int64", "int32", "int16", "int8"]
UNSIGNED = ["uint8", "uint16", "uint32", "uint64"]
COMPLEX = ["complex128", "complex64"]
DTYPES = [*FLOATS, *SIGNED, *UNSIGNED, "bool", *COMPLEX]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "offset"]

State = dict[str, torch.Tensor]


def laid_out(shape: tuple[int, ...], dtype: str, layout: str) -> torch.Tensor:
    """Small numbers, which every dtype holds exactly, in a tensor of some layout with about the given shape."""
    numel = 2
    for size in shape:
        numel *= size
    values = (torch.arange(numel, dtype=torch.float32) % 4).to(getattr(torch, dtype))
    whole = values[: numel // 2].reshape(shape)
    if layout == "transposed":
        return whole.permute(tuple(reversed(range(whole.ndim))))
    if layout == "strided" and whole.ndim:
        return values.reshape(*shape, 2)[..., 0]
    if layout == "expanded":
        return whole.unsqueeze(-1).expand(*shape, 3)
    if layout == "offset":
        return values[numel // 2 :].reshape(shape)
    return whole


@st.composite
def edits(draw: st.DrawFn, layouts: list[str]) -> tuple[torch.Tensor, Any, str, Any]:
    """A tensor, an index into it, an operator and a number."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.one_of(st.just(()), array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4), st.just((0, 3))))
    tensor = laid_out(shape, dtype, draw(st.sampled_from(layouts)))
    index = draw(basic_indices(tuple(tensor.shape), allow_newaxis=False))
    operators = ["", "+", "-", "*", "/"]
    if dtype == "bool":
        operators = [""]
    elif dtype not in FLOATS and dtype not in COMPLEX:
        operators = ["", "+", "*"]
    number = draw(st.integers(0, 1) if dtype == "bool" else st.integers(1, 5))
    value: Any = bool(number) if dtype == "bool" else number
    if dtype in COMPLEX and draw(st.booleans()):
        value = complex(number, draw(st.integers(-3, 3)))
    elif dtype in FLOATS and draw(st.booleans()):
        value = number / 2
    return tensor, index, draw(st.sampled_from(operators)), value


def shares_elements(tensor: torch.Tensor, index: Any) -> bool:
    """Whether the part has elements that are one."""
    part = indexed_by_torch(tensor, index)
    return (
        any(size > 1 and step == 0 for size, step in zip(part.shape, part.stride(), strict=True)) and part.numel() > 0
    )


def spelled(value: Any) -> str:
    """A number as the command line takes it."""
    return str(value).lower().strip("()")


@settings(max_examples=most(250), deadline=None)
@given(edits(LAYOUTS))
def test_set_on_a_pt_does_what_torch_does(drawn: tuple[torch.Tensor, Any, str, Any]) -> None:
    tensor, index, operator, value = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save({"x": tensor, "tied": tensor, "other": torch.ones(3)}, path)
        old = path.read_bytes()
        oracle = torch.load(path)
        text = spell_index(index if isinstance(index, tuple) else (index,)) or "..."
        assignment = f"x[{text}]{operator}={spelled(value)}"
        if operator and shares_elements(tensor, index):
            assert refusal(path, assignment) is not None
            assert path.read_bytes() == old
            return
        edit(path, assignment)
        edited_by_torch(oracle["x"], index, operator, value)
        after = torch.load(path)
        assert same_states(after, oracle)
        assert [t.stride() for t in after.values()] == [t.stride() for t in oracle.values()]
        assert after["x"].data_ptr() == after["tied"].data_ptr()
        assert same_states(ckpt_cli.load(path), oracle)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


@settings(max_examples=most(200), deadline=None)
@given(edits(["contiguous"]).filter(lambda drawn: drawn[0].dtype != torch.complex128))
def test_set_on_a_safetensors_does_what_torch_does(drawn: tuple[torch.Tensor, Any, str, Any]) -> None:
    tensor, index, operator, value = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({"x": tensor, "other": torch.ones(3)}, path)
        oracle = {name: tensor.clone() for name, tensor in load_file(path).items()}  # load_file maps the file
        text = spell_index(index if isinstance(index, tuple) else (index,)) or "..."
        edit(path, f"x[{text}]{operator}={spelled(value)}")
        edited_by_torch(oracle["x"], index, operator, value)
        assert same_states(load_file(path), oracle)
        assert same_states(ckpt_cli.load(path), oracle)


def refusal(path: Path, assignment: str) -> CkptError | None:
    """The error that an edit ends in."""
    try:
        edit(path, assignment)
    except CkptError as error:
        return error
    return None
