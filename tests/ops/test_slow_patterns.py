"""Regular expressions that would take forever end in one line."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from conftest import Ckpt

from ckpt_cli import limits
from ckpt_cli.errors import UsageError
from ckpt_cli.ops.rename_rules import by_expression, by_map

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


def test_a_timer_is_set_only_where_an_expression_or_a_name_could_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda _, seconds: timers.append(seconds))
    for expression in (r"^a\.", "(.*)", "[0-9]+", r"(\w+)\."):
        by_expression(expression, "b.")("a.w" * 80)
    assert timers == []
    for expression, name in (("(a+)+$", "a"), (r"(a+)\1", "a"), ("a*b*", "a"), ("(a*)", "a" * 300)):
        by_expression(expression, "")(name)
        assert timers, expression
        timers.clear()


def test_a_map_of_short_names_is_not_looked_up_at_every_dot_of_a_long_one() -> None:
    class Counted(dict[str, str]):
        asked = 0

        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]  # as dict has it
            self.asked += 1
            return super().get(key, default)  # type: ignore[arg-type]

    names = Counted({"a.a": "b"})
    assert by_map(names)("a." * 10_000 + "c") == "b" + ".a" * 9_998 + ".c"
    assert names.asked <= 3
