"""The parts of training checkpoints in the layouts of the tools that write them, held against counts from torch."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Facts = dict[str, Any]


def trained(*, norm: bool = False) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network and an optimizer that made a step."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(32, 32) for _ in range(3)]
    net = torch.nn.Sequential(*layers, *([torch.nn.BatchNorm1d(32)] if norm else []))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    net(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    return net, optimizer


def state_numel(optimizer: torch.optim.Optimizer) -> int:
    """Elements of the tensors in an optimizer's state."""
    states = optimizer.state_dict()["state"].values()
    return sum(value.numel() for state in states for value in state.values() if torch.is_tensor(value))


def of_torch(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Facts:
    return {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "args": argparse.Namespace(lr=3e-4),
    }


def of_lightning(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Facts:
    weights = OrderedDict((f"model.{name}", value) for name, value in net.state_dict().items())
    weights |= {f"model_ema.{name}": value.clone() for name, value in net.state_dict().items()}
    return {
        "epoch": 7, "global_step": 900, "pytorch-lightning_version": "2.4.0", "state_dict": weights,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.ones(1)}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{"last_epoch": 7}],
        "hyper_parameters": {"width": 32, "lr": 3e-4},
    }  # fmt: skip


def of_timm(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Facts:
    return {
        "epoch": 7, "arch": "resnet18", "state_dict": net.state_dict(), "optimizer": optimizer.state_dict(),
        "version": 2, "args": argparse.Namespace(lr=3e-4), "state_dict_ema": copy.deepcopy(net.state_dict()),
        "metric": 71.5,
    }  # fmt: skip


def of_ultralytics(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Facts:
    return {
        "epoch": 7, "best_fitness": torch.tensor([0.5]),
        "model": copy.deepcopy(net).half(), "ema": copy.deepcopy(net).half(),
        "updates": 900, "optimizer": optimizer.state_dict(), "train_args": {"lr0": 0.01}, "version": "8.3.0",
    }  # fmt: skip


def of_fairseq(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Facts:
    return {
        "args": None, "cfg": {"model": {"_name": "transformer"}}, "model": net.state_dict(),
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "num_updates": 900}], "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 7}, "ema": copy.deepcopy(net.state_dict())},
        "last_optimizer_state": optimizer.state_dict(),
    }  # fmt: skip


LAYOUTS = [
    (of_torch, "torch", False, None),
    (of_lightning, "Lightning 2.4.0", True, 900),
    (of_timm, "timm (layout 2)", True, None),
    (of_ultralytics, "Ultralytics 8.3.0", True, 900),
    (of_fairseq, "fairseq", True, 900),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("layout", "writer", "has_ema", "step"), LAYOUTS)
def test_parts_of_a_training_checkpoint_have_the_counts_of_torch(
    layout: Callable[..., Facts], writer: str, has_ema: bool, step: int | None, norm: bool, tmp_path: Path, ckpt: Any
) -> None:
    net, optimizer = trained(norm=norm)
    torch.save(layout(net, optimizer), tmp_path / "last.ckpt")
    found = json.loads(ckpt("info", tmp_path / "last.ckpt", "--json").out)
    counts: dict[str, list[int]] = {}
    for part in found["parts"]:
        counts.setdefault(part["role"], []).append(part["parameters"] - part["buffers"])
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert counts["model"] == [parameters]
    assert counts["optimizer"] == [state_numel(optimizer)]
    assert counts.get("EMA") == ([parameters] if has_ema else None)
    assert found["parameters"] == sum(value.numel() for value in net.state_dict().values())
    training = found["training"]
    assert (training["writer"], training["epoch"], training["global_step"]) == (writer, 7, step)
    assert training["learning_rates"] == [3e-4]


@pytest.mark.parametrize("layout", [layout for layout, *_ in LAYOUTS])
def test_each_advised_command_does_what_the_advice_says(
    layout: Callable[..., Facts], tmp_path: Path, ckpt: Any
) -> None:
    net, optimizer = trained()
    path = tmp_path / "a run's last.ckpt"
    torch.save(layout(net, optimizer), path)
    advice = json.loads(ckpt("info", path, "--json").out)["advice"]
    assert any("optimizer state is" in one["message"] for one in advice)
    for one in advice:
        size = path.stat().st_size
        program, *arguments = shlex.split(one["command"])
        assert program == "ckpt"
        assert ckpt(*arguments).code == 0
        assert path.stat().st_size < size
    found = json.loads(ckpt("info", path, "--json").out)
    assert "optimizer" not in {part["role"] for part in found["parts"]}
    assert found["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert not any("optimizer state" in one["message"] for one in found["advice"])


def test_the_advised_cast_halves_a_file_of_float32(tmp_path: Path, ckpt: Any) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(256, 256)}, path)
    (advice,) = json.loads(ckpt("info", path, "--json").out)["advice"]
    before = path.stat().st_size
    assert ckpt(*shlex.split(advice["command"])[1:]).code == 0
    assert path.stat().st_size < 0.55 * before
    assert json.loads(ckpt("info", path, "--json").out)["advice"] == []


def test_the_state_of_a_trainer_beside_the_weights_is_told(tmp_path: Path, ckpt: Any) -> None:
    net, optimizer = trained()
    save_file(net.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": "4.57.0"}))
    log = [{"learning_rate": 2e-5, "step": 50}, {"eval_loss": 1.0}]
    state = {"epoch": 1.5, "global_step": 100, "max_steps": 200, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    found = json.loads(ckpt("info", tmp_path / "model.safetensors", "--json").out)
    training = found["training"]
    assert training["writer"] == "Hugging Face Trainer, transformers 4.57.0"
    assert (training["epoch"], training["global_step"]) == (1.5, 100)
    assert training["hyper_parameters"]["max_steps"] == 200
    (beside,) = found["beside"]
    assert (beside["name"], beside["parameters"]) == ("optimizer.pt", state_numel(optimizer))
    assert found["parameters"] == sum(parameter.numel() for parameter in net.parameters())


def test_a_folder_of_accelerate_names_its_writer_and_the_optimizer(tmp_path: Path, ckpt: Any) -> None:
    net, optimizer = trained()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    torch.save({"step": 3}, tmp_path / "random_states_0.pkl")
    found = json.loads(ckpt("info", tmp_path / "model.safetensors", "--json").out)
    assert found["training"]["writer"] == "Accelerate"
    assert [part["parameters"] for part in found["beside"]] == [state_numel(optimizer)]
    alone = json.loads(ckpt("info", tmp_path / "optimizer.bin", "--json").out)
    assert [part["role"] for part in alone["parts"]] == ["optimizer"]
    assert alone["advice"] == []


def test_a_broken_optimizer_beside_does_not_stop_info(tmp_path: Path, ckpt: Any) -> None:
    save_file(trained()[0].state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text("{")
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04 cut")
    assert ckpt("info", tmp_path / "model.safetensors").code == 0


def test_modules_with_telling_names_in_a_state_dict_are_the_model(tmp_path: Path, ckpt: Any) -> None:
    names = ["scaler.weight", "callbacks.0.weight", "optimizer_head", "schema.weight", "args.bias", "metrics.total"]
    torch.save({name: torch.ones(3) for name in names}, tmp_path / "m.pt")
    found = json.loads(ckpt("info", tmp_path / "m.pt", "--json").out)
    assert [part["role"] for part in found["parts"]] == ["model"]
    assert found["parameters"] == 3 * len(names)


def test_a_scalar_beside_the_containers_is_not_of_the_model(tmp_path: Path, ckpt: Any) -> None:
    net, optimizer = trained()
    torch.save({**of_torch(net, optimizer), "loss": torch.tensor(0.5)}, tmp_path / "m.pt")
    found = json.loads(ckpt("info", tmp_path / "m.pt", "--json").out)
    assert [part["role"] for part in found["parts"]] == ["model", "optimizer", "other"]


def test_info_folds_the_largest_tensors_and_says_that_no_gradients_are_stored(tmp_path: Path, ckpt: Any) -> None:
    net, _ = trained()
    torch.save(net.state_dict(), tmp_path / "m.pt")
    shown = ckpt("info", "-f", "table", tmp_path / "m.pt").out
    assert "3 × [N].weight, float32 [32,32], 12.3 kB" in shown
    assert "gradients" in shown
    assert "not stored" in shown


def test_tied_weights_of_two_parts_are_counted_once(tmp_path: Path, ckpt: Any) -> None:
    weight = torch.ones(8, 8)
    torch.save({"encoder": {"w": weight}, "decoder": {"w": weight}}, tmp_path / "m.pt")
    assert json.loads(ckpt("info", tmp_path / "m.pt", "--json").out)["parameters"] == 64


def test_the_totals_of_ls_count_what_an_optimizer_keeps_apart_from_parameters(tmp_path: Path, ckpt: Any) -> None:
    net, optimizer = trained()
    numel = sum(parameter.numel() for parameter in net.parameters())
    moments = state_numel(optimizer)
    torch.save(of_torch(net, optimizer), tmp_path / "a.pt")

    def totals(*names: str) -> str:
        last: str = ckpt("ls", "-f", "table", tmp_path / "a.pt", *names).lines[-1]
        return last

    assert f" tensors, {numel:,} parameters, {moments:,} other elements, " in totals()
    assert f" tensors, {numel:,} parameters, " in totals("model")
    assert f" tensors, {moments:,} elements, " in totals("optimizer")
    assert "other" not in totals("model")
    reported = json.loads(ckpt("ls", "--json", tmp_path / "a.pt").out)
    assert reported["parameters"] == numel + moments  # all elements: what the shape has always had
