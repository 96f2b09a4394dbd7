"""`mix`: task arithmetic, TIES, DARE and SLERP against their formulas in torch, at any number of jobs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_cli
from ckpt_cli.arrays.mixing import arc_weights, drawn, key_of
from ckpt_cli.edits.derive import DeriveOptions
from ckpt_cli.edits.mix import MixOptions, mix

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def states(count: int, dtype: torch.dtype = torch.float32) -> list[State]:
    """A base, and models that differ from it by noise; one tensor is longer than what is made at a time."""
    torch.manual_seed(count)
    base = {"w": torch.randn(40, 30), "b": torch.randn(30), "s": torch.tensor(2.0), "big": torch.randn(700, 800)}
    noisy = [{name: value + 0.01 * torch.randn_like(value) for name, value in base.items()} for _ in range(count)]
    return [{name: value.to(dtype) for name, value in state.items()} for state in [base, *noisy]]


def saved(given_states: Sequence[State]) -> list[str]:
    paths = []
    for number, state in enumerate(given_states):
        paths.append(f"{number}.{'safetensors' if number % 2 else 'pt'}")
        save_file(state, paths[-1]) if number % 2 else torch.save(state, paths[-1])
    return paths


def kept(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the greatest magnitudes of a task vector, the first ones of equal ones."""
    count = max(1, int(density * delta.numel()))
    order = torch.argsort(delta.abs().reshape(-1), descending=True, stable=True)[:count]
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order] = True
    return delta * mask.reshape(delta.shape)


def summed(
    base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float], *, ties: bool, norm: bool
) -> Any:
    """Add weighted task vectors to a base as mergekit's generalized task arithmetic does."""
    stacked = torch.stack(list(deltas))
    factors = torch.tensor(weights, dtype=stacked.dtype).reshape(-1, *[1] * base.dim())
    weighted = stacked * factors
    if ties:
        majority = (weighted.sum(dim=0) >= 0).to(weighted.dtype) * 2 - 1
        mask = weighted.sign() == majority
        mixed, divisor = (weighted * mask).sum(dim=0), (factors * mask).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        mixed, divisor = weighted.sum(dim=0), factors.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    return base + (mixed / divisor if norm else mixed)


def mixed(given_states: Sequence[State], name: str, weights: Sequence[float], density: float, **how: bool) -> Any:
    wide = [
        state[name].double() if state[name].dtype == torch.float64 else state[name].float() for state in given_states
    ]
    deltas = [kept(value - wide[0], density) for value in wide[1:]]
    return summed(wide[0], deltas, weights, **how).to(given_states[0][name].dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(1.0,), (0.5, -0.3, 0.8)])
@pytest.mark.parametrize(
    ("method", "density", "norm"),
    [("task", 1.0, None), ("task", 1.0, True), ("ties", 1.0, None), ("ties", 0.3, None), ("ties", 0.3, False)],
)
def test_task_vectors_are_added_as_in_torch(
    ckpt: Ckpt, dtype: torch.dtype, weights: tuple[float, ...], method: str, density: float, norm: bool | None
) -> None:
    given_states = states(len(weights), dtype)
    base, *models = saved(given_states)
    options = [] if norm is None else ["--normalize" if norm else "--no-normalize"]
    options += [] if density == 1 else ["--density", density]
    listed = ",".join(map(str, weights))
    answer = ckpt("mix", base, *models, "--method", method, f"--weights={listed}", *options, "-o", "out.pt")
    assert answer.code == 0, answer.err
    found, ties = torch.load("out.pt"), method == "ties"
    for name in given_states[0]:
        wanted = mixed(given_states, name, weights, density, ties=ties, norm=ties if norm is None else norm)
        assert torch.equal(found[name], wanted), name


def test_of_equal_changes_the_first_ones_are_kept(ckpt: Ckpt) -> None:
    count = 600_000  # more than is made at a time
    base = {"w": torch.zeros(count)}
    change = torch.zeros(count)
    change[::3] = 0.5
    change[1::3] = -0.5
    change[10] = 2.0
    base_path, model = saved([base, {"w": change}])
    assert ckpt("mix", base_path, model, "--method", "ties", "--density", "0.45", "-o", "out.pt").code == 0
    found = torch.load("out.pt")["w"]
    assert torch.equal(found, kept(change, 0.45))
    assert int((found != 0).sum()) == int(0.45 * count)


def test_dare_keeps_a_share_by_chance_and_divides_by_it(ckpt: Ckpt) -> None:
    base, model = (
        {"w": torch.zeros(900_000), "v": torch.zeros(10)},
        {"w": torch.full((900_000,), 0.5), "v": torch.ones(10)},
    )
    paths = saved([base, model, model])
    command = ["mix", *paths, "--method", "dare", "--density", "0.25", "--weights", "1,1"]
    assert ckpt(*command, "-o", "out.pt").code == 0
    found = torch.load("out.pt")["w"]
    assert set(found.unique().tolist()) == {0.0, 2.0, 4.0}
    assert abs(found.mean().item() - 1.0) < 0.01
    assert abs((found == 4).float().mean().item() - 0.25**2) < 0.003  # each model has a chance of its own
    assert ckpt(*command, "--seed", "1", "-o", "seed.pt").code == 0
    assert not torch.equal(torch.load("seed.pt")["w"], found)


def test_what_dare_keeps_is_that_of_numpys_philox() -> None:
    key = key_of(3, 1, "w")
    words = np.random.Philox(key=key).random_raw(500).view(np.uint32)
    whole = drawn(key, 0, 1000, 0.3)
    assert np.array_equal(whole, words < math.floor(0.3 * 2**32))
    assert np.array_equal(drawn(key, 400, 123, 0.3), whole[400:523])
    assert len({key_of(3, 1, "w"), key_of(3, 0, "w"), key_of(2, 1, "w"), key_of(3, 1, "v")}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(ckpt: Ckpt, dtype: torch.dtype, t: float) -> None:
    torch.manual_seed(0)
    one, other = ({"w": torch.randn(90, 70).to(dtype), "same": torch.ones(5).to(dtype)} for _ in range(2))
    base, model = saved([one, other])
    assert ckpt("mix", base, model, "--method", "slerp", "--t", t, "-o", "out.pt").code == 0
    found = torch.load("out.pt")
    a, b = one["w"].double(), other["w"].double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    wanted = torch.sin((1 - t) * angle) / torch.sin(angle) * a + torch.sin(t * angle) / torch.sin(angle) * b
    eps = 2 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    assert torch.allclose(found["w"].double(), wanted, rtol=eps, atol=eps)
    assert torch.equal(found["same"], one["same"])  # of the same direction: a line


def test_vectors_of_one_direction_or_none_have_the_weights_of_a_line() -> None:
    assert arc_weights(4.0, 9.0, 6.0, 0.25) == (0.75, 0.25)
    assert arc_weights(4.0, 9.0, -6.0, 0.25) == (0.75, 0.25)
    assert arc_weights(float("nan"), 9.0, -6.0, 0.25) == (0.75, 0.25)
    assert arc_weights(0.0, 4.0, 0.0, 0.5)[0] == pytest.approx(math.sin(math.pi / 4))


@pytest.mark.parametrize("method", ["task", "ties", "dare", "slerp"])
def test_the_bits_do_not_depend_on_jobs_or_formats(ckpt: Ckpt, method: str) -> None:
    given_states = states(1 if method == "slerp" else 2, torch.bfloat16)
    paths = saved(given_states)
    how = {"slerp": ["--t", "0.4"], "task": []}.get(method, ["--density", "0.4"])
    for jobs, output in ((1, "one.pt"), (5, "five.pt"), (3, "three.safetensors")):
        assert ckpt("mix", *paths, "--method", method, *how, "-j", jobs, "-o", output).code == 0
    one, five, three = torch.load("one.pt"), torch.load("five.pt"), load_file("three.safetensors")
    assert all(torch.equal(one[name], five[name]) and torch.equal(one[name], three[name]) for name in one)


@given(
    st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    st.floats(0.01, 1),
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, math.inf]), min_size=6, max_size=6),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_dtypes_and_densities_keep_what_torch_keeps(dtypes: list[Any], density: float, values: list[float]) -> None:
    torch.manual_seed(len(values))
    given_states = [
        {"w": (torch.tensor(values) * torch.randint(0, 3, (6,))).nan_to_num(1.0, 9.0, -9.0).to(d)} for d in dtypes
    ]
    base, *models = saved(given_states)
    mix(base, models, "out.pt", MixOptions("ties", density=density, output=DeriveOptions(force=True)))
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    raised = [{"w": state["w"].to(wide)} for state in given_states]
    wanted = mixed(raised, "w", [1.0] * len(models), density, ties=True, norm=True)
    found = torch.load("out.pt")["w"]
    assert torch.equal(found.to(wide), wanted.to(found.dtype).to(wide))


def test_everything_else_is_that_of_the_base_and_ties_stay(ckpt: Ckpt) -> None:
    weight, other = torch.randn(3, 3), torch.randn(3, 3)
    torch.save({"model": {"a": weight, "b": weight, "n": torch.tensor(3)}, "epoch": 1}, "base.pt")
    torch.save({"model": {"a": other, "b": other, "n": torch.tensor(4)}, "epoch": 2}, "m.pt")
    report = json.loads(ckpt("mix", "base.pt", "m.pt:0.5", "--method", "task", "-o", "out.pt", "--json").out)
    found = torch.load("out.pt")
    assert (found["epoch"], found["model"]["n"].item(), report["mixed"]) == (1, 3, 2)
    assert found["model"]["a"].data_ptr() == found["model"]["b"].data_ptr()
    assert report["inputs"] == [{"path": "m.pt", "weight": 0.5}]
    assert torch.equal(found["model"]["a"], weight + 0.5 * (other - weight))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method slerp --t 0.5 1.pt", "one model"),
        ("--method slerp", "takes --t"),
        ("--method slerp --t 2", "takes --t"),
        ("--method slerp --t 0.5 --weights 1", "no weights"),
        ("--method task --t 0.5", "--t is for slerp"),
        ("--method task --density 0.5", "--density is for ties and dare"),
        ("--method ties --density 0", "--density is more than 0"),
        ("--method ties --weights 1,2", "2 weights for 1 models"),
        ("--method ties --weights nan", "not a finite number"),
        ("--method sum", "sum"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(ckpt: Ckpt, arguments: str, said: str) -> None:
    for path in ("0.pt", "1.pt", "2.pt"):
        torch.save({"w": torch.ones(2)}, path)
    answer = ckpt("mix", "0.pt", "2.pt", *arguments.split(), "-o", "out.pt")
    assert (answer.code, said in answer.err, Path("out.pt").exists()) == (2, True, False), answer.err


def test_names_that_differ_are_refused(ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2)}, "a.pt")
    torch.save({"v": torch.ones(2)}, "b.pt")
    answer = ckpt("mix", "a.pt", "b.pt", "--method", "task", "-o", "out.pt")
    assert (answer.code, "--common" in answer.err) == (2, True)


def test_what_the_format_cannot_hold_is_left_out_where_that_is_allowed(ckpt: Ckpt) -> None:
    save_file({"w": torch.ones(2)}, "a.safetensors", {"note": "mine"})
    command = ["mix", "a.safetensors", "a.safetensors", "--method", "task", "-o", "out.pt"]
    answer = ckpt(*command)
    assert (answer.code, "--tensors-only leaves them out" in answer.err) == (2, True)
    assert ckpt(*command, "--tensors-only").code == 0
    assert torch.equal(torch.load("out.pt")["w"], torch.ones(2))


def test_python_mixes_too() -> None:
    base, model = saved(states(1))
    assert ckpt_cli.mix(base, [model], "out.pt", method="slerp", t=0.5)["mixed"] == 4
