"""Reports of edits of many names: containers and numbered names with counts and bytes, all names with `-v`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt


@pytest.fixture
def train(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(5)])
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "train.pt")
    return tmp_path / "train.pt"


def test_a_container_that_goes_as_a_whole_is_one_name_with_counts_and_bytes(train: Path, ckpt: Ckpt) -> None:
    state = torch.load(train)["optimizer_states"][0]["state"].values()
    sizes = [value.nbytes for each in state for value in each.values()]
    done = ckpt("rm", train, "optimizer_states")
    assert done.err.splitlines()[0].endswith(
        f"removed optimizer_states ({len(sizes)} tensors, {sum(sizes) / 1000:.1f} kB)"
    )


def test_numbered_names_are_folded_where_the_container_stays(train: Path, ckpt: Ckpt) -> None:
    done = ckpt("rm", train, "optimizer_states.0.state.*.exp_avg", "-n")
    assert "would remove optimizer_states.[N].state.[N].exp_avg (10 tensors, 5.4 kB)" in done.err


def test_verbose_spells_every_name_and_json_has_them_all(train: Path, ckpt: Ckpt) -> None:
    names = [entry["name"] for entry in json.loads(ckpt("ls", train, "model", "--json").out)["entries"]]
    verbose = ckpt("cast", train, "bfloat16", "model", "-n", "-v").err
    assert all(name in verbose for name in names)
    assert "(10 tensors" in ckpt("cast", train, "bfloat16", "model", "-n").err
    report = json.loads(ckpt("cast", train, "bfloat16", "model", "-n", "--json").out)
    assert report["changed"] == names
    assert "folded" not in report


def test_verbose_spells_every_pair_of_a_rename(train: Path, ckpt: Ckpt) -> None:
    assert "and 2 more" in ckpt("rename", train, "model", "net", "-n").err
    verbose = ckpt("rename", train, "model", "net", "-n", "-v").err
    assert "and 2 more" not in verbose
    assert "model.4.bias to net.4.bias" in verbose


def test_few_names_are_spelled_as_ever(train: Path, ckpt: Ckpt) -> None:
    done = ckpt("rm", train, "model.0", "-n", "--optimizer", "leave")  # whose states go is not known
    assert "would remove model.0.weight, model.0.bias\n" in done.err
