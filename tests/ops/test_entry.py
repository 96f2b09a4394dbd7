"""`info FILE NAME`: one entry as one looks at it in Python, and what `show` leaves out of a pickled module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


def described(ckpt: Ckpt, path: Path, *names: str) -> Any:
    return json.loads(ckpt("info", path, *names, "--json").out)


def test_a_parameter_of_a_module_is_described_as_torch_shows_it(
    net: torch.nn.Module, tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "whole.pt"
    torch.save(net, path)
    bias = net[2].bias
    facts = described(ckpt, path, "2.bias")
    assert facts["class"] == f"{type(bias).__module__}.{type(bias).__name__}"
    assert (facts["dtype"], facts["shape"], facts["stride"]) == ("float32", [2], [1])
    assert facts["requires_grad"] is bias.requires_grad
    assert facts["device"] == str(bias.device)
    assert facts["gradient"] is None
    for name in ("min", "max", "mean"):
        assert facts[name] == pytest.approx(getattr(bias.detach().double(), name)().item())
    (place,) = facts["places"]
    data = path.read_bytes()[place["offset"] : place["offset"] + place["nbytes"]]
    assert data == bias.detach().numpy().tobytes()
    shown = ckpt("info", path, "2.bias", "-f", "table").out
    assert "torch.nn.parameter.Parameter" in shown
    assert "None: torch does not store gradients" in shown


def test_the_gradient_that_a_file_has_is_named(net: torch.nn.Module, tmp_path: Path, ckpt: Ckpt) -> None:
    net(torch.ones(3, 4)).sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    torch.save({"model": net.state_dict(), "grads": grads}, tmp_path / "a.pt")
    assert described(ckpt, tmp_path / "a.pt", "model.2.bias")["gradient"] == "grads.2.bias"
    assert described(ckpt, tmp_path / "a.pt", "model.1.running_mean")["gradient"] is None
    assert described(ckpt, tmp_path / "a.pt")["gradients"] is True
    torch.save({"w": torch.ones(2), "w.grad": torch.ones(2)}, tmp_path / "b.pt")
    assert described(ckpt, tmp_path / "b.pt", "w")["gradient"] == "w.grad"


def test_tied_names_and_views_are_described(tmp_path: Path, ckpt: Ckpt) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": weight, "b": weight, "column": weight[:, 1]}, tmp_path / "m.pt")
    assert described(ckpt, tmp_path / "m.pt", "a")["tied_with"] == ["b"]
    column = described(ckpt, tmp_path / "m.pt", "column")
    assert (column["stride"], column["storage_offset"], column["storage_nbytes"]) == ([4], 1, 48)
    assert (column["min"], column["max"], column["mean"]) == (1, 9, 5)


def test_odd_values_and_kinds_are_described(tmp_path: Path, ckpt: Ckpt) -> None:
    state = {"nan": torch.tensor([float("nan"), 1.0]), "none": torch.zeros(0), "eye": torch.eye(3).to_sparse()}
    torch.save(
        {**state, "meta": torch.empty(3, device="meta"), "flags": torch.tensor([True, False])}, tmp_path / "m.pt"
    )
    assert described(ckpt, tmp_path / "m.pt", "nan")["nan"] == 1
    assert described(ckpt, tmp_path / "m.pt", "none")["min"] is None
    for name in ("nan", "none", "eye", "meta", "flags"):
        assert ckpt("info", tmp_path / "m.pt", name, "-f", "table").code == 0


def test_values_and_containers_are_described(net: torch.nn.Module, tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(net, tmp_path / "whole.pt")
    module = described(ckpt, tmp_path / "whole.pt", "1")
    assert (module["type"], module["class"]) == ("container", "torch.nn.modules.batchnorm.BatchNorm1d")
    assert module["numel"] == sum(value.numel() for value in net[1].state_dict().values())
    setting = described(ckpt, tmp_path / "whole.pt", "1.eps")
    assert (setting["class"], setting["value"], setting["of_module"]) == ("float", 1e-05, True)
    torch.save({"model": net.state_dict(), "epoch": 3}, tmp_path / "m.pt")
    epoch, model = described(ckpt, tmp_path / "m.pt", "epoch", "model")
    assert (epoch["class"], epoch["value"], epoch["of_module"]) == ("int", 3, False)
    assert model["class"] == "collections.OrderedDict"
    assert model["tensors"] == len(net.state_dict())


def test_safetensors_entries_have_no_module_class(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({"w": torch.ones(2, 3)}, tmp_path / "m.safetensors")
    facts = described(ckpt, tmp_path / "m.safetensors", "w")
    assert (facts["class"], facts["max"]) == ("torch.Tensor", 1.0)


def test_an_unknown_name_and_an_index_are_errors(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "m.pt")
    for name in ("wait", "weight[0]"):
        done = ckpt("info", tmp_path / "m.pt", name)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("ckpt: ")


def names_shown(ckpt: Ckpt, *arguments: object) -> list[str]:
    return [item["name"] for item in json.loads(ckpt("show", *arguments, "--json").out)]


def test_show_of_a_pickled_module_prints_what_its_state_dict_has(
    net: torch.nn.Module, tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "whole.pt"
    torch.save(net, path)
    assert names_shown(ckpt, path) == list(net.state_dict())
    assert names_shown(ckpt, path, "1") == [f"1.{name}" for name in net[1].state_dict()]
    assert names_shown(ckpt, path, "1.*") == [f"1.{name}" for name in net[1].state_dict()]
    assert {"training", "0.in_features", "1.eps"} < set(names_shown(ckpt, path, "-a"))
    assert ckpt("show", path, "1.eps").out == "1.eps = 1e-05\n" or ckpt("show", path, "1.eps").out == "1e-05\n"


def test_show_of_a_module_without_tensors_prints_its_settings(tmp_path: Path, ckpt: Ckpt) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.25)), tmp_path / "m.pt")
    assert "1.p" in names_shown(ckpt, tmp_path / "m.pt", "1")


def test_show_keeps_the_values_of_a_training_checkpoint_and_drops_those_of_a_module_in_it(
    net: torch.nn.Module, tmp_path: Path, ckpt: Ckpt
) -> None:
    torch.save({"model": net, "epoch": 3}, tmp_path / "m.pt")
    assert names_shown(ckpt, tmp_path / "m.pt") == [*(f"model.{name}" for name in net.state_dict()), "epoch"]


def test_show_of_torchscript_prints_tensors_alone(ckpt: Ckpt) -> None:
    path = Path(__file__).parent.parent / "samples" / "script.pt"
    listed = json.loads(ckpt("ls", path, "--json").out)["entries"]
    assert names_shown(ckpt, path) == [entry["name"] for entry in listed]
    assert "0.training" in names_shown(ckpt, path, "-a")
