"""Rows and columns of equal elements are found by pieces of any size, as numpy finds them in the whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.arrays.lines import lines_of, merged_lines
from ckpt_cli.ops.check import values
from ckpt_cli.ops.check.run import check
from ckpt_cli.parallel import byte_ranges


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 9), st.data())
def test_pieces_show_what_the_whole_does(rows: int, width: int, data: st.DataObject) -> None:
    cells = data.draw(st.lists(st.integers(0, 1), min_size=rows * width, max_size=rows * width))
    matrix = np.array(cells, "<u2").reshape(rows, width)
    cuts = sorted({0, rows * width, *data.draw(st.lists(st.integers(0, rows * width), max_size=4))})
    raw, found = matrix.tobytes(), None
    for begin, end in pairwise(cuts):
        found = merged_lines(found, lines_of(memoryview(raw)[2 * begin : 2 * end], begin, width, 2))
    assert found is not None
    same = {int(row) for row in np.flatnonzero((matrix == matrix[:, :1]).all(axis=1))}
    whole = same - set(found.cut)
    assert found.rows == len(whole)
    assert found.first == sorted(whole)[:3]
    assert found.zeros == sum(not matrix[row].any() for row in whole)
    columns = {int(column) for column in np.flatnonzero((matrix == matrix[0]).all(axis=0))}
    assert found.columns is None or columns <= found.columns.keys()


def test_rows_alone_are_what_is_shown_without_the_columns() -> None:
    raw = memoryview(np.array([[1, 1, 1], [1, 2, 3]], "<u2").tobytes())
    both, rows = lines_of(raw, 0, 3, 2), lines_of(raw, 0, 3, 2, rows_alone=True)
    assert (both.columns, rows.columns) == ({0: b"\x01\x00"}, None)
    assert (both.rows, both.first, both.cut) == (rows.rows, rows.first, rows.cut) == (1, [0], [])


def notes(path: Path) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        return [found.message for found in check(str(path), pool).findings if found.code == "dead-lines"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1000, 5000, 2 << 20])
def test_dead_rows_and_columns_are_notes(
    tmp_path: Path, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_ranges, "BLOCK", block)
    monkeypatch.setattr(values, "BLOCK", block)
    weight = torch.randn(500, 40).to(dtype)
    weight[3], weight[250] = 0, 0.5
    save_file({"w": weight}, tmp_path / "m.safetensors", {"format": "pt"})
    assert notes(tmp_path / "m.safetensors") == [
        "2 rows are one value each, 1 of them zeros, of a shape of [500, 40]: 3, 250"
    ]
    weight = torch.randn(500, 40).to(dtype)
    weight[:, 7] = 0
    save_file({"w": weight}, tmp_path / "m.safetensors", {"format": "pt"})
    assert notes(tmp_path / "m.safetensors") == ["1 column is zeros, of a shape of [500, 40]: 7"]


def test_a_matrix_that_lies_turned_has_its_own_rows_named(tmp_path: Path) -> None:
    weight = torch.randn(20, 30)
    weight[3] = 0
    torch.save({"w": weight.t().contiguous().t()}, tmp_path / "m.pt")
    assert notes(tmp_path / "m.pt") == ["1 row is zeros, of a shape of [20, 30]: 3"]


def test_ordinary_matrices_have_no_notes(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(64, 64),
        "narrow": torch.zeros(64, 3).copy_(torch.randn(64, 3).sign()),
        "counts": torch.zeros(64, 64).long(),
        "norm": torch.ones(64),
        "conv": torch.randn(8, 4, 3, 3),
        "some": torch.randn(64, 64) * (torch.rand(64, 64) > 0.5),
    }
    tensors["counts"][0, 0] = 1
    torch.save(tensors, tmp_path / "m.pt")
    assert notes(tmp_path / "m.pt") == []
