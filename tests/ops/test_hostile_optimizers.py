"""Groups and states of optimizers that nobody's training writes: each command says one line, and changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt

from ckpt_cli import limits

_SHARED: list[Any] = [0, 1]
_CYCLE: list[Any] = [0]
_CYCLE.append(_CYCLE)
_GROUP: dict[str, Any] = {"lr": 0.1, "params": [0]}
_GROUP["again"] = _GROUP


def _state(number: int = 2) -> dict[Any, Any]:
    return {at: {"step": torch.tensor(1.0), "exp_avg": torch.ones(at + 1)} for at in range(number)}


BROKEN: dict[str, Any] = {
    "negative": [{"params": [0, -1]}],
    "twice in a group": [{"params": [0, 0]}],
    "twice in two groups": [{"params": [0, 1]}, {"params": [1]}],
    "one list in two groups": [{"params": _SHARED}, {"params": _SHARED}],
    "bools": [{"params": [True, False]}],
    "floats": [{"params": [0.0, 1.0]}],
    "None": [{"params": [None, None]}],
    "numbers and names": [{"params": [0, "b"]}],
    "nested": [{"params": [[0, 1]]}],
    "a number": [{"params": 2}],
    "a text": [{"params": "01"}],
    "no list": [{"lr": 0.1}, {"lr": 0.2}],
    "cyclic list": [{"params": _CYCLE}],
    "cyclic group": [_GROUP],
    "huge numbers": [{"params": [10**5000, 1 << 70]}],
    "a dict": {"params": [0, 1]},
    "a dict of groups": {"0": {"params": [0, 1]}, "x": {"params": [0]}},
    "no group": [],
    "empty groups": [{}, {}],
    "names that are no text": [{"params": [0, 1], "param_names": [0, None]}],
    "names of another number": [{"params": [0, 1], "param_names": ["a"]}],
    "names that are a text": [{"params": [0, 1], "param_names": "ab"}],
    "one name twice": [{"params": [0, 1], "param_names": ["a", "a"]}],
    "names to escape": [{"params": ["\x1b[2J", "a\nb"]}],
    "settings of other kinds": [{"params": [0, 1], "lr": [1], "weight_decay": {"a": 1}}],
    "settings that are tensors": [{"params": [0, 1], "lr": torch.ones(3), "weight_decay": torch.tensor(0.5)}],
}
STATES: dict[str, Any] = {
    "states": _state(),
    "no states": {},
    "states that are lists": {0: [torch.ones(1)], 1: torch.ones(2)},
    "states of texts": {"a": {"exp_avg": torch.ones(1)}, "": {"exp_avg": torch.ones(2)}},
    "states of negative numbers": {-1: {"exp_avg": torch.ones(1)}, 1 << 80: {"exp_avg": torch.ones(2)}},
    "steps of other kinds": {0: {"step": "x", "exp_avg": torch.ones(1)}, 1: {"step": torch.ones(2)}},
}


def _require_one_line(answer: Any) -> None:
    assert answer.code in (0, 1, 2)
    assert "Traceback" not in answer.err
    assert "\x1b" not in answer.out + answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("ckpt:")]
    assert len(errors) == (answer.code == 2)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("groups", BROKEN)
def test_each_command_answers_or_refuses_in_one_line(groups: str, states: str, here: Path, ckpt: Ckpt) -> None:
    model = {"a": torch.ones(1), "b": torch.ones(2)}
    torch.save({"model": model, "optimizer": {"state": STATES[states], "param_groups": BROKEN[groups]}}, "a.pt")
    shutil.copy("a.pt", "before.pt")
    _require_one_line(ckpt("ls", "--optimizer", "a.pt"))
    _require_one_line(ckpt("check", "a.pt"))
    for command in (("rm", "a.pt", "model.a"), ("rename", "a.pt", "model.a", "model.c")):
        for choice in (None, "trust", "drop", "leave"):
            shutil.copy("before.pt", "a.pt")
            answer = ckpt(*command, *(["--optimizer", choice] if choice else []))
            _require_one_line(answer)
            if answer.code:
                assert Path("a.pt").read_bytes() == Path("before.pt").read_bytes()
            else:
                torch.load("a.pt", weights_only=False)


def test_more_parameters_than_are_allowed_are_refused(here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OPTIMIZER_PARAMETERS", 10)
    for groups in ([{"params": list(range(11))}], [{"params": list(range(6))}, {"params": list(range(6, 12))}]):
        torch.save({"model": {"a": torch.ones(1), "b": torch.ones(2)},
                    "optimizer": {"state": _state(), "param_groups": groups}}, "a.pt")  # fmt: skip
        assert "10" in ckpt("ls", "--optimizer", "a.pt").err
        answer = ckpt("rm", "a.pt", "model.a")
        assert answer.code == 2
        assert "it is not known which states" in answer.err


def test_very_many_parameters_take_a_moment(here: Path, ckpt: Ckpt) -> None:
    numbers = list(range(60_000))
    torch.save({"model": {f"p{at}": torch.ones(1) for at in range(2_000)},
                "optimizer": {"state": {}, "param_groups": [{"params": numbers}]}}, "a.pt")  # fmt: skip
    assert ckpt("ls", "--optimizer", "a.pt", "model.p1").lines == ["model.p1\tfloat32\t[1]\t\t\t\t\t\t"]
    assert ckpt("rm", "a.pt", "model.p1").code == 2
