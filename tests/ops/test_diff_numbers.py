"""The numbers of `diff` against torch: mean error, relative L2, cosine; its totals, `--stat` and `--ignore-dtype`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt

State = dict[str, torch.Tensor]


def saved(folder: Path, **states: State) -> list[Path]:
    paths = []
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
        paths.append(folder / f"{name}.pt")
    return paths


def differences(ckpt: Ckpt, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ckpt("diff", *arguments, "--json").out)
    return found


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The values as one vector of float64, complex ones as pairs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().flatten()


def assert_as_torch(change: dict[str, Any], a: torch.Tensor, b: torch.Tensor) -> None:
    x, y = flat(a), flat(b)
    wide = torch.complex128 if a.is_complex() else torch.float64
    distance = (a.to(wide) - b.to(wide)).abs()
    assert change["mean_abs"] == pytest.approx(distance.mean().item(), rel=1e-5)
    assert change["relative_l2"] == pytest.approx(((x - y).norm() / y.norm()).item(), rel=1e-5)
    cosine = (x @ y / (x.norm() * y.norm())).item()
    assert change["cosine"] == pytest.approx(cosine, rel=1e-5, abs=1e-6)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 1024, 5000])
def test_errors_norms_and_cosine_are_those_of_torch(dtype: torch.dtype, size: int, tmp_path: Path, ckpt: Ckpt) -> None:
    torch.manual_seed(size)
    is_float = dtype.is_floating_point or dtype.is_complex
    a = torch.randn(size, dtype=dtype) if is_float else torch.randint(-50, 50, (size,), dtype=dtype)
    b = a + torch.ones(size, dtype=dtype)
    (change,) = differences(ckpt, *saved(tmp_path, a={"w": a}, b={"w": b}))["changed"]
    assert_as_torch(change, a, b)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e15, 1e30])
def test_squares_neither_overflow_nor_vanish(scale: float, tmp_path: Path, ckpt: Ckpt) -> None:
    torch.manual_seed(0)
    a = torch.randn(3000) * scale
    b = a * (1 + 1e-3 * torch.randn(3000))
    (change,) = differences(ckpt, *saved(tmp_path, a={"w": a}, b={"w": b}))["changed"]
    assert_as_torch(change, a, b)


def test_chunks_that_are_the_same_count_in_the_norms(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.manual_seed(0)
    a = torch.randn(3_000_000)
    b = a.clone()
    b[2_999_999] += 1000
    (change,) = differences(ckpt, *saved(tmp_path, a={"w": a}, b={"w": b}))["changed"]
    assert change["differing"] == 1
    assert_as_torch(change, a, b)


def test_places_that_are_not_finite_are_left_out(tmp_path: Path, ckpt: Ckpt) -> None:
    a = torch.tensor([1.0, 2.0, math.nan, math.inf, 5.0])
    b = torch.tensor([1.5, math.nan, 3.0, 4.0, 5.0])
    (change,) = differences(ckpt, *saved(tmp_path, a={"w": a}, b={"w": b}))["changed"]
    assert_as_torch(change, a[[0, 4]], b[[0, 4]])


def test_of_zeros_there_is_no_cosine(tmp_path: Path, ckpt: Ckpt) -> None:
    paths = saved(tmp_path, a={"w": torch.ones(3)}, b={"w": torch.zeros(3)})
    (change,) = differences(ckpt, *paths)["changed"]
    assert (change["mean_abs"], change["relative_l2"], change["cosine"]) == (1.0, "Infinity", None)


def layers(count: int) -> State:
    torch.manual_seed(0)
    return {f"layers.{number}.weight": torch.randn(16, 16) for number in range(count)} | {"head": torch.randn(4)}


def test_a_table_ends_in_the_totals(tmp_path: Path, ckpt: Ckpt) -> None:
    a = layers(6)
    b = {name: tensor.clone() for name, tensor in a.items()}
    for number in range(3):
        b[f"layers.{number}.weight"] += number + 1
    del b["head"]
    b["new"], b["other"] = torch.ones(1), torch.ones(1)
    paths = saved(tmp_path, a=a, b=b)
    assert ckpt("diff", *paths, "-f", "table").out.splitlines()[-1] == "3 equal, 3 differ, 1 only in A, 2 only in B"
    assert differences(ckpt, *paths)["tensors"] == {"equal": 3, "differ": 3, "only_a": 1, "only_b": 2}
    assert "equal," not in ckpt("diff", *paths).out
    stat = ckpt("diff", *paths, "--stat", "-f", "table").out.splitlines()
    (row,) = [line for line in stat if line.startswith("layers.[N].weight")]
    assert row.split()[1:3] == ["3", "value"]
    assert row.endswith("+" * 40)
    assert stat[-1] == "3 equal, 3 differ, 1 only in A, 2 only in B"
    assert ckpt("diff", *paths, "--stat").code == 1


def test_equal_checkpoints_print_nothing_and_count_all_as_equal(tmp_path: Path, ckpt: Ckpt) -> None:
    a, b = saved(tmp_path, a=layers(2), b=layers(2))
    assert ckpt("diff", a, b, "-f", "table") == ckpt("diff", a, b, "--stat") == ckpt("diff", a, a)
    assert ckpt("diff", a, b).out == ""
    assert differences(ckpt, a, b)["tensors"] == {"equal": 3, "differ": 0, "only_a": 0, "only_b": 0}


def test_dtypes_may_be_ignored_but_values_are_not(tmp_path: Path, ckpt: Ckpt) -> None:
    half = {name: tensor.bfloat16() for name, tensor in layers(2).items()}
    a, b, c = saved(tmp_path, a=half, b={name: tensor.float() for name, tensor in half.items()}, c=layers(2))
    assert ckpt("diff", a, b).code == 1
    assert ckpt("diff", a, b, "--ignore-dtype").out == ""
    assert ckpt("diff", a, b, "--ignore-dtype").code == 0
    changes = differences(ckpt, a, c, "--ignore-dtype")["changed"]
    assert {change["what"] for change in changes} == {"value"}


def test_quiet_stops_with_the_same_exit_codes(tmp_path: Path, ckpt: Ckpt) -> None:
    a, b = saved(tmp_path, a=layers(2), b={name: tensor + 1 for name, tensor in layers(2).items()})
    assert ckpt("diff", a, b, "-q").code == 1
    assert ckpt("diff", a, b, "-q").out == ""
