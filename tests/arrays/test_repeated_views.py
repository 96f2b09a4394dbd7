"""Views that repeat a few stored elements without end: nothing copies them out; what leaves them views still works."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file

import ckpt_cli
from ckpt_cli.errors import LimitError

VIEWS = {
    "expanded": lambda: torch.ones(1).expand(2**30, 2**30),
    "of 60 dimensions": lambda: torch.ones(1).as_strided([2] * 60, [0] * 60),
    "windows": lambda: torch.ones(41).as_strided([2] * 40, [1] * 40),
    "bfloat16": lambda: torch.ones(1, dtype=torch.bfloat16).expand(2**59),
}


@pytest.fixture(params=VIEWS.values(), ids=VIEWS.keys())
def repeated(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of a few hundred bytes with a tensor of at least 2**40 elements, and one that shares its storage."""
    path = tmp_path / "m.pt"
    view = request.param()
    torch.save({"x": view, "y": view.as_strided([1], [1])}, path)
    return path


def assert_too_many(ckpt: Ckpt, path: Path, *arguments: object) -> None:
    """The command is refused because of the tensor, and leaves nothing behind."""
    before, there = path.read_bytes(), sorted(os.listdir(path.parent))
    done = ckpt(*arguments)
    assert (done.code, done.out) == (2, ""), arguments
    assert "tensor 'x' repeats" in done.err
    assert "too many to go through" in done.err
    assert (path.read_bytes(), sorted(os.listdir(path.parent))) == (before, there)


CONVERSIONS = {
    "safetensors": ("o.safetensors",),
    "dry run": ("o.safetensors", "-n"),
    "cast": ("o.safetensors", "--dtype", "float64"),
    "cast, dry run": ("o.safetensors", "--dtype", "float64", "-n"),
    "hf": ("o", "--to", "hf"),
    "dcp": ("o", "--to", "dcp"),
    "clones": ("o.pt", "--shared", "clone"),
    "shards": ("o", "--max-shard", "1GB"),
}


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_no_conversion_copies_a_view_out_that_repeats_without_end(
    repeated: Path, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    output, *options = arguments
    assert_too_many(ckpt, repeated, "convert", repeated, repeated.parent / output, *options)


def test_no_conversion_to_npz_copies_such_a_view_out(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"x": VIEWS["expanded"]()}, tmp_path / "m.pt")
    assert_too_many(ckpt, tmp_path / "m.pt", "convert", tmp_path / "m.pt", tmp_path / "o.npz")


def test_untie_gives_such_a_view_no_storage_of_its_own(repeated: Path, ckpt: Ckpt) -> None:
    assert_too_many(ckpt, repeated, "untie", repeated, "x")
    assert_too_many(ckpt, repeated, "untie", repeated, "x", "-o", repeated.parent / "o.pt")


def test_tie_compares_no_such_views(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"x": torch.ones(1).expand(2**40), "y": torch.ones(1).expand(2**40)}, tmp_path / "m.pt")
    assert_too_many(ckpt, tmp_path / "m.pt", "tie", tmp_path / "m.pt", "x", "y")
    assert_too_many(ckpt, tmp_path / "m.pt", "ties", tmp_path / "m.pt", "x", "y")


def test_the_api_copies_no_such_view_and_hands_views_out(tmp_path: Path) -> None:
    conjugate = torch.ones(1, dtype=torch.complex64).expand(2**59).conj()  # numpy has no such views: they are copies
    torch.save({name: make() for name, make in VIEWS.items()} | {"conjugate": conjugate}, tmp_path / "m.pt")
    with ckpt_cli.open(tmp_path / "m.pt") as checkpoint:
        with pytest.raises(LimitError, match="repeats 1 element as"):
            checkpoint["conjugate"].numpy()
        assert checkpoint["bfloat16"].numpy()[5] == 1
        assert checkpoint["expanded"].numpy()[5, 7] == 1
        assert checkpoint["of 60 dimensions"].torch().shape == (2,) * 60


def test_what_keeps_views_keeps_them(repeated: Path, ckpt: Ckpt) -> None:
    shape = torch.load(repeated)["x"].shape
    for arguments in (("convert", "o.pt"), ("cast", "float16", "-o", "o2.pt"), ("convert", "o3.pt", "--tensors-only")):
        command, *rest = arguments
        output = repeated.parent / next(word for word in rest if word.endswith(".pt"))
        rest = [str(output) if word.endswith(".pt") else word for word in rest]
        assert ckpt(command, repeated, *rest).code == 0
        assert torch.load(output)["x"].shape == shape
        assert output.stat().st_size < 10_000


def test_views_that_repeat_within_reason_are_copied_out(tmp_path: Path, ckpt: Ckpt) -> None:
    mask = torch.tensor([[True], [False]]).repeat(512, 1).expand(1024, 1024)
    windows = torch.arange(5000.0).unfold(0, 256, 1)
    torch.save({"mask": mask, "windows": windows, "first": windows[0]}, tmp_path / "m.pt")
    assert ckpt("convert", tmp_path / "m.pt", tmp_path / "o.safetensors").code == 0
    found = load_file(tmp_path / "o.safetensors")
    assert torch.equal(found["mask"], mask)
    assert torch.equal(found["windows"], windows)
    assert ckpt("untie", tmp_path / "m.pt", "windows", "-o", tmp_path / "u.pt").code == 0
    assert torch.equal(torch.load(tmp_path / "u.pt")["windows"], windows)
    with ckpt_cli.open(tmp_path / "m.pt") as checkpoint:
        assert np.array_equal(checkpoint["mask"].numpy(), mask.numpy())
