"""Files whose names are as long as the file system allows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from killing import killed_at
from safetensors.torch import load_file, save_file

from ckpt_cli.cli.main import run
from ckpt_cli.files import hidden_files as hidden
from ckpt_cli.files.hidden_files import journal_path, temporary_path

SUFFIX = ".safetensors"
NAMES = {
    "as long as can be": "n" * (255 - len(SUFFIX)) + SUFFIX,
    "just too long for a journal": "n" * (242 - len(SUFFIX)) + SUFFIX,
    "just short enough for it": "n" * (241 - len(SUFFIX)) + SUFFIX,
    "of many bytes a character": "名" * 81 + SUFFIX,
    "not of UTF-8": os.fsdecode(b"\xff" * (255 - len(SUFFIX))) + SUFFIX,
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a checkpoint in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(4), "b": torch.zeros(4)}, "m.safetensors")
    os.rename("m.safetensors", NAMES[request.param])
    return NAMES[request.param]


def values(path: str) -> set[float]:
    """The values that the tensors begin with."""
    shutil.copy(path, "read")
    try:
        return {float(tensor[0]) for tensor in load_file("read").values()}
    finally:
        os.unlink("read")


def test_a_file_with_a_long_name_can_be_edited_and_rewritten(name: str) -> None:
    assert run(["set", name, "w=1", "b=1"]) == 0
    assert values(name) == {1.0}
    assert run(["cast", name, "float16"]) == 0
    assert run(["convert", name, name[1:], "--force"]) == 0
    assert sorted(os.listdir()) == sorted([name, name[1:]])


@pytest.mark.parametrize("look", ["file", "folder"])
def test_a_killed_edit_of_it_is_completed(name: str, look: str) -> None:
    with killed_at("pwrite", 3):
        run(["set", name, "w=7", "b=7"])
    assert values(name) == {0.0, 7.0}
    assert run(["ls", name if look == "file" else "."]) == 0
    assert values(name) == {7.0}
    assert os.listdir() == [name]


def test_a_killed_edit_of_several_is_found_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = "model" + "x" * 200 + "{}-of-00002" + SUFFIX
    names = [long.format(f"-{number:05}") for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(4)}, name)
    for call, at, command in (("pwrite", 4, ("set", ".", "*=7")), ("replace", 2, ("cast", ".", "float16"))):
        with killed_at(call, at):
            run(list(command))
            pytest.fail("it was not killed")
        left = [name for name in os.listdir() if name.endswith("ckpt-journal")]
        assert len(left) >= 2
        assert run(["ls", "."]) == 0
        assert sorted(os.listdir()) == names
    assert {values(name) == {7.0} for name in names} == {True}
    assert {load_file(name).popitem()[1].dtype for name in names} == {torch.float16}


def test_a_backup_whose_name_does_not_fit_is_refused(name: str, ckpt: Ckpt) -> None:
    before = Path(name).read_bytes()
    for command in (("set", name, "w=1"), ("cast", name, "float16")):
        answer = ckpt(*command, "--backup")
        if len(os.fsencode(name)) + len(".bak") <= 255:
            assert answer.code == 0
            continue
        assert (answer.code, answer.err.count("\n")) == (2, 2)
        assert "and the file system allows 255" in answer.err
        assert "leave --backup out" in answer.err
        assert Path(name).read_bytes() == before
        assert os.listdir() == [name]


def test_a_new_name_that_is_too_long_is_refused_before_any_work(name: str, ckpt: Ckpt) -> None:
    for output in ("o" * 256, "名" * 86):
        for command in (("convert", name, f"{output}.pt"), ("convert", name, output, "--to", "hf")):
            answer = ckpt(*command)
            assert (answer.code, answer.err.count("\n")) == (2, 2)
            assert "the file system allows 255" in answer.err
    assert os.listdir() == [name]


def test_a_long_folder_can_be_converted_to(name: str) -> None:
    assert run(["convert", name, "f" * 255, "--to", "hf"]) == 0
    assert sorted(os.listdir()) == sorted([name, "f" * 255])


def test_hidden_names_fit_whatever_the_limit_of_the_file_system_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in (143, 255, 1530):
        monkeypatch.setattr(hidden, "_limit", lambda _, limit=limit: limit)
        for length in (1, 100, 129, 133, 140, limit):
            for path in (journal_path, temporary_path):
                beside = os.path.basename(path(str(tmp_path / ("n" * min(length, 255)))))
                assert len(beside) <= min(limit, 255)


def test_a_planted_journal_that_names_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    log = tmp_path / f".name-sha256-{'0' * 32}.ckpt-journal"
    for content in (b"", b"ckpt-journal-of\na\0a", b"ckpt-journal-of\n../a\0../a", b"ckpt-journal-of\n\xff\0\0"):
        log.write_bytes(content)
        assert run(["ls", str(tmp_path)]) == 2
        assert log.read_bytes() == content
