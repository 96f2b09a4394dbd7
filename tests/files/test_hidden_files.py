"""Hidden files of ckpt's own: created exclusively, and what somebody else put in their place is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

from ckpt_cli.cli.main import run
from ckpt_cli.errors import BusyError, RefusedError
from ckpt_cli.files.atomic import locked_temporary, replacing, replacing_folder
from ckpt_cli.files.hidden_files import journal_path, staging_path, temporary_path, undo_record_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint in it."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(4), "b": torch.zeros(4)}, "m.safetensors")
    return tmp_path


def make_file(path: str) -> None:
    """A file with something in it."""
    Path(path).write_bytes(b"planted")


PLANTED: dict[str, Callable[[str], Any]] = {
    "symbolic link": lambda path: os.symlink("victim", path),
    "dangling link": lambda path: os.symlink("nowhere", path),
    "folder": os.mkdir,
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize(
    "command",
    [
        ("convert", "m.safetensors", "out.pt"),
        ("cast", "m.safetensors", "float16", "-o", "out.pt"),
        ("set", "m.safetensors", "w=1", "-o", "out.pt"),
    ],
)
def test_what_is_no_file_in_the_place_of_a_temporary_one_is_refused(
    folder: Path, ckpt: Ckpt, kind: str, command: tuple[str, ...]
) -> None:
    make_file("victim")
    planted = temporary_path("out.pt")
    PLANTED[kind](planted)
    answer = ckpt(*command)
    assert (answer.code, answer.err.count("\n")) == (2, 2)
    assert "did not write has the name of a temporary file" in answer.err
    assert "hint: look at it, then remove it: rm " in answer.err
    assert Path("victim").read_bytes() == b"planted"
    assert not Path("out.pt").exists()
    assert os.path.lexists(planted)


def test_a_temporary_file_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt) -> None:
    make_file(temporary_path("out.pt"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    answer = ckpt("convert", "m.safetensors", "out.pt")
    assert answer.code == 2
    assert f"something of another user's (id {os.getuid()}) has the name of a temporary file" in answer.err
    assert Path(temporary_path("out.pt")).read_bytes() == b"planted"


def test_what_a_killed_process_left_is_removed_and_not_written_into(folder: Path) -> None:
    left = temporary_path("out")
    make_file(left)
    os.chmod(left, 0o666)
    os.link(left, "another name of it")
    before = os.stat(left).st_ino
    with replacing("out") as file:
        assert (os.fstat(file.fd).st_ino, os.fstat(file.fd).st_nlink) != (before, 2)
        os.write(file.fd, b"new")
    assert Path("out").read_bytes() == b"new"
    assert Path("another name of it").read_bytes() == b"planted"


def test_a_left_over_that_may_not_be_written_is_removed(folder: Path) -> None:
    make_file(temporary_path("out"))
    os.chmod(temporary_path("out"), 0o400)
    with replacing("out") as file:
        os.write(file.fd, b"new")
    assert Path("out").read_bytes() == b"new"


def test_a_temporary_file_that_a_living_process_has_locked_is_busy(folder: Path) -> None:
    with locked_temporary("out"), pytest.raises(BusyError), replacing("out"):
        pass
    with replacing("out") as file:
        os.write(file.fd, b"new")
    assert not os.path.lexists(temporary_path("out"))


def test_a_file_that_was_renamed_already_does_not_take_the_next_ones_temporary_file_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        make_file(temporary_path("out"))  # another process begins
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ckpt_cli.files.atomic.sync_folder", fail)
    with pytest.raises(OSError, match="Input/output"), replacing("out") as file:
        os.write(file.fd, b"new")
    assert Path("out").read_bytes() == b"new"
    assert Path(temporary_path("out")).read_bytes() == b"planted"


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "pipe", "file"])
@pytest.mark.parametrize("place", ["new", "there"])
def test_what_is_no_folder_in_the_place_of_a_temporary_one_is_refused(
    folder: Path, ckpt: Ckpt, kind: str, place: str
) -> None:
    make_file("victim")
    Path("there").mkdir()
    make_file("there/readme")
    planted = temporary_path("new") if place == "new" else staging_path("there")
    (PLANTED | {"file": make_file})[kind](planted)
    answer = ckpt("convert", "m.safetensors", place, "--to", "hf", "--force")
    assert (answer.code, answer.err.count("\n")) == (2, 2)
    assert "has the name of a temporary folder" in answer.err
    assert os.path.lexists(planted)
    assert Path("victim").read_bytes() == b"planted"


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir(temporary_path("new"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RefusedError, match="another user"), replacing_folder("new"):
        pass


def test_a_folder_that_a_killed_process_left_is_created_again(folder: Path) -> None:
    os.mkdir(temporary_path("new"), 0o777)
    make_file(f"{temporary_path('new')}/part")
    before = os.stat(temporary_path("new")).st_ctime_ns
    with replacing_folder("new") as path:
        assert os.listdir(path) == []
        assert os.stat(path).st_ctime_ns > before
    assert os.listdir("new") == []


def test_a_folder_that_a_living_process_fills_is_busy(folder: Path) -> None:
    os.mkdir(temporary_path("new"))
    fd = os.open(temporary_path("new"), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BusyError), replacing_folder("new"):
        pass
    os.close(fd)


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("command", [("ls", "m.safetensors"), ("set", "m.safetensors", "w=1")])
def test_what_is_no_file_in_the_place_of_a_journal_is_refused(
    folder: Path, ckpt: Ckpt, kind: str, command: tuple[str, ...]
) -> None:
    before = Path("m.safetensors").read_bytes()
    make_file("victim")
    PLANTED[kind](journal_path("m.safetensors"))
    answer = ckpt(*command)
    assert (answer.code, answer.err.count("\n")) == (2, 2)
    assert "has the name of a journal" in answer.err
    assert Path("m.safetensors").read_bytes() == before
    assert Path("victim").read_bytes() == b"planted"


def test_the_left_over_of_a_backup_which_is_the_file_itself_does_no_harm(folder: Path) -> None:
    before = Path("m.safetensors").read_bytes()
    os.link("m.safetensors", temporary_path("m.safetensors.bak"))
    assert run(["set", "m.safetensors", "w=1", "--backup"]) == 0
    assert Path("m.safetensors.bak").read_bytes() == before
    assert sorted(os.listdir()) == [".m.safetensors.bak.ckpt-undo", "m.safetensors", "m.safetensors.bak"]


def test_the_record_of_a_backup_is_not_written_into_another_file(folder: Path) -> None:
    make_file("victim")
    os.link("victim", undo_record_path("m.safetensors.bak"))
    assert run(["set", "m.safetensors", "w=1", "--backup"]) == 0
    assert Path("victim").read_bytes() == b"planted"
    assert run(["undo", "m.safetensors"]) == 0
