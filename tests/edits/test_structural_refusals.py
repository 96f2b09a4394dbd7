"""Structural edits that a pickled checkpoint or another container cannot take are refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import quietly
from run_edit import assert_refused, assert_senseless, odd_requests, senseless
from torch import nn
from torch_files import FORMATS, saved


def test_meta_of_a_pickle_names_the_command_that_adds_an_entry(tmp_path: Path, ckpt: Ckpt) -> None:
    path = saved(tmp_path / "a.pt", {"a": 1})
    assert_refused(ckpt, path, f"hint: ckpt set {path} --new KEY=VALUE", "meta", "k=v")


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """Files of formats that take no structural edits."""
    net = nn.Linear(2, 2)
    with quietly():
        torch.jit.trace(net, torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
        torch.export.save(torch.export.export(net, (torch.ones(1, 2),)), tmp_path / "program.pt2")
    arrays = {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    np.savez(tmp_path / "arrays.npz", **arrays)  # type: ignore[arg-type]  # numpy's stubs take the names for options
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({name: torch.from_numpy(of) for name, of in arrays.items()}))
    return sorted(tmp_path.iterdir())


def test_containers_that_take_values_only_name_the_command_that_converts(others: list[Path], ckpt: Ckpt) -> None:
    assert len(others) == 4
    for path in others:
        for command, *rest in (
            ("rename", "weight", "w"), ("rename", "--add", "x"), ("rm", "bias"), ("keep", "bias"), ("cast", "float16"),
            ("set", "e=1", "--new"),
        ):  # fmt: skip
            assert_refused(ckpt, path, f"hint: ckpt convert {path} OUT.pt", command, *rest)
            assert "only the elements of tensors can be changed" in ckpt(command, path, *rest).err
        assert_refused(ckpt, path, "no metadata of strings", "meta", "a=b")


# --- what is refused -------------------------------------------------------------------------------------------------


@senseless
def test_what_makes_no_sense_is_refused_in_one_line(here: Path, ckpt: Ckpt, arguments: tuple[str, ...]) -> None:
    assert_senseless(ckpt, saved(here / "a.pt", odd_requests()), arguments)


STRANGE: dict[tuple[str, ...], str] = {
    ("rename", "model.w", "w"): "would leave what it is kept in ('model')",
    ("rm", "pair.0"): "called by its place in a list",
    ("rename", "pair.0", "pair.x"): "called by its place in a list",
    ("rm", "sparse.values"): "a part of a tensor",
    ("untie", "sparse"): "made of others",
    ("cast", "half", "epoch"): "not a tensor",
    ("cast", "half", "steps"): "not floating",
    ("tie", "model.w", "epoch"): "names 0 tensors",
    ("meta", "k=v"): "has no metadata of strings",
}


@FORMATS
@pytest.mark.parametrize("arguments", STRANGE, ids=" ".join)
def test_what_a_pickle_cannot_say_is_refused_in_one_line(
    tmp_path: Path, ckpt: Ckpt, arguments: tuple[str, ...], is_zip: bool
) -> None:
    value = {
        "model": {"w": torch.ones(2), "v": torch.ones(2)}, "epoch": 3, "pair": (torch.ones(1), torch.zeros(1)),
        "sparse": torch.eye(2).to_sparse(), "steps": torch.tensor(1),
    }  # fmt: skip
    command, *rest = arguments
    assert_refused(ckpt, saved(tmp_path / "a.pt", value, is_zip=is_zip), STRANGE[arguments], command, *rest)


@pytest.fixture
def lightning(here: Path) -> Path:
    """A state_dict whose keys have dots, in a training checkpoint."""
    tensors = {f"model.{number}.{kind}": torch.ones(2) for number in (0, 2) for kind in ("weight", "bias")}
    return saved(here / "l.ckpt", {"state_dict": tensors, "epoch": 1})


def test_a_root_within_the_keys_of_a_container_is_reached_by_the_two_commands_that_are_named(
    lightning: Path, ckpt: Ckpt
) -> None:
    answer = ckpt("keep", lightning, "--root", "state_dict.model.0", "-o", "no.pt")
    assert answer.code == 2
    problem, hint = answer.err.splitlines()
    assert problem.endswith(
        "'state_dict.model.0' is not a container of its own: 'state_dict' has keys that begin with 'model.0.'"
    )
    assert hint == f"hint: ckpt keep {lightning} --root state_dict -o OUT, then ckpt keep OUT --root model.0"
    assert ckpt("keep", lightning, "--root", "state_dict", "-o", "OUT").code == 0
    assert ckpt("keep", "OUT", "--root", "model.0").code == 0
    assert torch.load("OUT").keys() == {"weight", "bias"}


def test_a_root_that_is_no_prefix_is_told_apart_from_one_that_is_not_there(lightning: Path, ckpt: Ckpt) -> None:
    name = "state_dict.model.0.weight"
    assert_refused(ckpt, lightning, f"{name!r} is an entry itself", "keep", "--root", name)
    assert_refused(ckpt, lightning, "did you mean state_dict.model?", "keep", "--root", "model")
    assert_refused(ckpt, lightning, "did you mean state_dict.model.0?", "keep", "--root", "model.0")
