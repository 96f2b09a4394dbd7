"""Tensors that are made of others, on processes that share no memory: the same bits as on threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckpt_cli.edits.avg import average
from ckpt_cli.edits.avg_options import AvgOptions
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.edits.lora_merge import MergeOptions, merge

LORA = Path(__file__).parent.parent / "samples" / "lora"


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Two processes that were spawned, not forked."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("case", ["dora", "transposed-dora", "bias"])
def test_adapters_are_merged_in_processes(tmp_path: Path, pool: Executor, case: str) -> None:
    output = str(tmp_path / "out.safetensors")
    base, adapter = (str(LORA / case / name) for name in ("base.safetensors", "adapter"))
    merge(base, [(adapter, 1.0)], output, MergeOptions(output=DeriveOptions(executor=pool)))
    found, wanted = load_file(output), load_file(LORA / case / "merged.safetensors")
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_an_average_is_made_in_processes(tmp_path: Path, pool: Executor) -> None:
    paths = [str(tmp_path / f"{number}.pt") for number in range(2)]
    for number, path in enumerate(paths):
        torch.save({"w": torch.full((700, 900), float(number))}, path)
    average(paths, str(tmp_path / "out.pt"), AvgOptions(output=DeriveOptions(executor=pool)))
    assert torch.load(tmp_path / "out.pt")["w"].eq(0.5).all()
