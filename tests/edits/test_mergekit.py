"""`avg` and `mix` against what mergekit made of the same models (tests/oracles/mergekit_merges.py): the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file

SAMPLES = Path(os.environ.get("MERGEKIT_SAMPLES") or Path(__file__).parent.parent / "samples" / "mergekit")
BASE, ONE, TWO = (SAMPLES / f"{name}.safetensors" for name in ("base", "one", "two"))

MERGES = {
    "linear": ["avg", f"{ONE}:0.7", f"{TWO}:0.4"],
    "task": ["mix", BASE, ONE, TWO, "--method", "task", "--weights", "0.7,0.4"],
    "ties": ["mix", BASE, ONE, TWO, "--method", "ties", "--density", "0.3", "--weights", "0.7,0.4"],
}


@pytest.mark.parametrize("name", MERGES)
def test_each_element_is_mergekits(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    answer = ckpt(*MERGES[name], "--dtype", "bfloat16", "-o", tmp_path / "out.safetensors")
    assert answer.code == 0, answer.err
    found, wanted = load_file(tmp_path / "out.safetensors"), load_file(SAMPLES / f"{name}.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[key].view(torch.int16).equal(value.view(torch.int16)) for key, value in wanted.items())


def test_slerp_is_mergekits_but_for_the_last_bit_of_a_few(tmp_path: Path, ckpt: Ckpt) -> None:
    out = tmp_path / "out.safetensors"
    assert ckpt("mix", BASE, TWO, "--method", "slerp", "--t", 0.35, "--dtype", "bfloat16", "-o", out).code == 0
    found, wanted = load_file(out), load_file(SAMPLES / "slerp.safetensors")
    assert found.keys() == wanted.keys()
    apart = torch.cat([
        (found[key].view(torch.int16).int() - value.view(torch.int16).int()).abs().reshape(-1)
        for key, value in wanted.items()
    ])  # fmt: skip
    assert int(apart.max()) <= 1
    assert int((apart > 0).sum()) <= len(apart) // 1000
