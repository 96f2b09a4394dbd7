"""Undo that was interrupted, or is at work beside others, and backups of edits that the next command completes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Answer, Ckpt
from contract import write_shards
from killing import killed_at
from safetensors.torch import load_file, save_file

from ckpt_cli.cli.main import run
from ckpt_cli.errors import RefusedError
from ckpt_cli.files import restore as restoring
from ckpt_cli.files.hidden_files import journal_path, temporary_path
from ckpt_cli.files.journal import apply as journal

NAMES = "abcdefgh"
"""Tensors of a set, of which each shard has four."""


def edited() -> dict[str, bytes]:
    """Change both shards of a set and keep backups; gives the old bytes by the path of each shard."""
    write_shards({name: torch.zeros(4) for name in NAMES}, Path("shards"))
    old = {str(path): path.read_bytes() for path in sorted(Path("shards").glob("*.bin"))}
    assert len(old) == 2
    assert run(["set", "shards", "*=7", "--backup"]) == 0
    return old


def half_undone() -> dict[str, bytes]:
    """A set of which the first shard was put back when the process was killed; gives the old bytes by path."""
    old = edited()
    with killed_at("replace", 2):
        run(["undo", "shards"])
        pytest.fail("it was not killed")
    first, second = old
    assert Path(first).read_bytes() == old[first]
    assert Path(second).read_bytes() != old[second]
    return old


def now(old: dict[str, bytes]) -> dict[str, bytes]:
    """What the files hold at present."""
    return {path: Path(path).read_bytes() for path in old}


def test_an_interrupted_undo_is_completed_by_the_next_command(here: Path) -> None:
    old = half_undone()
    assert run(["ls", "shards"]) == 0
    assert now(old) == old
    assert not [name for name in os.listdir("shards") if ".bak" in name and not name.endswith(".ckpt-undo")]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_that_was_saved_since_is_not_replaced_by_its_backup(here: Path, ckpt: Ckpt, *, in_place: bool) -> None:
    _, second = half_undone()
    kept = Path(f"{second}.bak").read_bytes()
    if not in_place:
        Path(second).unlink()
    torch.save({"h": torch.ones(4)}, second)
    saved = Path(second).read_bytes()
    for command in (("ls", "shards"), ("undo", "shards", "--force"), ("set", second, "h=2")):
        answer = ckpt(*command)
        assert answer.code == 2
        assert "would replace it, but it was saved again since" in answer.err
        assert (Path(second).read_bytes(), Path(f"{second}.bak").read_bytes()) == (saved, kept)


def test_a_backup_that_was_changed_since_takes_no_ones_place(here: Path, ckpt: Ckpt) -> None:
    _, second = half_undone()
    before = Path(second).read_bytes()
    Path(f"{second}.bak").write_bytes(b"mine")
    answer = ckpt("ls", "shards")
    assert answer.code == 2
    assert "cannot be finished: the new content of this one is gone" in answer.err
    assert (Path(second).read_bytes(), Path(f"{second}.bak").read_bytes()) == (before, b"mine")


def test_a_journal_of_another_user_moves_no_file_of_ours(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal and the files that it would replace are another user's; the backup is ours."""
    _, second = half_undone()
    before = Path(second).read_bytes()

    def as_others(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def found(place: int | str) -> os.stat_result:
            status = real(place)
            uid = 1000 if str(place).endswith(".bak") else 12345
            return os.stat_result((*status[:4], uid, *status[5:10]), {"st_mtime_ns": status.st_mtime_ns})

        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", as_others(os.fstat))
        patch.setattr(os, "lstat", as_others(os.lstat))
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(RefusedError, match=r"bak: a journal that another user \(id 12345\) wrote"):
            journal.recover(second)
    assert Path(second).read_bytes() == before
    assert run(["ls", "shards"]) == 0
    assert Path(second).read_bytes() != before


def test_a_backup_that_another_process_has_locked_is_busy(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = edited()
    monkeypatch.setattr("ckpt_cli.files.lock.PATIENCE", 0.01)
    before = now(old)
    with open(f"{next(iter(old))}.bak", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        answer = ckpt("undo", "shards")
    assert answer.code == 2
    assert "another process is writing it" in answer.err
    assert now(old) == before
    assert run(["undo", "shards"]) == 0
    assert now(old) == old


def test_the_next_edit_waits_until_an_undo_has_removed_what_is_left(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.zeros(4)}, "a.safetensors")
    assert run(["set", "a.safetensors", "w=1", "--backup"]) == 0
    real, locked = restoring._clear, []

    def clear(edit: restoring.KeptEdit) -> None:
        with open("a.safetensors", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        real(edit)

    monkeypatch.setattr(restoring, "_clear", clear)
    assert run(["undo", "a.safetensors"]) == 0
    assert locked == [True]
    assert os.listdir() == ["a.safetensors"]


def failed(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, call: str, at: int, *command: str) -> Answer:
    """Run a command of which a call of `os` fails."""
    count, real = 0, getattr(os, call)

    def either(*args: object) -> object:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, either)
        return ckpt(*command)


def test_a_backup_stays_where_the_next_command_completes_the_edit(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards({name: torch.zeros(4) for name in NAMES}, Path("shards"))
    old = {str(path): path.read_bytes() for path in Path("shards").iterdir()}
    answer = failed(ckpt, monkeypatch, "replace", 3, "cast", "shards", "float16", "--backup")
    assert "incomplete until the next ckpt command" in answer.err
    assert run(["ls", "shards"]) == 0
    assert run(["undo", "shards"]) == 0
    assert now(old) == old


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("call", ["fsync", "replace", "unlink", "link", "fchmod"])
def test_an_error_of_an_undo_says_truly_what_it_leaves(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    old = edited()
    save_file({"w": torch.zeros(4)}, "a.safetensors")
    old["a.safetensors"] = Path("a.safetensors").read_bytes()
    assert run(["set", "a.safetensors", "w=1", "--backup"]) == 0
    new = now(old)
    for target in ("shards", "a.safetensors"):
        answer = failed(ckpt, monkeypatch, call, at, "undo", target)
        found = now(old)
        assert run(["ls", target]) == 0
        for path in [path for path in old if path.startswith(target)]:
            if answer.code == 0 or "the change itself is complete" in answer.err:
                assert found[path] == old[path]
            elif "the change is incomplete until" not in answer.err:
                assert answer.code == 2
                assert "no checkpoint was changed" in answer.err
                assert found[path] == new[path]
        assert len({now(old)[path] == old[path] for path in old if path.startswith(target)}) == 1


def test_a_file_with_a_name_as_long_as_a_backup_allows_is_restored(here: Path) -> None:
    name = "n" * (251 - len(".safetensors")) + ".safetensors"
    save_file({"w": torch.zeros(4)}, "m.safetensors")
    os.rename("m.safetensors", name)
    before = Path(name).read_bytes()
    for command in (("set", name, "w=1"), ("cast", name, "float16")):
        assert run([*command, "--backup"]) == 0
        assert len(os.listdir()) == 3
        assert run(["undo", name]) == 0
        assert (os.listdir(), Path(name).read_bytes()) == ([name], before)


def test_the_record_of_an_edit_is_never_half_written(here: Path, ckpt: Ckpt) -> None:
    save_file({"w": torch.zeros(1 << 19)}, "a.safetensors")  # large, so that it is written twice
    before = Path("a.safetensors").read_bytes()
    for at in range(1, 40):
        with killed_at("pwrite", at):
            run(["set", "a.safetensors", "w[0]=1", "--backup"])
            break
        assert run(["ls", "a.safetensors"]) == 0
        if float(load_file("a.safetensors")["w"][0]) == 1:
            done = json.loads(ckpt("undo", "a.safetensors", "--force", "--json").out)
            assert done["verb"] == "restored"
        assert Path("a.safetensors").read_bytes() == before
        for left in Path().iterdir():
            if left.name != "a.safetensors":
                left.unlink()
    else:
        pytest.fail("the edit never ends")
    assert not os.path.lexists(temporary_path("a.safetensors.bak"))
    assert not os.path.lexists(journal_path("a.safetensors"))


def test_numbered_backups_of_an_index_do_not_come_along_into_a_new_folder(here: Path, ckpt: Ckpt) -> None:
    Path("set").mkdir()
    save_file({"a": torch.ones(2)}, "set/model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, "set/model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate("ab", 1)}
    Path("set/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("c", "d"):
        assert run(["rename", "set", "a" if name == "c" else "c", name, "--backup"]) == 0
    assert Path("set/model.safetensors.index.json.bak.2").exists()
    done = json.loads(ckpt("cast", "set", "float16", "-o", "out", "--json").out)
    assert done["beside"]["copied"] == []
    assert {item["why"] for item in done["beside"]["left"]} == {"a backup"}
    assert not [name for name in os.listdir("out") if ".bak" in name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_left_of_another_users_file_is_replaced(here: Path) -> None:
    save_file({"w": torch.zeros(4)}, "a.safetensors")
    save_file({"w": torch.ones(4)}, "there.safetensors")
    os.chown("there.safetensors", 54321, 54322)
    with killed_at("fsync", 1):
        run(["set", "a.safetensors", "w=2", "-o", "there.safetensors"])
    assert os.stat(temporary_path("there.safetensors")).st_uid == 54321
    assert run(["set", "a.safetensors", "w=2", "-o", "there.safetensors"]) == 0
    assert os.stat("there.safetensors").st_uid == 54321
    assert float(load_file("there.safetensors")["w"][0]) == 2
