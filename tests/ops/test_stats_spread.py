"""`ckpt stats --percentiles` and `--fold`: what numpy says of the same values, exactly or within 0.05 %."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt

pytestmark = pytest.mark.filterwarnings("ignore:.*ComplexHalf", "ignore:.*quantize", "ignore:.*Quantized")

EXACT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool]
NEAR = [torch.float32, torch.float64, torch.int16, torch.int32, torch.int64]
ERROR = 2.0**-11


def rows_of(ckpt: Ckpt, path: Path, *options: object) -> dict[str, dict[str, Any]]:
    done = ckpt("stats", path, "--json", *options)
    assert done.code == 0, done.err
    data = json.loads(done.out)
    return {row["name"]: row for row in [*data["tensors"], *([data["total"]] if data["total"] else [])]}


def agrees(row: dict[str, Any], values: np.ndarray[Any, Any], *, exact: bool) -> None:
    """Hold the spread of a row to values in float64."""
    finite = values[np.isfinite(values)].reshape(-1)
    ordered = np.sort(finite)
    for key, percent in (("p1", 1), ("p50", 50), ("p99", 99)):
        place = (len(ordered) - 1) * percent / 100
        around = np.abs([ordered[math.floor(place)], ordered[math.ceil(place)]]).max()
        within = max(around * (1e-12 if exact else ERROR * 1.001), 5e-324)
        assert row[key] == pytest.approx(np.percentile(finite, percent), rel=0, abs=within)
    if len(finite) > 1 and np.abs(finite).max() < 1e150 and finite.std() > 0:
        assert row["outlier"] == pytest.approx(np.abs(finite).max() / finite.std(ddof=1), rel=1e-5)
    edges, counts = row["magnitudes"]["edges"], row["magnitudes"]["counts"]
    some = np.abs(finite[finite != 0])
    assert len(counts) <= 16
    assert counts == [int(((some >= low) & (some < high)).sum()) for low, high in pairwise(edges)]
    assert sum(counts) == len(some)
    assert all(math.log2(edge).is_integer() for edge in edges)


def test_percentiles_and_magnitudes_are_those_of_numpy(tmp_path: Path, ckpt: Ckpt) -> None:
    base = torch.randn(1300, 701, generator=torch.Generator().manual_seed(0)) * 5
    state = {f"{dtype}": base.to(dtype) for dtype in EXACT if dtype not in (torch.uint8, torch.bool)}
    state |= {"torch.uint8": base.abs().to(torch.uint8), "torch.bool": base > 2}
    state |= {f"{dtype}": (base * 1000).to(dtype) for dtype in NEAR}
    state |= {"turned": base.t(), "lone": torch.tensor([3.0]), "raised": base.bfloat16().float()}
    marred = base.clone()
    marred[0, :9], marred[1, :5], marred[2] = math.nan, -math.inf, 0
    torch.save({**state, "marred": marred}, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt", "--percentiles")
    for name, values in {**state, "marred": marred}.items():
        exact = name in [*map(str, EXACT), "lone", "raised"]
        agrees(rows[name], values.double().numpy(), exact=exact)


def test_numbers_beyond_float32_have_percentiles_too(tmp_path: Path, ckpt: Ckpt) -> None:
    base = torch.randn(40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = {"tiny": base * 1e-200, "huge": base * 1e200, "all": base * 10.0 ** torch.arange(-300, 300, 0.015).double()}
    state["large"] = (base * 2**61).long().double()
    torch.save(state, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt", "--percentiles")
    for name, values in state.items():
        agrees(rows[name], values.numpy(), exact=False)


def test_what_has_no_finite_numbers_has_no_percentiles(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"nan": torch.tensor([math.nan]), "empty": torch.empty(0), "zero": torch.zeros(9)}, tmp_path / "m.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt", "--percentiles")
    none = {"edges": [], "counts": []}
    assert [rows[name]["p50"] for name in ("nan", "empty", "zero")] == [None, None, 0]
    assert [rows[name]["magnitudes"] for name in ("nan", "empty", "zero")] == [none] * 3
    assert rows_of(ckpt, tmp_path / "m.pt")["zero"]["p50"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_folded_layers_are_one_row_as_if_they_were_one_tensor(tmp_path: Path, ckpt: Ckpt, dtype: torch.dtype) -> None:
    layers = [((torch.randn(300, 200) + layer) * 9).to(dtype) for layer in range(4)]
    state = {f"h.{layer}.w": values for layer, values in enumerate(layers)} | {"out": layers[0]}
    torch.save({**state, "tied.0.w": layers[1], "tied.1.w": layers[1]}, tmp_path / "m.pt")
    torch.save({"w": torch.stack(layers)}, tmp_path / "one.pt")
    rows = rows_of(ckpt, tmp_path / "m.pt", "--fold", "--percentiles", "--total")
    one = rows_of(ckpt, tmp_path / "one.pt", "--percentiles")["w"]
    assert list(rows) == ["h.{0..3}.w", "out", "tied.{0,1}.w", "total"]
    for name in ("h.{0..3}.w", "total"):
        folded = rows[name]
        assert (folded["min"], folded["max"], folded["zeros"]) == (one["min"], one["max"], one["zeros"])
        assert [folded[key] for key in ("mean", "std", "norm", "p1", "p50", "p99")] == pytest.approx(
            [one[key] for key in ("mean", "std", "norm", "p1", "p50", "p99")], rel=1e-6
        )
        assert sum(folded["histogram"]["counts"]) == 240_000
        edges = folded["histogram"]["edges"]
        stacked = torch.stack(layers).double().reshape(-1)
        below = [int((stacked < edge).sum()) for edge in edges[1:-1]]
        assert np.cumsum(folded["histogram"]["counts"])[:-1].tolist() == below
    folded = rows["h.{0..3}.w"]
    assert (folded["count"], folded["shape"], folded["numel"]) == (4, [300, 200], 240_000)
    lone = rows_of(ckpt, tmp_path / "m.pt", "tied.0.w")["tied.0.w"]
    assert rows["tied.{0,1}.w"]["norm"] == pytest.approx(lone["norm"])


def test_new_columns_come_last_and_only_when_asked_for(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.arange(101.0), "meta": torch.empty(2, device="meta")}, tmp_path / "m.pt")
    plain = [line.split("\t") for line in ckpt("stats", tmp_path / "m.pt").lines]
    more = [line.split("\t") for line in ckpt("stats", tmp_path / "m.pt", "--percentiles").lines]
    assert [row[:12] for row in more] == plain
    assert more[0][12:15] == ["1.0", "50.0", "99.0"]
    assert more[0][16] == "1:1,2:2,4:4,8:8,16:16,32:32,64:37"
    assert more[1][12:] == [""] * 5


def test_rows_can_be_sorted_by_their_outliers(tmp_path: Path, ckpt: Ckpt) -> None:
    spiked = torch.randn(1000)
    spiked[3] = 90
    torch.save({"a": torch.randn(1000), "spiked": spiked, "flat": torch.ones(3)}, tmp_path / "m.pt")
    assert [line.split("\t")[0] for line in ckpt("stats", tmp_path / "m.pt", "--sort", "outlier").lines] == [
        "spiked",
        "a",
        "flat",
    ]
