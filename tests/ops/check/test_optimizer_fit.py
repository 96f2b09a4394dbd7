"""`ckpt check` of an optimizer against its model: what does not fit, and no false alarm on what does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_cases.case import codes
from training_runs import OPTIMIZERS, begin, module, saved

from ckpt_cli.ops.check.run import check

SHAPES = {"enc.w": (4, 3), "enc.b": (4,), "norm.g": (4,), "head.v": (3, 4), "head.d": (3,)}
GROUPS = [["enc.w", "head.v"], ["enc.b", "norm.g", "head.d"]]
Data = dict[str, Any]


def data(make: str = "Adam", *, named: bool = True, frozen: tuple[str, ...] = (), lightning: bool = False) -> Data:
    """A checkpoint after a step."""
    run = begin(module(SHAPES, frozen=frozen), OPTIMIZERS[make], GROUPS, named=named)
    run.step(0)
    return saved(run, lightning=lightning)


def faults(state: Data, folder: Path) -> list[tuple[str, str]]:
    """The severity and message of each finding about the optimizer."""
    torch.save(state, folder / "a.pt")
    found = check(str(folder / "a.pt")).findings
    return [(each.severity, each.message) for each in found if each.code == "optimizer-fit"]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("lightning", [True, False])
def test_what_torch_saves_fits(make: str, named: bool, lightning: bool, tmp_path: Path) -> None:
    for frozen in ((), ("enc.b",), tuple(SHAPES)):
        assert faults(data(make, named=named, frozen=frozen, lightning=lightning), tmp_path) == []


@pytest.mark.parametrize("path", ["zero1", "zero2", "zero3", "fsdp1", "fsdp2", "hsdp"])
def test_the_folders_of_ranks_fit(path: str) -> None:
    assert "optimizer-fit" not in codes(check(str(Path(__file__).parents[2] / "samples" / path)))


def _more(state: Data) -> None:
    del state["model"]["enc.b"]


def _shape(state: Data) -> None:
    state["model"]["enc.w"] = torch.ones(5, 3)


def _twice(state: Data) -> None:
    state["optimizer"]["param_groups"][1]["params"][0] = 0


def _names(state: Data) -> None:
    state["optimizer"]["param_groups"][1]["param_names"].pop()


def _negative(state: Data) -> None:
    state["optimizer"]["param_groups"][1]["params"][0] = -1


@pytest.mark.parametrize(
    ("change", "named", "severity", "words"),
    [
        (_more, True, "warning", "does not have 1 parameter of it: enc.b"),
        (_more, False, "warning", "states of 5 parameters, and the model at most 4"),
        (_shape, True, "error", "the state of enc.w has the shape [4, 3], and the parameter [5, 3]"),
        (_shape, False, "warning", "than the model has: [4, 3]"),
        (_twice, False, "error", "groups 0 and 1 both list parameter 0"),
        (_names, True, "error", "group 1 has 3 parameters, and names for 2"),
        (_negative, False, "error", "negative"),
    ],
)
def test_what_does_not_fit_is_said(
    change: Callable[[Data], None], named: bool, severity: str, words: str, tmp_path: Path
) -> None:
    state = data(named=named)
    change(state)
    ((found, message),) = faults(state, tmp_path)
    assert found == severity
    assert words in message


def test_states_of_another_kind_are_no_fault(tmp_path: Path) -> None:
    flat = data(named=False)  # as fairseq writes it: one vector of all parameters
    numel = sum(tensor.numel() for tensor in flat["model"].values())
    vector = {"step": 1, "exp_avg": torch.ones(numel), "exp_avg_sq": torch.ones(numel)}
    flat["optimizer"] = {"state": {0: vector}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    assert faults(flat, tmp_path) == []
    weights = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    lbfgs = torch.optim.LBFGS(weights)

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = (weights[0].sum() - 1) ** 2 + (weights[1] ** 2).sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    state = {"model": {"a": weights[0].detach(), "b": weights[1].detach()}, "optimizer": lbfgs.state_dict()}
    assert faults(state, tmp_path) == []
    alone = data(named=False)["optimizer"]
    assert faults(alone, tmp_path) == []
    assert faults({"model": {"lora.a": torch.ones(9, 9)}, "optimizer": alone}, tmp_path) == []
