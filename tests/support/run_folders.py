"""Folders of training runs, written by torch and safetensors as trainers lay them out, and what each file has alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

MODELS = ("safetensors", "bin", "shards")
"""What the model of a run may be."""

STATE = {"epoch": 1.5, "global_step": 7, "log_history": [{"loss": 0.5, "step": 1}, {"loss": 0.25, "step": 2}],
         "best_metric": None, "sizes": [1, 2]}  # fmt: skip
"""What trainer_state.json has."""


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A module after one step, its optimizer and the scheduler."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    return net, optimizer, scheduler


def save_model(state: dict[str, torch.Tensor], folder: Path, model: str) -> None:
    """The model as one file of either kind, or as two shards with their index."""
    if model == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif model == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names, weight_map = list(state), {}
        for number, some in enumerate((names[:3], names[3:]), 1):
            shard = f"model-{number:05}-of-00002.safetensors"
            save_file({name: state[name] for name in some}, folder / shard, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(some, shard))
        index = {"metadata": {"total_size": 116}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def run_folder(folder: Path, model: str = "safetensors", ranks: int = 1, step: int = 7) -> Path:
    """A folder of Hugging Face's Trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    net, optimizer, scheduler = trained()
    save_model(net.state_dict(), folder, model)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for rank in range(ranks):
        torch.save(state, folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"))
    (folder / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": step}, indent=2) + "\n")
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    (folder / "config.json").write_text("{}")
    return folder


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    """The model of a run, as torch and safetensors read its files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        found |= load_file(file)
    for file in folder.glob("pytorch_model.bin"):
        found |= torch.load(file)
    return found


State = dict[str, torch.Tensor]


def of(
    write: Callable[[State, Path], None], read: Callable[[Path], State], model: str
) -> tuple[Callable[[State, Path], None], Callable[[Path], State]]:
    """A writer of a small folder of a run, which has the state as its model, and the reader of that."""

    def write_run(state: State, folder: Path) -> None:
        folder.mkdir()
        write(state, folder / model)
        torch.save({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}, folder / "optimizer.pt")
        torch.save({"last_epoch": 3}, folder / "scheduler.pt")
        (folder / "trainer_state.json").write_text('{"global_step": 3}')

    return write_run, lambda folder: read(folder / model)
