"""What Tab offers: commands, and the names in a file, by the answers that a shell asks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Ckpt


def completed(shell: Ckpt, line: str, kind: str) -> list[str]:
    """What pressing Tab at the end of a command line offers."""
    if kind == "bash":
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    else:
        words = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = shell(_CKPT_COMPLETE=f"complete_{kind}", **words)
    assert answer.err == ""
    if kind == "zsh":
        return re.findall(r'"([^"]*)"(?::"[^"]*")?(?=[\n)])', answer.out)
    return [line.split("\t")[0] for line in answer.out.splitlines() if line]


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_tab_completes_commands_and_the_names_in_the_file(work: Path, shell: Ckpt, kind: str) -> None:
    assert completed(shell, "ckpt s", kind) == ["show", "stats", "series", "scan", "set"]
    assert completed(shell, "ckpt show mlp.pt 2.", kind) == ["2.weight", "2.bias"]
    assert completed(shell, "ckpt ties mlp.pt 0.bias 2.b", kind) == ["2.bias"]
    assert "epoch" in completed(shell, "ckpt ls train.pt e", kind)
    assert completed(shell, "ckpt set train.pt model.0.b", kind) == ["model.0.bias="]
    assert completed(shell, "ckpt set train.pt epo", kind) == []
    assert completed(shell, "ckpt tree train.pt model", kind) == ["model", "model.0", "model.2"]


@pytest.mark.parametrize("file", ["none.pt", "demo.txt", "."])
def test_tab_on_what_is_no_checkpoint_offers_nothing_and_says_nothing(work: Path, shell: Ckpt, file: str) -> None:
    Path("demo.txt").write_text("hello")
    assert completed(shell, f"ckpt show {file} ", "bash") == []


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_tab_never_hands_a_shell_a_name_that_it_would_act_on(work: Path, shell: Ckpt, kind: str) -> None:
    hostile = [r"\$(reboot)", "$(reboot)", "`reboot`", "a;b", "a'b", 'a"b', "a b", "a\nb", "\x1b[2J", "a|b", "~", "a:b"]
    torch.save({name: torch.zeros(1) for name in ["plain.weight", "ünï", *hostile]}, "a.pt")
    assert completed(shell, "ckpt show a.pt ", kind) == ["plain.weight", "ünï"]


def test_tab_neither_finishes_an_edit_nor_waits_for_it(work: Path, shell: Ckpt) -> None:
    Path(".mlp.pt.ckpt-journal").write_text("an edit that was interrupted")
    assert completed(shell, "ckpt show mlp.pt ", "bash") == []
    assert Path(".mlp.pt.ckpt-journal").exists()


def test_tab_knows_the_home_folder(work: Path, shell: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    assert completed(shell, "ckpt show ~/mlp.pt 2.b", "zsh") == ["2.bias"]
