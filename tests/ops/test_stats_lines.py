"""`ckpt stats --by row|column`: against torch, line by line, however the chunks are cut."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

import ckpt_cli
from ckpt_cli import limits
from ckpt_cli.ops import stats_lines


def lines_of(ckpt: Ckpt, *arguments: object) -> list[dict[str, Any]]:
    """The rows of the JSON."""
    done = ckpt("stats", "--json", *arguments)
    assert done.code == 0, done.err
    rows: list[dict[str, Any]] = json.loads(done.out)["tensors"]
    return rows


def expected(values: torch.Tensor) -> dict[str, Any]:
    """The numbers of one line by torch, as the JSON has them."""
    wide = values.double().reshape(-1)
    finite = wide[wide.isfinite()]
    some = len(finite) > 0
    whole = not values.dtype.is_floating_point
    return {
        "min": (int if whole else float)(finite.min()) if some else None,
        "max": (int if whole else float)(finite.max()) if some else None,
        "mean": finite.mean().item() if some else None,
        "std": finite.std().item() if len(finite) > 1 else None if not some else "NaN",
        "norm": finite.norm().item(),
        "zeros": int((wide == 0).sum()),
        "nan": int(wide.isnan().sum()),
        "inf": int(wide.isinf().sum()),
    }


def assert_lines(found: list[dict[str, Any]], tensor: torch.Tensor, dim: int) -> None:
    """Require the row of each line of a tensor to say what torch says of it."""
    assert len(found) == tensor.shape[dim]
    for number, row in enumerate(found):
        line = tensor.select(dim, number)
        assert row["shape"] == list(line.shape)
        assert row["numel"] == line.numel()
        for key, value in expected(line).items():
            if isinstance(value, float) and key not in ("min", "max"):
                assert row[key] == pytest.approx(value, rel=1e-9, abs=1e-12), (row["name"], key)
            else:
                assert row[key] == value, (row["name"], key)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 2, 2), (1, 1), (40, 1), (1, 40)], ids=str)
def test_each_line_is_summarized_as_torch_does(
    tmp_path: Path, ckpt: Ckpt, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 5).to(torch.int8).to(dtype) if not dtype.is_floating_point else torch.randn(shape)
    tensor = tensor.to(dtype)
    torch.save({"w": tensor}, tmp_path / "a.pt")
    for dim, by in enumerate(("row", "column")):
        found = lines_of(ckpt, tmp_path / "a.pt", "--by", by)
        assert_lines(found, tensor, dim)
        assert [row["name"] for row in found] == [f"w[{':,' * dim}{n}]" for n in range(shape[dim])]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", [(3, 40_000), (30_000, 3), (70, 800), (5, 9_000, 2)], ids=str)
def test_lines_are_the_same_where_chunks_cut_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(stats_lines, "CHUNK", stats_lines.CHUNK // 10)
    torch.manual_seed(0)
    tensor = torch.randn(shape) + 100
    tensor.view(-1)[::1001] = math.nan
    tensor.view(-1)[7::1003] = -math.inf
    tensor.view(-1)[9::1007] = 0
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    with ckpt_cli.open(tmp_path / "a.safetensors") as checkpoint:
        for dim, by in enumerate(("row", "column")):
            found = checkpoint.stats(by=by)
            assert checkpoint.stats(by=by, jobs=1).rows()[:50] == found.rows()[:50]
            wide = tensor.double().movedim(dim, 0).reshape(shape[dim], -1).numpy()
            wide[~np.isfinite(wide)] = np.nan
            rows = found.rows()
            for key, of in (("min", np.nanmin), ("max", np.nanmax), ("mean", np.nanmean)):
                assert np.allclose([row[key] for row in rows], of(wide, axis=1), rtol=1e-12, equal_nan=True)
            assert np.allclose([row["std"] for row in rows], np.nanstd(wide, axis=1, ddof=1), rtol=1e-9, equal_nan=True)
            assert sum(row["nan"] for row in rows) == int(tensor.isnan().sum())
            assert sum(row["inf"] for row in rows) == int(tensor.isinf().sum())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_views_quantized_and_sparse_tensors_have_the_lines_that_they_stand_for(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.manual_seed(0)
    whole = torch.randn(6, 8)
    scales, points = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([1, 0, -3])
    quantized = torch.quantize_per_channel(torch.randn(3, 4) * 9, scales, points, 0, torch.qint8)
    torch.save({"t": whole.t(), "v": whole[::2, 1:], "e": torch.ones(1, 4).expand(5, 4), "q": quantized},
               tmp_path / "a.pt")  # fmt: skip
    for name, tensor in (
        ("t", whole.t()),
        ("v", whole[::2, 1:]),
        ("e", torch.ones(5, 4)),
        ("q", quantized.dequantize()),
    ):
        for dim, by in enumerate(("row", "column")):
            assert_lines(lines_of(ckpt, tmp_path / "a.pt", name, "--by", by), tensor, dim)


def test_a_part_is_asked_for_by_an_index_and_its_lines_are_called_as_show_takes_them(
    tmp_path: Path, ckpt: Ckpt
) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(4, 6, 3)
    torch.save({"w": tensor, "tied": tensor, "b": torch.ones(3)}, tmp_path / "a.pt")
    for name, part, by, names in (
        ("w[1:3,::2]", tensor[1:3, ::2], "row", ["w[1,::2]", "w[2,::2]"]),
        ("w[1:3,::2]", tensor[1:3, ::2], "column", ["w[1:3,0]", "w[1:3,2]", "w[1:3,4]"]),
        ("w[-1]", tensor[-1], "row", [f"w[3,{n}]" for n in range(6)]),
        ("w[:,2]", tensor[:, 2], "column", [f"w[:,2,{n}]" for n in range(3)]),
    ):
        found = lines_of(ckpt, tmp_path / "a.pt", name, "--by", by)
        assert_lines(found, part, ("row", "column").index(by))
        assert [row["name"] for row in found] == names
        for row in found[:2]:
            shown = json.loads(ckpt("show", "--json", tmp_path / "a.pt", row["name"]).out)[0]
            assert shown["shape"] == row["shape"]
    rows = ckpt("stats", tmp_path / "a.pt", "--by", "row").lines
    assert [row.split("\t")[0] for row in rows] == [f"{name}[{n}]" for name in ("w", "tied") for n in range(4)] + ["b"]
    assert rows[-1].split("\t")[-1] == "it has no rows"


def test_lines_are_sorted_and_filtered_like_tensors(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.tensor([[1.0, 2], [math.nan, 9], [4, 4], [math.inf, 0]]), "a": torch.ones(1, 3)},
               tmp_path / "a.pt")  # fmt: skip

    def names(*options: str) -> list[str]:
        return [line.split("\t")[0] for line in ckpt("stats", tmp_path / "a.pt", "--by", "row", *options).lines]

    assert names("--sort", "max") == ["w[1]", "w[2]", "w[0]", "a[0]", "w[3]"]
    assert names("--sort", "std") == ["w[0]", "w[2]", "a[0]", "w[1]", "w[3]"]
    assert names("--sort", "name") == ["a[0]", "w[0]", "w[1]", "w[2]", "w[3]"]
    assert names("--sort", "numel")[0] == "a[0]"
    assert names("--sort", "outlier")[0] == "w[0]"
    assert names("--nan") == ["w[1]", "w[3]"]
    assert names("--nan", "--sort", "inf") == ["w[3]", "w[1]"]
    assert names("--exclude", "w") == ["a[0]"]


def test_options_that_mean_nothing_for_lines_are_refused(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "a.pt")
    for option in ("--total", "--fold", "--percentiles"):
        done = ckpt("stats", tmp_path / "a.pt", "--by", "row", option)
        assert (done.code, done.out) == (2, "")
        assert "--by is row or column, and takes no --total, --fold or --percentiles" in done.err
    assert ckpt("stats", tmp_path / "a.pt", "--by", "plane").code == 2


def test_more_lines_than_are_held_are_refused_before_anything_is_read(
    tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(1, 1).expand(1 << 40, 1)}, tmp_path / "a.pt")
    done = ckpt("stats", tmp_path / "a.pt", "--by", "row")
    assert (done.code, done.out) == (2, "")
    assert "1,000,000 rows" in done.err
    monkeypatch.setattr(limits, "STATS_LINES", 5)
    torch.save({"w": (w := torch.ones(3, 1)), "tied": w}, tmp_path / "b.pt")
    assert ckpt("stats", tmp_path / "b.pt", "--by", "row").code == 2
    assert ckpt("stats", tmp_path / "b.pt", "--by", "row", "w").code == 0
