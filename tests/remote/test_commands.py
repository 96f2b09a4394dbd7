"""Commands on URLs: those that read, edits to another file, what is refused, and what asks no server at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from web_server import WebServer, serving


@pytest.fixture
def web(work: Path) -> Iterator[WebServer]:
    """A server of the samples."""
    with serving(work) as found:
        yield found


def test_a_url_without_a_command_is_summarized(web: WebServer, ckpt: Ckpt) -> None:
    assert ckpt(web.url("mlp.pt")).out == ckpt("info", web.url("mlp.pt")).out != ""


@pytest.mark.parametrize(
    "edit",
    [
        ("set", "FILE", "2.bias[0]=5"),
        ("rename", "FILE", "2.bias", "3.bias"),
        ("rm", "FILE", "2.bias"),
        ("keep", "FILE", "2.bias"),
        ("cast", "FILE", "bfloat16"),
    ],
)
def test_an_edit_writes_a_copy_and_refuses_to_edit_in_place(
    web: WebServer, work: Path, ckpt: Ckpt, edit: tuple[str, ...]
) -> None:
    there = [arg.replace("FILE", web.url("mlp.pt")) for arg in edit]
    refused = ckpt(*there)
    assert (refused.code, refused.err.splitlines()[1]) == (2, "hint: -o OUT writes an edited copy")
    assert refused.err.startswith(f"ckpt: {web.url('mlp.pt')}: ")
    assert ckpt(*there, "-o", "there.pt").code == 0
    assert ckpt(*(arg.replace("FILE", "mlp.pt") for arg in edit), "-o", "here.pt").code == 0
    assert (work / "there.pt").read_bytes() == (work / "here.pt").read_bytes()


@pytest.mark.parametrize("command", ["undo", "index"])
def test_what_works_on_the_disk_only_says_so(web: WebServer, ckpt: Ckpt, command: str) -> None:
    answer = ckpt(command, web.url("mlp.pt"))
    assert (answer.code, "Traceback" in answer.err, "bug" in answer.err) == (2, False, False)


def test_converting_writes_what_it_writes_of_the_file_on_the_disk(web: WebServer, work: Path, ckpt: Ckpt) -> None:
    assert ckpt("convert", web.url("tied.pt"), "there.safetensors").code == 0
    assert ckpt("convert", "tied.pt", "here.safetensors").code == 0
    assert (work / "there.safetensors").read_bytes() == (work / "here.safetensors").read_bytes()


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_nothing_is_written_to_a_web_server(work: Path, ckpt: Ckpt, scheme: str) -> None:
    answer = ckpt("convert", "mlp.pt", f"{scheme}://127.0.0.1:1/x.safetensors")
    assert (answer.code, "Traceback" in answer.err, "bug" in answer.err) == (2, False, False)


def test_a_file_there_and_one_here_are_compared(web: WebServer, ckpt: Ckpt) -> None:
    assert ckpt("diff", web.url("mlp.pt"), "mlp.pt").code == 0
    assert ckpt("diff", "mlp.pt", web.url("mlp.safetensors")).code == 0


def test_several_files_are_answered_each_though_one_is_not_there(web: WebServer, ckpt: Ckpt) -> None:
    answer = ckpt("ls", web.url("mlp.pt"), web.url("none.pt"), "mlp.pt")
    assert answer.code == 2
    assert answer.err == f"ckpt: {web.url('none.pt')}: No such file or directory\n"
    assert {line.split("\t")[-1] for line in answer.lines} == {web.url("mlp.pt"), "mlp.pt"}


def test_pressing_tab_asks_no_server(web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"ckpt show {web.url('mlp.pt')} 2."
    command = [sys.executable, "-m", "ckpt_cli"]
    environment = {"COMP_WORDS": line, "COMP_CWORD": "3", "_CKPT_COMPLETE": "complete_bash"}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, web.seen) == ("", "", [])


def test_a_file_on_the_disk_imports_nothing_that_reads_urls(work: Path) -> None:
    code = (
        "import sys; from ckpt_cli.cli.main import run; run(sys.argv[1:]); "
        "found = [name for name in sys.modules if name.startswith(('ckpt_cli.remote', 'urllib3', 'http.', 'ssl'))]; "
        "print('FOUND', found)"
    )
    for args in (["ls", "mlp.pt"], ["info", "mlp.pt"], ["set", "mlp.pt", "2.bias[0]=1"], ["check", "mlp.safetensors"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "FOUND []", args


def test_a_folder_on_a_server_is_found_by_its_well_known_names(work: Path, ckpt: Ckpt) -> None:
    (work / "run").mkdir()
    torch.save({"w": torch.ones(2)}, work / "run" / "pytorch_model.bin")
    (work / "empty").mkdir()
    with serving(work) as web:
        for address in (web.url("run/"), web.url("run")):
            assert ckpt("ls", address).lines == ["w\tfloat32\t[2]\t8"]
        assert len(web.seen) <= 12
        answer = ckpt("ls", web.url("empty/"))
        assert (answer.code, answer.err.splitlines()[-1]) == (2, "hint: give the URL of a file, or of an index")
        assert answer.err.startswith(f"ckpt: {web.url('empty/')}: its server has no lists, and none of .metadata, ")
