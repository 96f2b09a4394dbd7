"""`ls --waste` and `info` say what `compact` frees."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*TypedStorage")


def sliced() -> torch.Tensor:
    return torch.arange(1_000_000.0).reshape(1000, 1000)


def apart() -> dict[str, torch.Tensor]:
    whole = torch.arange(500_000.0)
    return {"a": whole[:10], "b": whole[-10:]}


def overlapping() -> dict[str, torch.Tensor]:
    whole = torch.arange(500_000.0)
    return {"a": whole[100:200], "b": whole[150:300].reshape(10, 15).t()}


def kept_by_a_module() -> nn.Module:
    module = nn.Linear(2, 2)
    module.__dict__["_cache"] = {"k": sliced()[:, 3]}
    return module


def in_an_attribute() -> dict[str, torch.Tensor]:
    parameter = nn.Parameter(torch.ones(3))
    parameter.info = {"k": [torch.ones(100_000)[:3]]}  # type: ignore[attr-defined]  # torch keeps any
    return {"p": parameter}


LAYOUTS: dict[str, Callable[[], Any]] = {
    "rows of a transposed matrix": lambda: {"c": sliced().t()[:5]},
    "one column": lambda: {"c": sliced()[:, 3]},
    "every other row": lambda: {"c": sliced()[::2]},
    "a column under two names": lambda: {"c": (column := sliced()[:, 3]), "d": column},
    "two columns": lambda: {"c": (whole := sliced())[:, 3], "d": whole[:, 4]},
    "expanded": lambda: {"c": torch.arange(100_000.0)[7:8].expand(1000, 1000)},
    "both ends": apart,
    "overlapping": overlapping,
    "an empty view": lambda: {"c": torch.ones(100_000)[:0]},
    "all of it": lambda: {"c": torch.ones(1000)},
    "a transposed matrix": lambda: {"c": sliced().t()},
    "kept by a module": kept_by_a_module,
    "in an attribute of a parameter": in_an_attribute,
    "a storage by itself": lambda: {"c": torch.ones(3), "s": torch.ones(5).storage()},
    "a sparse tensor": lambda: {
        "c": torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(100_000)[:1], (3,), check_invariants=True)
    },
}


def said(ckpt: Ckpt, path: str) -> int:
    """Bytes of waste, on which both commands agree."""
    rows = json.loads(ckpt("ls", "--waste", "--json", path).out)["waste"]
    total = sum(row["waste"] for row in rows)
    assert json.loads(ckpt("info", "--json", path).out)["waste_nbytes"] == total
    return total


def freed(ckpt: Ckpt, path: str, output: Path) -> int:
    done = ckpt("compact", path, "-o", str(output))
    if done.code == 2 and "no storage is larger" in done.err:
        return 0
    assert done.code == 0, done.err
    return os.path.getsize(path) - output.stat().st_size


def same(a: Any, b: Any) -> bool:
    return a.tolist() == b.tolist() if not isinstance(a, torch.Tensor) else torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waste_is_what_compact_frees(layout: str, tmp_path: Path, ckpt: Ckpt) -> None:
    path = str(tmp_path / "m.pt")
    torch.save(LAYOUTS[layout](), path)
    told = said(ckpt, path)
    saved = freed(ckpt, path, tmp_path / "o.pt")
    assert abs(told - saved) < 1000
    if saved:
        assert said(ckpt, str(tmp_path / "o.pt")) == 0
        before, after = (torch.load(each, weights_only=False) for each in (path, tmp_path / "o.pt"))
        if isinstance(before, dict):
            assert all(same(before[name], after[name]) for name in before)


def test_a_storage_that_nothing_refers_to_is_waste_and_goes_in_compact(tmp_path: Path, ckpt: Ckpt) -> None:
    path, output = str(tmp_path / "m.pt"), tmp_path / "o.pt"
    torch.save({"x": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("m/data/9", bytes(100_000))
    row = json.loads(ckpt("ls", "--waste", "--json", path).out)["waste"]
    assert [(one["storage"], one["nbytes"], one["names"]) for one in row] == [("9", 100_000, [])]
    assert "stray-storage" in ckpt("check", path).out
    assert abs(freed(ckpt, path, output) - 100_000) < 1000
    assert torch.load(output)["x"].tolist() == [1, 1, 1]
    assert said(ckpt, str(output)) == 0
