"""Checkpoints in a git repository: `git diff` by textconv as docs/recipes.md has it, and the hooks for pre-commit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.pickles import call, pickled
from builders.pt import write
from conftest import Ckpt

from ckpt_cli.cli.each_file import run_each

ROOT = Path(__file__).parent.parent.parent
HOOKS = (ROOT / ".pre-commit-hooks.yaml").read_text()


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], check=True, capture_output=True, text=True).stdout


def _textconv() -> str:
    """The command of the recipe, with this Python's ckpt."""
    found = re.search(r"git config diff\.ckpt\.textconv '(f\(\) .*?; f)'", (ROOT / "docs" / "recipes.md").read_text())
    assert found is not None
    return found[1].replace("ckpt ", f"{sys.executable} -m ckpt_cli ")


def test_git_diff_shows_the_entries_and_statistics_that_changed(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.zeros(2), "b": torch.ones(3), "epoch": 1}, here / "m.pt")
    _git("init", "-q", ".")
    _git("add", "m.pt")
    (here / ".gitattributes").write_text("*.pt diff=ckpt\n")
    assert _git("diff") == ""
    assert ckpt("set", "m.pt", "w[0]=9", "epoch=2").code == 0
    assert "Binary files" in _git("diff", "--no-textconv")
    _git("config", "diff.ckpt.textconv", _textconv())
    changed = [line for line in _git("diff", "-U0").splitlines() if re.match(r"[-+]\w", line)]
    assert sorted(line.split("\t")[0] for line in changed) == ["+epoch", "+w", "-epoch", "-w"]


def _patterns() -> dict[str, re.Pattern[str]]:
    """The pattern of file names of each hook."""
    found = re.findall(r"- id: (\S+)\n(?:  (?!files).*\n)*  files: '(.*)'\n", HOOKS)
    return {name: re.compile(pattern) for name, pattern in found}


def test_the_hooks_take_checkpoints_and_nothing_else() -> None:
    patterns = _patterns()
    assert set(patterns) == {"ckpt-scan", "ckpt-check"}
    for pattern in patterns.values():
        for name in (
            "m.pt",
            "a/m.pth",
            "m.ckpt",
            "m.safetensors",
            "x.npz",
            "p.pt2",
            "pytorch_model-00001-of-00002.bin",
        ):
            assert pattern.search(name), name
        for name in ("m.py", "pt", "README.md", "firmware.bin", "a.pt.json", "model.bin.txt"):
            assert not pattern.search(name), name


@pytest.mark.parametrize("command", ["scan", "check"])
def test_a_hook_runs_its_command_for_each_file(here: Path, command: str) -> None:
    assert f"entry: python -m ckpt_cli.cli.each_file {command}\n" in HOOKS
    torch.save({"w": torch.zeros(2)}, here / "a.pt")
    torch.save({"w": torch.ones(2)}, here / "-b.pt")
    assert run_each([command, "a.pt", "--", "-b.pt"]) == 0
    (here / "c.pt").write_bytes((here / "a.pt").read_bytes()[:-30])
    assert run_each([command, "c.pt", "a.pt"]) != 0
    assert run_each([command]) == 0


def test_options_come_before_the_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "m.pt", pickled({"w": call("os.system", "x"), "n": call("lab.Net")}))
    assert run_each(["scan", "--json", "--allow", "lab.*", "--allow=os.system", "m.pt"]) == 0
    assert json.loads(capsys.readouterr().out)["allowed"] == 2
