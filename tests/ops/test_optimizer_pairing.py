"""The parameters that an optimizer's states belong to: what proves it, what only fits, and what says nothing."""

from __future__ import annotations

import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from training_runs import OPTIMIZERS, begin, module, saved

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.ops.optimizer_pairing import Pairing, pairings_of

SHAPES = {"enc.w": (4, 3), "enc.b": (4,), "norm.g": (4,), "norm.c": (4,), "head.v": (3, 4), "head.d": (3,)}
DECAY = [["enc.w", "head.v"], ["enc.b", "norm.g", "norm.c", "head.d"]]
ONE = [list(SHAPES)]


def pairing_of(path: str | Path, model: str | None = None) -> Pairing:
    with closing(open_checkpoint(str(path))) as checkpoint:
        if model is None:
            (found,) = pairings_of(checkpoint)
            return found
        with closing(open_checkpoint(model)) as other:
            (found,) = pairings_of(checkpoint, other)
            return found


def names(pairing: Pairing) -> list[str | None]:
    return [tensor and pairing.name_of(tensor) for _, tensor in pairing.pairs]


def data(make: str, groups: list[list[str]], *, named: bool = False, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    run = begin(module(SHAPES, frozen=frozen), OPTIMIZERS[make], groups, named=named)
    run.step(0)
    return saved(run)


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("groups", [ONE, DECAY, [DECAY[1], DECAY[0]]])
def test_names_in_the_file_are_a_proof(make: str, groups: list[list[str]], here: Path) -> None:
    torch.save(data(make, groups, named=True), "a.pt")
    found = pairing_of("a.pt")
    assert (found.how, found.hypothesis) == ("named", None)
    assert names(found) == sum(groups, start=list[str]())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_one_group_without_names_goes_by_the_order_of_the_module(make: str, here: Path) -> None:
    torch.save(data(make, ONE, frozen=("norm.c", "head.d")), "a.pt")
    found = pairing_of("a.pt")
    assert (found.how, found.hypothesis) == ("order", "module order")
    assert names(found) == ONE[0]


@pytest.mark.parametrize("make", sorted(OPTIMIZERS.keys() - {"plain SGD"}))
@pytest.mark.parametrize("groups", [DECAY, [DECAY[1], DECAY[0]]])
def test_groups_of_matrices_and_vectors_go_by_that_order(make: str, groups: list[list[str]], here: Path) -> None:
    torch.save(data(make, groups), "a.pt")
    found = pairing_of("a.pt")
    assert (found.how, found.hypothesis) == ("order", "decay first")
    assert names(found) == sum(groups, start=list[str]())


def test_several_groups_that_show_no_shapes_are_not_paired(here: Path) -> None:
    torch.save(data("plain SGD", DECAY), "a.pt")
    found = pairing_of("a.pt")
    assert (found.how, set(names(found))) == (None, {None})
    assert "nothing shows the shapes" in found.reason


def test_frozen_parameters_that_no_group_has_are_left_out_where_one_choice_fits(here: Path) -> None:
    shapes = {"a.w": (2, 3), "b.w": (5, 2), "c.w": (2, 3), "d.w": (5, 2)}
    for kept, how in ((["b.w", "c.w", "d.w"], "order"), (["a.w", "b.w"], None)):
        run = begin(module(shapes), OPTIMIZERS["Adam"], [kept])
        run.step(0)
        torch.save(saved(run), "a.pt")
        found = pairing_of("a.pt")
        assert found.how == how
        if how:
            assert found.hypothesis == "module order, trainable only"
            assert names(found) == kept
            assert [tensor.name for tensor in found.left] == ["model.a.w"]


def test_shapes_prove_it_where_one_assignment_fits(here: Path) -> None:
    shapes = {"a.w": (2, 3), "a.b": (2,), "b.w": (5, 2), "b.b": (5,)}
    order = ["b.b", "a.w", "b.w", "a.b"]
    for make in sorted(OPTIMIZERS.keys() - {"plain SGD"}):
        run = begin(module(shapes), OPTIMIZERS[make], [order])
        run.step(0)
        torch.save(saved(run), "a.pt")
        assert (pairing_of("a.pt").how, names(pairing_of("a.pt"))) == ("unique", order)


def test_sorted_names_of_safetensors_are_no_order(here: Path) -> None:
    state = data("Adam", ONE)
    torch.save(state["optimizer"], "optimizer.pt")
    save_file(state["model"], "model.safetensors")
    torch.save(state["model"], "model.bin")
    assert pairing_of("optimizer.pt").reason == "there is no model beside it"
    assert pairing_of("optimizer.pt", "model.bin").hypothesis == "module order"
    sorted_names = pairing_of("optimizer.pt", "model.safetensors")
    assert sorted_names.how is None
    assert "order of the module" in sorted_names.reason


def test_buffers_and_counters_are_no_parameters(here: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    adam.step()
    torch.save({"model": net.state_dict(), "optimizer": adam.state_dict()}, "a.pt")
    torch.save({"model": net, "optimizer": adam.state_dict()}, "whole.pt")
    for path in ("a.pt", "whole.pt"):
        assert names(pairing_of(path)) == [name for name, _ in net.named_parameters()]
        assert pairing_of(path).left == []


def test_tied_parameters_count_once(here: Path) -> None:
    shapes = {"a.w": (3, 2), "b.w": (3, 2), "c.w": (3, 2)}
    run = begin(module(shapes, {"c.w": "a.w"}), OPTIMIZERS["Adam"], [["a.w", "b.w"]])
    run.step(0)
    torch.save(saved(run), "a.pt")
    found = pairing_of("a.pt")
    assert (found.how, names(found), found.left) == ("order", ["a.w", "b.w"], [])


def test_names_of_wrapped_modules_are_those_of_the_module(here: Path) -> None:
    state = data("Adam", ONE, named=True)
    group = state["optimizer"]["param_groups"][0]
    for prefix in ("module.", "_orig_mod."):
        group["param_names"] = [prefix + name for name in SHAPES]
        torch.save(state, "a.pt")
        assert (pairing_of("a.pt").how, names(pairing_of("a.pt"))) == ("named", list(SHAPES))


def test_each_optimizer_of_several_models_has_its_own(here: Path) -> None:
    runs = {}
    for key, shapes in (("netG", SHAPES), ("netD", {"x.w": (2, 2), "y.w": (2, 2)})):
        runs[key] = begin(module(shapes), OPTIMIZERS["Adam"], [list(shapes)])
        runs[key].step(0)
    state = {key: run.model.state_dict() for key, run in runs.items()}
    state |= {f"optim_{key}": run.optimizer.state_dict() for key, run in runs.items()}
    torch.save(state, "a.pt")
    with closing(open_checkpoint("a.pt")) as checkpoint:
        found = pairings_of(checkpoint)
    assert [(each.scope.prefix, names(each)) for each in found] == [("netG", list(SHAPES)), ("netD", ["x.w", "y.w"])]
    assert found[1].hypothesis == "module order of netD"


def test_the_listing_says_what_stands_where(here: Path, ckpt: Ckpt) -> None:
    run = begin(module(SHAPES, frozen=("norm.c",)), OPTIMIZERS["Adam"], DECAY, named=True)
    for seed in range(3):
        run.step(seed)
    torch.save(saved(run), "a.pt")
    listing = json.loads(ckpt("ls", "--optimizer", "--json", "a.pt").out)
    state = run.optimizer.state_dict()
    for entry in listing["entries"]:
        group = next(group for group in state["param_groups"] if entry["name"] in group["param_names"])
        number = group["params"][group["param_names"].index(entry["name"])]
        assert entry["parameter"] == f"model.{entry['name']}"
        assert state["param_groups"][entry["group"]] is group
        assert (entry["lr"], entry["weight_decay"]) == (group["lr"], group["weight_decay"])
        assert entry["state"] == {key: f"optimizer.state.{number}.{key}" for key in state["state"].get(number, {})}
        assert entry["step"] == (None if entry["name"] == "norm.c" else 3)
    assert [entry["name"] for entry in listing["entries"]] == list(SHAPES)
    assert (listing["unmatched_parameters"], listing["unmatched_states"]) == ([], [])


def test_diff_and_series_compare_states_by_parameter(here: Path, ckpt: Ckpt) -> None:
    torch.save(data("Adam", ONE, named=True), "a.pt")
    assert ckpt("rm", "a.pt", "model.enc.w", "-o", "b.pt").code == 0
    found = json.loads(ckpt("diff", "a.pt", "b.pt", "--json").out)
    assert found["changed"] == []
    assert found["only_b"] == []
    states = [f"optimizer.state.enc.w.{key}" for key in ("step", "exp_avg", "exp_avg_sq")]
    assert found["only_a"] == ["model.enc.w", *states]
    assert ckpt("diff", "a.pt", "a.pt").code == 0
    run = json.loads(ckpt("series", "a.pt", "b.pt", "optimizer", "--json").out)
    assert [event["what"] for row in run["tensors"] for event in row["events"]] == ["is gone"] * 3
    assert {point["change"] for point in run["points"] if point["path"] == "b.pt"} == {0}


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], list[str], list[list[str]]]:
    """Shapes by name, frozen names, and groups in any order."""
    sizes = st.lists(st.integers(1, 4), max_size=2).map(tuple)
    shapes = {f"m{number // 2}.p{number}": draw(sizes) for number in range(draw(st.integers(1, 7)))}
    names = list(shapes)
    frozen = draw(st.lists(st.sampled_from(names), unique=True, max_size=2))
    given_to_it = draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    cut = draw(st.integers(0, len(given_to_it)))
    return shapes, frozen, [group for group in (given_to_it[:cut], given_to_it[cut:]) if group]


@settings(max_examples=60, deadline=None)
@given(runs(), st.sampled_from(["Adam", "SGD momentum", "Adafactor"]))
def test_what_is_called_a_proof_is_one(
    drawn: tuple[dict[str, tuple[int, ...]], list[str], list[list[str]]], make: str
) -> None:
    shapes, frozen, groups = drawn
    run = begin(module(shapes, frozen=frozen), OPTIMIZERS[make], groups)
    run.step(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(saved(run), f"{folder}/a.pt")
        found = pairing_of(f"{folder}/a.pt")
    order = sum(groups, start=list[str]())
    if found.how == "unique":
        assert names(found) == order
    in_module_order = len(groups) == 1 and order == list(shapes)
    assert found.how is not None or not in_module_order
    if in_module_order:
        assert names(found) == order
