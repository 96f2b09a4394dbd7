"""Habits of other programs: short forms, commands by other names, and hints where a habit does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt

from ckpt_cli.cli.app import COMMAND_LINES, COMMANDS, GROUPS
from ckpt_cli.cli.misspelt import _WORDS


def test_capital_v_is_the_version(ckpt: Ckpt) -> None:
    assert ckpt("-V").out == ckpt("--version").out != ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_its_own_help(ckpt: Ckpt, command: str) -> None:
    assert ckpt("help", command).out == ckpt(command, "--help").out != ""


def test_help_alone_is_the_first_help(ckpt: Ckpt) -> None:
    assert ckpt("help").out == ckpt("--help").out == ckpt().out
    assert ckpt("help", "none").code == 2


def test_the_first_help_has_the_commands_in_groups(ckpt: Ckpt) -> None:
    lines = ckpt("--help").lines
    assert [line[:-1] for line in lines if line[:-1] in GROUPS] == list(GROUPS)


def test_a_file_alone_is_summarized(work: Path, ckpt: Ckpt) -> None:
    assert ckpt("mlp.pt").out == ckpt("info", "mlp.pt").out != ""
    assert ckpt("mlp.pt", "tied.pt", "--json").out == ckpt("info", "mlp.pt", "tied.pt", "--json").out
    assert ckpt("none.pt").err == ckpt("info", "none.pt").err != ""


@pytest.mark.parametrize(("word", "command"), [("prune", "rm"), ("delete", "rm"), ("compare", "diff"), ("shw", "show")])
def test_a_word_that_means_a_command_suggests_it(ckpt: Ckpt, word: str, command: str) -> None:
    answer = ckpt(word, "model.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"ckpt: No such command {word!r}. Did you mean {command!r}?\nhint: ckpt {command} --help\n"


def test_no_word_means_two_commands_or_is_one() -> None:
    words = [word for each in _WORDS.values() for word in each.split()]
    assert len(words) == len(set(words))
    assert not set(words) & set(COMMANDS)
    assert set(_WORDS) <= set(COMMANDS)


def test_n_is_no_option_of_diff_and_the_hint_says_what_is(work: Path, ckpt: Ckpt) -> None:
    answer = ckpt("diff", "mlp.pt", "tied.pt", "-n", "2")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("ckpt: No such option: -n\nhint: --first N ")


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_n_is_a_dry_run_or_nothing(ckpt: Ckpt, command: str) -> None:
    rows = [line for line in ckpt(*command.split(), "--help").lines if line.startswith("  -n")]
    assert all(row.startswith("  -n, --dry-run ") for row in rows)


def test_a_name_with_a_leading_dash_gets_a_hint_that_works(here: Path, ckpt: Ckpt) -> None:
    torch.save({"-w.x": torch.ones(1), "y": torch.ones(1)}, "m.pt")
    answer = ckpt("show", "m.pt", "y", "-w.x")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.splitlines()[1].startswith("hint: ckpt show m.pt y -- -w.x, if it is a name;")
    assert ckpt("show", "m.pt", "y", "--", "-w.x").code == 0


def test_the_help_of_set_explains_quotes(ckpt: Ckpt) -> None:
    words = " ".join(ckpt("set", "--help").out.split())
    assert 'zsh refuses 2.weight[0,0]=1 without quotes ("no matches found")' in words
