"""Files of ranks far larger than what a command may take of memory: anonymous pages and mapped ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Ckpt
from memory_in_use import memory_of
from test_rank_files import parts_of
from torch.distributed.tensor import DTensor

ROWS, SIZE, WORLD = 16, 1 << 23, 4
SHAPES = {f"layers.{number}.weight": torch.Size([SIZE]) for number in range(ROWS)}
NBYTES = ROWS * SIZE * 4
"""Bytes of the model: 512 MiB of float32, whose storages are holes."""


def save(value: Any, path: Path) -> None:
    """Save without the bytes of storages, which are holes in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.skip_data():
        torch.save(value, path)


def model_states(path: Path) -> None:
    module = {name: torch.empty(0) for name in SHAPES}
    save({"module": module, "buffer_names": [], "param_shapes": [SHAPES], "shared_params": {}}, path)


def zero(folder: Path, stage: int) -> None:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    inner = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    for rank in range(WORLD):
        moment = {"step": torch.tensor(1.0), "exp_avg": torch.empty(NBYTES // 4 // WORLD)}
        settings = {"state": {0: moment}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        state = {
            "zero_stage": stage,
            "partition_count": WORLD,
            key: [torch.empty(NBYTES // 4 // WORLD)],
            inner: settings,
        }
        save({"optimizer_state_dict": state}, folder / f"step1/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            model_states(folder / f"step1/{name}_model_states.pt")
    (folder / "latest").write_text("step1")


def placed(folder: Path) -> None:
    whole = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    for rank in range(WORLD):
        parts = parts_of(rank, (WORLD,), whole, [[0] for _ in SHAPES])
        with patch.object(DTensor, "data_ptr", lambda _: 0):  # which fails where no process made the mesh
            save(parts, folder / f"model_world_size_{WORLD}_rank_{rank}.pt")


def universal(folder: Path) -> None:
    model_states(folder / "step1_universal/mp_rank_00_model_states.pt")
    for name, shape in SHAPES.items():
        for key in ("fp32", "exp_avg"):
            save({"param": torch.empty(shape)}, folder / f"step1_universal/zero/{name}/{key}.pt")
    (folder / "latest_universal").write_text("step1_universal")


KINDS: dict[str, Callable[[Path], None]] = {
    "zero 2": lambda folder: zero(folder, 2),
    "zero 3": lambda folder: zero(folder, 3),
    "fsdp": placed,
    "universal": universal,
}


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_gigabyte_is_read_and_written_in_little_memory(tmp_path: Path, kind: str, ckpt: Ckpt) -> None:
    run = tmp_path / "run"
    KINDS[kind](run)
    assert len(ckpt("ls", run).lines) == ROWS
    for command in (("convert", "run", "out.safetensors"), ("hash", "run", "model.layers.1*.weight")):
        assert memory_of(tmp_path, *command) < 250 << 20
    assert (tmp_path / "out.safetensors").stat().st_size > NBYTES
