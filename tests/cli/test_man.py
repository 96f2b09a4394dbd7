"""The manual pages say what the help says, and `groff` takes them without a word."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Ckpt

from ckpt_cli.cli.app import COMMAND_LINES, COMMANDS
from ckpt_cli.cli.man import main, pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man") / "man1"
    assert main([str(folder)]) == 0
    return folder


def test_there_is_a_page_for_each_command_and_one_for_all(folder: Path) -> None:
    names = {line.replace(" ", "-") for line in (*COMMANDS, *COMMAND_LINES)}
    assert {path.name for path in folder.iterdir()} == {"ckpt.1", *(f"ckpt-{name}.1" for name in names)}
    whole = (folder / "ckpt.1").read_text()
    assert [name for name in COMMANDS if f"ckpt\\-{name}(1)" not in whole] == []


@pytest.mark.parametrize("command", sorted({*COMMANDS, *COMMAND_LINES}))
def test_a_page_has_the_words_of_the_help(folder: Path, ckpt: Ckpt, command: str) -> None:
    source = (folder / f"ckpt-{command.replace(' ', '-')}.1").read_text()
    words = " ".join(re.sub(r"^\.\w\w?( |$)", "", line) for line in source.splitlines()).replace("\\&", "")
    words = " ".join(words.replace("\\-", "-").replace("\\e", "\\").split())
    shown = ckpt(*command.split(), "--help").out
    for paragraph in re.split(
        r"\n\s*\n", shown.partition("Options:")[0].partition("\n\n")[2].partition("Arguments:")[0]
    ):
        assert " ".join(paragraph.split()) in words
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE)
    assert options
    assert [option for option in options if option not in words] == []


def test_lines_of_a_page_are_no_requests_by_mistake() -> None:
    for name, source in pages():
        requests = {line.split(" ")[0] for line in source.splitlines() if line.startswith((".", "'"))}
        assert requests <= {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".nf", ".fi"}, name


def test_groff_takes_the_pages(folder: Path) -> None:
    groff = shutil.which("groff")
    if groff is None:
        sys.stderr.write("groff is not there: the manual pages were not formatted\n")
        return
    for path in sorted(folder.iterdir()):
        done = subprocess.run([groff, "-man", "-ww", "-Tutf8", path], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert "DESCRIPTION" in re.sub(".\b", "", done.stdout)  # bold is struck twice


def test_without_one_folder_the_usage_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["a", "b"]) == main(["--help"]) == 2
    assert "usage: python -m ckpt_cli.cli.man FOLDER" in capsys.readouterr().err
