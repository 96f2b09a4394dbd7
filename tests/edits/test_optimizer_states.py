"""States of an optimizer that go and are renamed with their parameters, with torch's own training as the oracle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import OPTIMIZERS, Run, begin, module, same, same_runs, saved, selected

import ckpt_cli

SHAPES = {"enc.w": (4, 3), "enc.b": (4,), "norm.g": (4,), "norm.c": (4,), "head.v": (3, 4), "head.d": (3,)}
DECAY = [["enc.w", "head.v"], ["enc.b", "norm.g", "norm.c", "head.d"]]
ONE = [list(SHAPES)]


def trained(make: str, groups: list[list[str]], *, named: bool, frozen: tuple[str, ...] = ("norm.c",)) -> Run:
    """A run after three steps."""
    run = begin(module(SHAPES, frozen=frozen), OPTIMIZERS[make], groups, named=named)
    for seed in range(3):
        run.step(seed)
    return run


def loaded(path: str | Path, kept: list[str], make: str, groups: list[list[str]], *, named: bool = False) -> Run:
    """What torch loads of a checkpoint into a model with some of the parameters."""
    data = torch.load(path, weights_only=True)
    optimizer = data["optimizer"] if "optimizer" in data else data["optimizer_states"][0]
    shapes = {name: SHAPES[name] for name in kept}
    new = begin(module(shapes, frozen=("norm.c",)), OPTIMIZERS[make], groups, named=named)
    return new.load(data.get("model", data.get("state_dict")), optimizer)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("groups", [ONE, DECAY], ids=["one group", "two groups"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "numbered"])
@pytest.mark.parametrize("lightning", [False, True], ids=["plain", "lightning"])
def test_the_next_step_after_rm_is_that_of_a_fresh_selection(
    here: Path, ckpt: Ckpt, make: str, groups: list[list[str]], named: bool, lightning: bool
) -> None:
    run = trained(make, groups, named=named)
    torch.save(saved(run, lightning=lightning), "a.pt")
    where = "state_dict" if lightning else "model"
    answer = ckpt("rm", "a.pt", f"{where}.norm", f"{where}.enc.b", *([] if named else ["--optimizer", "trust"]))
    if answer.code and groups is DECAY and make == "plain SGD":  # it has no state that says which group has matrices
        assert not named
        return
    assert answer.code == 0, answer.err
    kept = ["enc.w", "head.v", "head.d"]
    fresh = selected(run, groups, kept, OPTIMIZERS[make], named=named)
    after = loaded("a.pt", kept, make, groups, named=named)
    assert same_runs(after, fresh)
    for seed in (7, 8):
        after.step(seed)
        fresh.step(seed)
    assert same_runs(after, fresh)
    groups_after = _optimizer("a.pt")["param_groups"]
    assert sorted(number for group in groups_after for number in group["params"]) == [0, 1, 2]


def _optimizer(path: str) -> Any:
    data = torch.load(path, weights_only=True)
    return data["optimizer"] if "optimizer" in data else data["optimizer_states"][0]


def test_a_group_that_loses_all_its_parameters_stays_with_its_settings(here: Path, ckpt: Ckpt) -> None:
    groups = [["enc.w", "enc.b"], ["norm.g", "norm.c"], ["head.v", "head.d"]]
    run = trained("Adam", groups, named=False)
    torch.save(saved(run), "a.pt")
    assert ckpt("rm", "a.pt", "model.norm", "--optimizer", "trust").code == 0
    kept = ["enc.w", "enc.b", "head.v", "head.d"]
    fresh = selected(run, groups, kept, OPTIMIZERS["Adam"])
    assert same_runs(loaded("a.pt", kept, "Adam", groups), fresh)


def test_shapes_that_fit_one_way_alone_need_no_names(here: Path, ckpt: Ckpt) -> None:
    shapes = {"a.w": (2, 3), "a.b": (2,), "b.w": (4, 2), "b.b": (4,)}
    run = begin(module(shapes), OPTIMIZERS["Adam"], [["b.b", "a.w", "b.w", "a.b"]])
    run.step(0)
    torch.save(saved(run), "a.pt")
    assert ckpt("rm", "a.pt", "model.a.w").code == 0
    kept = ["a.b", "b.w", "b.b"]
    fresh = selected(run, [["b.b", "b.w", "a.b"]], kept, OPTIMIZERS["Adam"])
    assert same(_optimizer("a.pt"), fresh.optimizer.state_dict())


@pytest.mark.parametrize("groups", [ONE, DECAY])
def test_an_order_alone_is_refused_with_the_choices(here: Path, ckpt: Ckpt, groups: list[list[str]]) -> None:
    torch.save(saved(trained("Adam", groups, named=False)), "a.pt")
    before = Path("a.pt").read_bytes()
    for command in (("rm", "a.pt", "model.norm"), ("keep", "a.pt", "model.enc", "optimizer")):
        answer = ckpt(*command)
        assert answer.code == 2
        assert "no proof" in answer.err
        assert all(choice in answer.err for choice in ("trust", "drop", "leave"))
        assert len(answer.err.splitlines()) == 2
    assert Path("a.pt").read_bytes() == before
    states = _optimizer("a.pt")
    assert ckpt("rm", "a.pt", "model.norm", "--optimizer", "leave", "-o", "left.pt").code == 0
    assert same(_optimizer("left.pt"), states)
    assert ckpt("rm", "a.pt", "model.norm", "--optimizer", "drop", "-o", "dropped.pt").code == 0
    assert list(torch.load("dropped.pt")) == ["model", "epoch"]
    assert ckpt("rm", "a.pt", "model.norm", "--optimizer", "maybe").code == 2


def test_a_model_that_goes_whole_leaves_its_optimizer_as_it_is(here: Path, ckpt: Ckpt) -> None:
    for named in (True, False):
        torch.save(saved(trained("Adam", ONE, named=named)), "a.pt")
        states = _optimizer("a.pt")
        assert ckpt("rm", "a.pt", "model", "-o", "b.pt").code == 0
        assert ckpt("keep", "a.pt", "optimizer", "-o", "c.pt").code == 0
        assert same(_optimizer("b.pt"), states)
        assert same(_optimizer("c.pt"), states)


def test_what_is_no_parameter_goes_without_a_question(here: Path, ckpt: Ckpt) -> None:
    data = saved(trained("Adam", ONE, named=False))
    data["model"]["norm.num_batches_tracked"] = torch.tensor(3)
    torch.save(data, "a.pt")
    assert ckpt("rm", "a.pt", "model.norm.num_batches_tracked", "epoch").code == 0
    assert same(_optimizer("a.pt"), data["optimizer"])


def test_names_in_the_optimizer_follow_a_renaming(here: Path, ckpt: Ckpt) -> None:
    run = trained("AdamW", DECAY, named=True)
    torch.save(saved(run), "a.pt")
    assert ckpt("rename", "a.pt", "model.enc", "model.body").code == 0
    after = _optimizer("a.pt")
    assert [group["param_names"] for group in after["param_groups"]] == [
        ["body.w", "head.v"], ["body.b", "norm.g", "norm.c", "head.d"],
    ]  # fmt: skip
    assert same(after["state"], run.optimizer.state_dict()["state"])
    assert ckpt("rename", "a.pt", "model.body", "model.enc").code == 0
    assert ckpt("rename", "a.pt", "model", "net").code == 0
    assert same(_optimizer("a.pt"), run.optimizer.state_dict())


def test_a_renaming_changes_nothing_in_an_optimizer_without_names(here: Path, ckpt: Ckpt) -> None:
    run = trained("AdamW", DECAY, named=False)
    torch.save(saved(run), "a.pt")
    assert ckpt("rename", "a.pt", "model.enc", "model.body").code == 0
    assert same(_optimizer("a.pt"), run.optimizer.state_dict())


def by_name(run: Run) -> dict[str, Any]:
    """An optimizer's state_dict as FSDP and `get_state_dict` write it."""
    names = [name for name, _ in run.model.named_parameters()]
    state = run.optimizer.state_dict()
    return {
        "state": {names[number]: own for number, own in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def test_states_beside_names_go_and_are_renamed_with_them(here: Path, ckpt: Ckpt) -> None:
    run = trained("Adam", ONE, named=False)
    torch.save({"model": run.model.state_dict(), "optimizer": by_name(run)}, "a.pt")
    assert ckpt("rm", "a.pt", "model.norm").code == 0
    kept = [name for name in SHAPES if not name.startswith("norm")]
    fresh = selected(run, ONE, kept, OPTIMIZERS["Adam"])
    assert same(_optimizer("a.pt"), by_name(fresh))
    assert ckpt("rename", "a.pt", "--sub", "^model.head", "model.top").code == 0
    after = _optimizer("a.pt")
    assert list(after["state"]) == ["enc.w", "enc.b", "top.v", "top.d"]
    assert after["param_groups"][0]["params"] == ["enc.w", "enc.b", "top.v", "top.d"]
    assert same(list(after["state"].values()), list(by_name(fresh)["state"].values()))


def test_a_tied_parameter_keeps_its_state_under_its_other_name(here: Path, ckpt: Ckpt) -> None:
    shapes = {"a.w": (3, 2), "b.w": (3, 2), "c.w": (3, 2)}
    run = begin(module(shapes, {"c.w": "a.w"}), OPTIMIZERS["Adam"], [["a.w", "b.w"]], named=True)
    run.step(0)
    torch.save(saved(run), "a.pt")
    assert ckpt("rm", "a.pt", "model.c", "-o", "b.pt").code == 0  # its other name stays
    assert same(_optimizer("b.pt"), run.optimizer.state_dict())
    answer = ckpt("rm", "a.pt", "model.a")
    assert (answer.code, "is tied to 'model.c.w'" in answer.err) == (2, True)
    assert ckpt("rm", "a.pt", "model.a", "--optimizer", "trust").code == 0
    assert _optimizer("a.pt")["param_groups"][0]["param_names"] == ["c.w", "b.w"]
    assert same(_optimizer("a.pt")["state"], run.optimizer.state_dict()["state"])


def test_the_report_says_what_went_along(here: Path, ckpt: Ckpt) -> None:
    torch.save(saved(trained("Adam", ONE, named=True)), "a.pt")
    done = ckpt_cli.rm("a.pt", "model.norm", dry_run=True)
    assert done["carried"] == [
        {
            "optimizer": "optimizer", "action": "removed", "parameters": ["norm.g", "norm.c"],
            "how": "named", "hypothesis": None,
        }
    ]  # fmt: skip
    assert done["renamed"] == {}
    assert "carried" not in ckpt_cli.rm("a.pt", "epoch", dry_run=True)
    assert ckpt_cli.keep("a.pt", "model", optimizer="drop", dry_run=True)["carried"][0]["action"] == "dropped"


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], dict[str, str], list[str], list[list[str]], list[str]]:
    """Shapes by name, ties, frozen names, groups, and the names that are kept."""
    sizes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    shapes = {f"m{number % 3}.p{number}": draw(sizes) for number in range(draw(st.integers(2, 7)))}
    names = [name for at in range(3) for name in shapes if name.startswith(f"m{at}.")]  # as a module has them
    shapes = {name: shapes[name] for name in names}
    ties: dict[str, str] = {}
    for at, name in enumerate(names):
        others = [other for other in names[:at] if shapes[other] == shapes[name] and other not in ties]
        if others and draw(st.booleans()):
            ties[name] = draw(st.sampled_from(others))
    own = [name for name in names if name not in ties]
    frozen = draw(st.lists(st.sampled_from(own), unique=True, max_size=2))
    numbers = [draw(st.integers(0, 2)) for _ in own]
    groups = [[name for name, of in zip(own, numbers, strict=True) if of == number] for number in range(3)]
    kept = [name for name in names if name in ties or draw(st.booleans())]
    kept = [name for name in kept if ties.get(name, name) in kept]
    return shapes, ties, frozen, [group for group in groups if group], kept


@settings(max_examples=40, deadline=None)
@given(runs(), st.sampled_from(sorted(OPTIMIZERS)))
def test_any_selection_of_any_run_is_what_torch_makes_of_it(
    drawn: tuple[dict[str, tuple[int, ...]], dict[str, str], list[str], list[list[str]], list[str]], make: str
) -> None:
    shapes, ties, frozen, groups, kept = drawn
    if not kept or len(kept) == len(shapes) or not all(any(name in kept for name in group) for group in groups):
        return  # torch makes no group without parameters that has names
    run = begin(module(shapes, ties, frozen), OPTIMIZERS[make], groups, named=True)
    run.step(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save(saved(run), path)
        ckpt_cli.rm(path, *(f"model.{name}" for name in shapes if name not in kept))
        data = torch.load(path, weights_only=True)
    fresh = selected(run, groups, kept, OPTIMIZERS[make], named=True)
    assert same(data["optimizer"], fresh.optimizer.state_dict())
    new = begin(module({name: shapes[name] for name in kept}, ties, frozen), OPTIMIZERS[make], groups, named=True).load(
        data["model"], data["optimizer"]
    )
    new.step(1)
    fresh.step(1)
    assert same_runs(new, fresh)


def test_older_streams_and_pickled_modules_carry_states_too(here: Path, ckpt: Ckpt) -> None:
    run = trained("Adam", ONE, named=True)
    kept = [name for name in SHAPES if not name.startswith("norm")]
    fresh = selected(run, ONE, kept, OPTIMIZERS["Adam"], named=True)
    torch.save(saved(run), "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": run.model, "optimizer": run.optimizer.state_dict()}, "whole.pt")
    for path in ("old.pt", "whole.pt"):
        assert ckpt("rm", path, "model.norm", "--backup").code == 0
        data = torch.load(path, weights_only=False)
        assert same(data["optimizer"], fresh.optimizer.state_dict())
        assert ckpt("undo", path).code == 0
        assert same(torch.load(path, weights_only=False)["optimizer"], run.optimizer.state_dict())


def test_names_of_a_wrapped_module_stay_those_of_one(here: Path, ckpt: Ckpt) -> None:
    data = saved(trained("Adam", ONE, named=True))
    data["optimizer"]["param_groups"][0]["param_names"] = [f"module.{name}" for name in SHAPES]
    torch.save(data, "a.pt")
    assert ckpt("rename", "a.pt", "model.enc", "model.body").code == 0
    assert _optimizer("a.pt")["param_groups"][0]["param_names"][:3] == [
        "module.body.w",
        "module.body.b",
        "module.norm.g",
    ]


def test_a_name_that_others_begin_with_goes_alone(here: Path, ckpt: Ckpt) -> None:
    model = {"a": torch.ones(2), "a.b": torch.ones(2), "c": torch.ones(2)}
    states = {name: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)} for name in model}
    torch.save({"model": model, "optimizer": {"state": states, "param_groups": [{"params": list(model)}]}}, "a.pt")
    assert ckpt("rm", "a.pt", "model.c").code == 0
    assert ckpt("keep", "a.pt", "model.a.b", "optimizer").code == 0
    after = _optimizer("a.pt")
    assert after["param_groups"] == [{"params": ["a.b"]}]
    assert after["state"].pop("a", {}) == {}  # its container may stay, with nothing in it
    assert same(after["state"], {"a.b": states["a.b"]})
