"""`ckpt match` as a command, and `ckpt rename --like`, which carries out what it finds."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from torch import nn

State = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def save(state: object, path: str) -> None:
    torch.save(state, path)


def test_a_strict_load_that_works_is_exit_0_and_prints_nothing_when_piped(here: Path, ckpt: Ckpt) -> None:
    save(network().state_dict(), "a.pt")
    save(network(), "whole.pt")
    assert ckpt("match", "a.pt", "whole.pt") == ckpt("match", "a.pt", "a.pt")
    assert (ckpt("match", "a.pt", "whole.pt").code, ckpt("match", "a.pt", "whole.pt").out) == (0, "")


def test_the_command_that_match_prints_works_when_it_is_pasted(here: Path, ckpt: Ckpt) -> None:
    name = "a 'b' $c.pt"
    save({"epoch": 3, "state_dict": prefixed("it's.", network().state_dict()), "optimizer": {"x": torch.ones(1)}}, name)
    save(network().state_dict(), "b.pt")
    row = ckpt("match", name, "b.pt").out.splitlines()[-1].split("\t")
    assert row[0] == "rename"
    assert ckpt(*shlex.split(row[1])[1:]).code == 0
    assert ckpt("match", name, "b.pt").code == 0
    network().load_state_dict(torch.load(name, weights_only=True)["state_dict"])


def test_what_ls_printed_stands_for_the_model(here: Path, ckpt: Ckpt) -> None:
    save(network().state_dict(), "b.pt")
    save(prefixed("module.", network().state_dict()), "a.pt")
    Path("b.json").write_text(ckpt("ls", "b.pt", "--json").out)
    of_file, of_listing = (json.loads(ckpt("match", "a.pt", b, "--json").out) for b in ("b.pt", "b.json"))
    assert of_listing == {**of_file, "b": "b.json"}


def test_like_takes_the_names_of_the_model_and_the_versions_follow(here: Path, ckpt: Ckpt) -> None:
    wrapped = nn.ModuleDict({"module": network()})
    save(wrapped.state_dict(), "a.pt")
    save(network().state_dict(), "b.pt")
    assert ckpt("rename", "a.pt", "--like", "b.pt").code == 0
    state = torch.load("a.pt", weights_only=True)
    assert list(state) == list(network().state_dict())
    assert state._metadata["1"] == {"version": 2}


def test_like_says_what_is_still_missing_unexpected_or_of_another_size(here: Path, ckpt: Ckpt) -> None:
    state = network().state_dict()
    save(prefixed("module.", state), "a.pt")
    save(state, "b.pt")
    done = ckpt("rename", "a.pt", "--like", "b.pt", "-n")
    assert "  a strict load in place of b.pt then works\n" in done.err
    save({**prefixed("module.", state), "module.extra": torch.ones(1)}, "c.pt")
    save({**state, "head": torch.ones(7), "0.bias": torch.ones(9)}, "d.pt")
    done = ckpt("rename", "c.pt", "--like", "d.pt", "-n")
    assert done.code == 0
    fit = json.loads(ckpt("rename", "c.pt", "--like", "d.pt", "-o", "e.pt", "--json").out)["fit"]
    reported = json.loads(ckpt("match", "e.pt", "d.pt", "--json").out)
    assert [fit[key] for key in ("model", "loads", "missing", "unexpected")] == [
        "d.pt", False, reported["missing"], reported["unexpected"]]  # fmt: skip
    assert fit["sizes"] == [size["name"] for size in reported["sizes"]]
    assert "  a strict load in place of d.pt does not work yet:\n" in done.err
    for what in ("missing", "unexpected"):
        assert f"  {len(fit[what])} {what}: " in done.err
    assert "fit" not in json.loads(ckpt("rename", "b.pt", "--add", "x", "--json").out)


def test_of_two_equally_good_renamings_neither_is_carried_out(here: Path, ckpt: Ckpt) -> None:
    state = network().state_dict()
    save({**prefixed("student.", state), **prefixed("teacher.", state)}, "a.pt")
    save(state, "b.pt")
    before = Path("a.pt").read_bytes()
    found = json.loads(ckpt("match", "a.pt", "b.pt", "--json").out)["cures"]
    assert [cure["command"] for cure in found] == [f"ckpt rename a.pt --strip {who}" for who in ("student", "teacher")]
    refused = ckpt("rename", "a.pt", "--like", "b.pt", "--guess")
    assert refused.code == 2
    assert all(cure["command"] in refused.err for cure in found)
    assert Path("a.pt").read_bytes() == before


def test_a_guess_is_carried_out_only_when_it_is_asked_for(here: Path, ckpt: Ckpt) -> None:
    save({"wq.weight": torch.ones(2, 2), "wk.weight": torch.zeros(2, 2)}, "a.pt")
    save({"query.weight": torch.ones(2, 2), "key.weight": torch.zeros(2, 2)}, "b.pt")
    assert ckpt("match", "a.pt", "b.pt").out.splitlines()[-1].startswith("guess\t")
    refused = ckpt("rename", "a.pt", "--like", "b.pt")
    assert (refused.code, "--guess" in refused.err) == (2, True)
    assert ckpt("rename", "a.pt", "--like", "b.pt", "--guess").code == 0
    assert ckpt("diff", "a.pt", "b.pt").code == 0


def test_names_that_fit_already_and_names_that_nothing_mends_are_refused(here: Path, ckpt: Ckpt) -> None:
    save({"a": torch.ones(2)}, "a.pt")
    save({"b": torch.ones(3)}, "b.pt")
    assert [ckpt("rename", "a.pt", "--like", other).code for other in ("a.pt", "b.pt")] == [2, 2]
    assert ckpt("match", "a.pt", "b.pt").code == 1


@pytest.mark.parametrize(
    "words", [("a.pt", "--guess"), ("a.pt", "--like", "b.pt", "--strip", "x"), ("a.pt", "x", "y", "--of", "z")]
)
def test_options_that_do_not_go_together_are_refused(here: Path, ckpt: Ckpt, words: tuple[str, ...]) -> None:
    save({"a": torch.ones(2)}, "a.pt")
    save({"b": torch.ones(2)}, "b.pt")
    assert ckpt("rename", *words).code == 2


def test_a_part_that_is_not_there_and_a_broken_listing_are_trouble(here: Path, ckpt: Ckpt) -> None:
    save({"a": torch.ones(2)}, "a.pt")
    Path("b.json").write_text('{"entries": [{"name": 3}]}')
    for words in (("a.pt", "a.pt", "--of", "nowhere"), ("a.pt", "a.pt", "--other-of", "x"), ("a.pt", "b.json")):
        answer = ckpt("match", *words)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith("ckpt: ")


def test_aliases_of_safetensors_are_names_of_the_model(here: Path, ckpt: Ckpt) -> None:
    weight = torch.ones(2, 2)
    save({"embed.weight": weight, "head.weight": weight}, "tied.pt")
    assert ckpt("convert", "tied.pt", "b.safetensors").code == 0
    assert ckpt("match", "tied.pt", "b.safetensors").code == 0
    assert ckpt("match", "b.safetensors", "tied.pt").out.startswith("missing\t")
