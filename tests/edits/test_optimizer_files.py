"""States of an optimizer that is in another file than its parameters: in the folder of a run, and distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Ckpt
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from training_runs import OPTIMIZERS, Run, begin, module, same, selected

SHAPES = {"enc.w": (4, 3), "enc.b": (4,), "norm.g": (4,), "norm.c": (4,), "head.v": (3, 4), "head.d": (3,)}
GROUPS = [["enc.w", "head.v"], ["enc.b", "norm.g", "norm.c", "head.d"]]
KEPT = ["enc.w", "enc.b", "head.v", "head.d"]


def trained(*, named: bool = False) -> Run:
    run = begin(module(SHAPES), OPTIMIZERS["AdamW"], GROUPS, named=named)
    run.step(0)
    return run


def trainer_folder(run: Run, folder: Path, model: str) -> Path:
    """What Hugging Face's Trainer writes of a run."""
    folder.mkdir()
    state: dict[str, Any] = dict(run.model.state_dict())
    if model == "model.safetensors":
        save_file(state, folder / model, {"format": "pt"})
    else:
        torch.save(state, folder / model)
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1, "epoch": 1.0}))
    return folder


@pytest.mark.parametrize("model", ["model.safetensors", "pytorch_model.bin"])
def test_names_carry_states_from_one_file_of_a_run_to_another(model: str, here: Path, ckpt: Ckpt) -> None:
    run = trained(named=True)
    folder = trainer_folder(run, here / "checkpoint-1", model)
    assert ckpt("check", "checkpoint-1").code == 0
    assert ckpt("rm", "checkpoint-1", "model.norm").code == 0
    fresh = selected(run, GROUPS, KEPT, OPTIMIZERS["AdamW"], named=True)
    assert same(torch.load(folder / "optimizer.pt"), fresh.optimizer.state_dict())
    weights = load_file(folder / model) if model.endswith("safetensors") else torch.load(folder / model)
    assert same(dict(weights), dict(fresh.model.state_dict()))
    assert ckpt("rename", "checkpoint-1", "model.enc", "model.body").code == 0
    groups = torch.load(folder / "optimizer.pt")["param_groups"]
    assert [group["param_names"] for group in groups] == [["body.w", "head.v"], ["body.b", "head.d"]]


def test_sorted_names_prove_nothing_and_a_pickle_keeps_the_order(here: Path, ckpt: Ckpt) -> None:
    run = trained()
    trainer_folder(run, here / "checkpoint-1", "model.safetensors")
    trainer_folder(run, here / "checkpoint-2", "pytorch_model.bin")
    for choice in ((), ("--optimizer", "trust")):
        answer = ckpt("rm", "checkpoint-1", "model.norm", *choice)
        assert (answer.code, "does not keep the order of the module" in answer.err) == (2, True)
    assert ckpt("rm", "checkpoint-2", "model.norm").code == 2
    assert ckpt("rm", "checkpoint-2", "model.norm", "--optimizer", "trust").code == 0
    fresh = selected(run, GROUPS, KEPT, OPTIMIZERS["AdamW"])
    assert same(torch.load("checkpoint-2/optimizer.pt"), fresh.optimizer.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_loads_into_the_smaller_model(flat: bool, here: Path, ckpt: Ckpt) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    run = trained()
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id="dcp", no_dist=True)
    listed = json.loads(ckpt("ls", "--optimizer", "dcp", "--json").out)
    assert {entry["how"] for entry in listed["entries"]} == {"named"}
    assert ckpt("check", "dcp").code == 0
    assert ckpt("rm", "dcp", "model.norm").code == 0
    assert ckpt("rename", "dcp", "model.enc", "model.body").code == 0
    new = begin(
        module({name.replace("enc", "body"): SHAPES[name] for name in KEPT}),
        OPTIMIZERS["AdamW"],
        [[name.replace("enc", "body") for name in group] for group in GROUPS],
    )
    model, optimizer = get_state_dict(new.model, new.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id="dcp", no_dist=True)
    set_state_dict(
        new.model, new.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )
    fresh = selected(run, GROUPS, KEPT, OPTIMIZERS["AdamW"])
    for seed in (1, 2):
        new.step(seed)
        fresh.step(seed)
    assert same(list(new.model.state_dict().values()), list(fresh.model.state_dict().values()))
    assert same(new.optimizer.state_dict()["state"], fresh.optimizer.state_dict()["state"])
