"""Edits of files with several names: whole under each of them, whenever an edit is killed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from contract import write_shards
from killing import killed_at
from safetensors.torch import load_file, save_file

from ckpt_cli.cli.main import run
from ckpt_cli.files.hidden_files import journal_path
from ckpt_cli.files.journal.pointer import _NOTE


@pytest.fixture
def linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The other name of the file `m.safetensors`, in another folder."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(4), "b": torch.zeros(4)}, "m.safetensors")
    Path("other").mkdir()
    os.link("m.safetensors", "other/n.safetensors")
    return Path("other/n.safetensors")


def values(path: Path) -> set[float]:
    """The values that the tensors begin with."""
    return {float(tensor[0]) for tensor in load_file(path).values()}


@pytest.mark.parametrize("call", ["pwrite", "fsync", "unlink", "setxattr", "removexattr"])
def test_a_killed_edit_is_whole_under_the_other_name(linked: Path, call: str) -> None:
    for at in range(1, 8):
        with killed_at(call, at):
            code = run(["set", "m.safetensors", "w=7", "b=7"])
            assert code == 0
            break
        assert run(["show", str(linked)]) == 0
        assert values(linked) in ({0.0}, {7.0}), f"{call} {at}"
        assert run(["set", "m.safetensors", "w=0", "b=0"]) == 0
        assert not os.listxattr(linked)
        assert not list(Path().rglob(".*"))
    else:
        pytest.fail("the edit never ends")


@pytest.mark.parametrize("command", [("set", "w=1"), ("rename", "--add", "a.longer.prefix" * 20)])
def test_an_edit_by_the_other_name_completes_the_killed_one_first(linked: Path, command: tuple[str, ...]) -> None:
    with killed_at("pwrite", 3):
        run(["set", "m.safetensors", "w=7", "b=7"])
    assert run([command[0], str(linked), *command[1:]]) == 0
    assert values(Path("m.safetensors")) in ({7.0}, {7.0, 1.0})
    assert not list(Path().rglob(".*"))


def test_a_killed_edit_of_linked_shards_is_whole_under_the_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards({name: torch.zeros(4) for name in "abcd"}, tmp_path / "shards")
    names = [name for name in sorted(os.listdir("shards")) if not name.endswith(".json")]
    for name in names:
        os.link(f"shards/{name}", f"other-{name}")
    with killed_at("pwrite", 6):
        run(["set", "shards", "*=7"])
    assert {run(["ls", f"other-{name}"]) for name in names} == {0}
    assert run(["show", "shards"]) == 0
    assert not list(Path().rglob(".*"))


def test_an_edit_whose_name_was_moved_away_is_not_read_over(linked: Path, ckpt: Ckpt) -> None:
    with killed_at("pwrite", 3):
        run(["set", "m.safetensors", "w=7", "b=7"])
    os.rename("m.safetensors", "moved.safetensors")
    answer = ckpt("ls", linked)
    assert (answer.code, answer.out) == (2, "")
    assert "an edit of it under another name was interrupted" in answer.err
    os.rename("moved.safetensors", "m.safetensors")
    assert run(["ls", str(linked)]) == 0
    assert values(linked) == {7.0}


def test_a_journal_that_was_removed_leaves_the_file_readable_and_editable(linked: Path) -> None:
    with killed_at("pwrite", 3):
        run(["set", "m.safetensors", "w=7", "b=7"])
    os.unlink(journal_path("m.safetensors"))
    assert run(["ls", str(linked)]) == 0
    assert run(["set", str(linked), "w=1", "b=1"]) == 0
    assert values(linked) == {1.0}
    assert not os.listxattr(linked)


@pytest.mark.parametrize("missing", [errno.ENOTSUP, None])
def test_a_file_system_without_extended_attributes_refuses_the_edit_in_place(
    linked: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, missing: int | None
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(missing, os.strerror(missing or 0))

    if missing is None:
        monkeypatch.delattr(os, "setxattr")
        monkeypatch.delattr(os, "getxattr")
    else:
        monkeypatch.setattr(os, "setxattr", refuse)
    answer = ckpt("set", "m.safetensors", "w=7")
    assert answer.code == 2
    assert "several names (hard links)" in answer.err
    assert "-o OUT" in answer.err
    assert values(linked) == {0.0}
    assert not list(Path().glob(".*"))
    assert ckpt("set", "m.safetensors", "w=7", "-o", "new.safetensors").code == 0


@pytest.mark.parametrize("note", [b"relative", b"/nowhere/at/all", b"\xff\xfe", b"/", b"", b"/dev/zero"])
def test_a_planted_attribute_is_one_line(linked: Path, ckpt: Ckpt, note: bytes) -> None:
    os.setxattr(linked, _NOTE, note)
    before = linked.read_bytes()
    for command in (("ls", linked), ("set", linked, "w=7")):
        answer = ckpt(*command)
        assert (answer.code, answer.err.count("\n")) == (2, 2)
    assert linked.read_bytes() == before
    os.unlink("m.safetensors")
    assert ckpt("ls", linked).code == 0  # with one name, nobody looks at it


def test_a_planted_attribute_cannot_apply_the_journal_of_another_file(linked: Path, ckpt: Ckpt) -> None:
    save_file({"w": torch.zeros(4), "b": torch.zeros(4)}, "x.safetensors")
    os.link("x.safetensors", "y.safetensors")
    with killed_at("pwrite", 3):
        run(["set", "x.safetensors", "w=7", "b=7"])
    os.setxattr(linked, _NOTE, os.fsencode(os.path.abspath("x.safetensors")))
    assert ckpt("ls", linked).code == 2
    assert values(linked) == {0.0}
    os.rename(journal_path("x.safetensors"), journal_path("m.safetensors"))
    os.setxattr(linked, _NOTE, os.fsencode(os.path.abspath("m.safetensors")))
    assert ckpt("ls", linked).code == 2
    assert values(linked) == {0.0}


def test_a_file_with_one_name_is_not_looked_at_for_attributes(linked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked.unlink()

    def looked(*_: Any) -> None:
        pytest.fail("it was looked at")

    monkeypatch.setattr(os, "getxattr", looked)
    assert run(["ls", "m.safetensors"]) == 0


def test_a_rewrite_says_that_the_other_names_keep_the_old_file(linked: Path, ckpt: Ckpt) -> None:
    longer = "a.longer.prefix" * 20
    for options in (("-n",), ()):
        answer = ckpt("rename", "m.safetensors", "--add", longer, *options)
        assert answer.code == 0
        assert "1 other name (hard links)" in answer.err
    assert set(load_file(linked)) == {"w", "b"}
    os.link(linked, "third")
    answer = ckpt("set", "m.safetensors", "*.w=1", "-o", linked)
    assert "1 other name (hard links) keeps the old file" in answer.err
    assert "other name" not in ckpt("set", "third", "w=1").err  # in place, each name has the edit


def test_a_rewritten_set_says_that_the_other_names_keep_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards({name: torch.zeros(4) for name in "abcd"}, tmp_path / "shards")
    for name in os.listdir("shards"):
        os.link(f"shards/{name}", f"other-{name}")
    answer = ckpt("cast", "shards", "float16", "--json")
    assert json.loads(answer.out)["other_names"] >= 2
