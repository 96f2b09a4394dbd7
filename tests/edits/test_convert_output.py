"""Where a conversion goes: outputs that are there, and dry runs that tell the numbers of the real one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file

from ckpt_cli.arrays import cast as casting


def test_an_output_that_is_there_needs_force(tmp_path: Path, ckpt: Ckpt) -> None:
    path, out = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save({"w": torch.ones(2)}, path)
    out.write_text("mine")
    answer = ckpt("convert", path, out)
    assert (answer.code, out.read_text()) == (2, "mine")
    assert "hint: --force replaces it" in answer.err
    assert ckpt("convert", path, out, "--force").code == 0
    assert list(load_file(out)) == ["w"]
    assert ckpt("convert", path, path, "--force").code == 2
    assert ckpt("convert", path, tmp_path / "w.unknown").code == 2
    assert ckpt("convert", path, tmp_path / "w.pt", "--to", "gguf2").code == 2
    assert ckpt("convert", path, tmp_path / "w.pt", "--max-shard", "5 apples").code == 2


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "options",
    [["o.pt"], ["o.pt", "--tensors-only"], ["o.pt", "--shared", "clone"], ["o.pt", "--dtype", "float16"],
     ["o.safetensors"], ["o.npz"], ["o", "--max-shard", "80"], ["o"], ["o", "--to", "hf-bin", "--max-shard", "80"],
     ["o", "--to", "dcp"], ["o.safetensors", "--dtype", "bfloat16"]],
    ids=" ".join,
)  # fmt: skip
def test_a_dry_run_tells_the_numbers_of_the_real_one(
    tmp_path: Path, ckpt: Ckpt, options: list[str], is_zip: bool
) -> None:
    big = torch.randn(30, 2)
    state = {"a": big, "tied": big, "columns": big.t()[:1], "n": torch.arange(5), "empty": torch.empty(0, 2)}
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    out, *more = options
    dry = json.loads(ckpt("convert", path, tmp_path / out, *more, "--json", "-n").out)
    assert os.listdir(tmp_path) == ["a.pt"]
    done = json.loads(ckpt("convert", path, tmp_path / out, *more, "--json").out)
    assert done == {**dry, "dry_run": False}
    written = [tmp_path / out / name for name in done["files"]] or [tmp_path / out]
    assert sum(file.stat().st_size for file in written) == dry["bytes_written"]


def test_a_cast_to_a_dtype_without_infinity_tells_how_many_values_would_be_cut(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([1e6, 2e6, 1.0])}, path)
    answer = ckpt("convert", path, tmp_path / "b.pt", "--dtype", "float8_e4m3fn")
    assert "2 values would become the largest there is in float8_e4m3fn" in answer.err


def test_what_a_dtype_holds_is_worked_out_once_for_all_tensors(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({str(number): torch.ones(2) for number in range(30)}, path)
    before = casting._limits.cache_info().misses
    assert ckpt("convert", path, tmp_path / "b.safetensors", "--dtype", "bfloat16").code == 0
    assert ckpt("cast", path, "bfloat16").code == 0
    assert casting._limits.cache_info().misses <= before + 1


def test_a_dry_run_refuses_a_cast_that_loses_values(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.tensor([1e6, 1.0])}, path)
    for out in ("b.pt", "b.safetensors", "b"):
        answers = [ckpt("convert", path, tmp_path / out, "--dtype", "float16", *more) for more in (["-n"], [])]
        assert answers[0] == answers[1]
        assert answers[0].code == 2
        assert ckpt("convert", path, tmp_path / out, "--dtype", "float16", "--lossy", "-n").code == 0


def test_a_dry_run_writes_nothing_and_says_what_it_would(tmp_path: Path, ckpt: Ckpt) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path)
    answer = ckpt("convert", path, tmp_path / "b", "-n")
    assert (answer.code, "1 tensor would be written" in answer.err) == (0, True)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]
