"""Regular expressions that would take forever end in one line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from conftest import Ckpt

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.ops.rename_rules import by_expression

SLOW = ["(a+)+$", "(a|a)*b", "(.*)*x{9}", r"(\w+\s?)+!$"]
NAME = "a" * 60 + "?"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MATCH_SECONDS", 0.05)


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("command", [("rename",), ("rename", "-n")], ids=" ".join)
def test_a_pattern_that_backtracks_ends_in_one_line_and_changes_nothing(
    here: Path, ckpt: Ckpt, pattern: str, command: tuple[str, ...]
) -> None:
    torch.save({NAME: torch.ones(1), "b": torch.ones(1)}, here / "m.pt")
    before = (here / "m.pt").read_bytes()
    name, *options = command
    answer = ckpt(name, "m.pt", "--sub", pattern, "x", *options)
    assert answer.code == 2
    assert answer.err.startswith(f"ckpt: m.pt: {pattern!r} takes too long to match the names")
    assert (here / "m.pt").read_bytes() == before


def test_a_pattern_that_backtracks_ends_a_comparison_in_one_line(here: Path, ckpt: Ckpt) -> None:
    torch.save({NAME: torch.ones(1)}, here / "m.pt")
    answer = ckpt("diff", "m.pt", "m.pt", "--sub", "(a+)+$", "x")
    assert answer.code == 2
    assert "takes too long" in answer.err


def test_the_time_counts_for_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MATCH_SECONDS", 0.2)
    rename = by_expression("(a+)+$", "x")
    with pytest.raises(UsageError, match="takes too long"):
        list(map(rename, ["a" * 14 + "?"] * 100_000))


def test_the_timer_of_a_pattern_is_gone_when_it_is_done() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    assert by_expression(r"^a\.", "b.")("a.w") == "b.w"
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) is before
