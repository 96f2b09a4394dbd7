"""Casts say which floats they leave as they are, and refuse where they could cast nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import quietly

QUANTIZED = ("q", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
LEFT = {
    "meta": ("m", lambda: torch.ones(2, device="meta")),
    "quantized": QUANTIZED,
    "jagged": ("j", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "an array": ("a", lambda: np.ones(2)),
    "packed": ("x", lambda: torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
    "uninitialized": ("u", torch.nn.UninitializedParameter),
}
"""Floats, or what stands for floats, of which no cast is made."""

PARAMETRIZED = pytest.mark.parametrize(("name", "make"), LEFT.values(), ids=LEFT.keys())


def saved(path: Path, **value: Any) -> Path:
    """A file that torch writes."""
    with quietly():
        torch.save(value, path)
    return path


@PARAMETRIZED
def test_what_a_cast_leaves_is_named(tmp_path: Path, ckpt: Ckpt, name: str, make: Any) -> None:
    with quietly():
        path = saved(tmp_path / "m.pt", w=torch.ones(2), n=torch.arange(2), **{name: make()})
    done = ckpt("cast", path, "float16", "-n")
    assert (done.code, done.err.splitlines()[:2]) == (0, [f"{path}: would cast w", f"  left as they are: {name}"])
    done = ckpt("convert", path, tmp_path / "o.pt", "--dtype", "float16")
    assert (done.code, f"  left as they are: {name}\n" in done.err) == (0, True)
    told = json.loads(ckpt("convert", path, tmp_path / "o.pt", "--dtype", "float16", "--force", "--json").out)
    assert (told["tensors"], told["left"]) == (3, [name])
    told = json.loads(ckpt("cast", path, "float16", "--json").out)
    assert (told["changed"], told["left"]) == (["w"], [name])
    listed = json.loads(ckpt("ls", path, "w", "--json").out)["entries"]
    assert listed[0]["dtype"] == "float16"


@PARAMETRIZED
def test_a_cast_of_nothing_is_refused(tmp_path: Path, ckpt: Ckpt, name: str, make: Any) -> None:
    with quietly():
        path = saved(tmp_path / "m.pt", n=torch.arange(2), **{name: make()})
    before = path.read_bytes()
    for arguments in (["cast", path, "float16"], ["convert", path, tmp_path / "o.pt", "--dtype", "float16"]):
        done = ckpt(*arguments)
        assert done.code == 2
        assert done.err == f"ckpt: {path}: nothing of it can be cast to float16\n  {name}\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]
    assert path.read_bytes() == before


def test_only_what_was_selected_is_named_and_the_first_names_stand_for_many(tmp_path: Path, ckpt: Ckpt) -> None:
    many = {f"m{number:02}": torch.ones(2, device="meta") for number in range(30)}
    path = saved(tmp_path / "m.pt", a={"w": torch.ones(2), "x": torch.ones(1, device="meta")}, **many)
    done = ckpt("cast", path, "float16", "a", "-n")
    assert "  left as they are: a.x\n" in done.err
    done = ckpt("cast", path, "float16", "-n")
    assert ", m06 and 23 more\n" in done.err
    assert len(json.loads(ckpt("cast", path, "float16", "-n", "--json").out)["left"]) == 31


def test_a_conversion_of_what_is_of_the_dtype_already_needs_no_cast(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "m.pt", w=torch.ones(2, dtype=torch.float16), a=np.ones(2), n=torch.arange(2))
    told = json.loads(ckpt("convert", path, tmp_path / "o.pt", "--dtype", "float16", "--json").out)
    assert told["left"] == ["a"]
    path = saved(tmp_path / "n.pt", n=torch.arange(2))
    assert ckpt("convert", path, tmp_path / "p.pt", "--dtype", "float16").code == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_nested_tensors_are_cast(tmp_path: Path, ckpt: Ckpt, dtype: torch.dtype) -> None:
    with quietly():
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3), torch.randn(1, 3)])
        path = saved(tmp_path / "m.pt", nested=nested, parts={"sparse": torch.eye(3).to_sparse_csr()})
        assert ckpt("convert", path, tmp_path / "o.pt", "--dtype", str(dtype)[6:]).code == 0
        told = json.loads(ckpt("cast", path, str(dtype)[6:], "--json").out)
        assert (told["changed"], told["left"]) == (["nested", "parts.sparse"], [])
        for file in (path, tmp_path / "o.pt"):
            found = torch.load(file)
            assert found["nested"].dtype == found["parts"]["sparse"].dtype == dtype
            for one, other in zip(found["nested"].unbind(), nested.unbind(), strict=True):
                assert torch.equal(one, other.to(dtype))
