"""Backups that never replace each other, and `ckpt undo`, which restores the newest of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

from ckpt_cli.files import backup
from ckpt_cli.files.backup import backup_name, parse_backup

RECORD = ".a.pt.bak.ckpt-undo"


@pytest.fixture
def path(here: Path) -> Path:
    """A checkpoint of one tensor and one value."""
    torch.save({"w": torch.zeros(4), "epoch": 1}, "a.pt")
    return Path("a.pt")


@pytest.fixture
def folder(here: Path) -> Path:
    """A set of three shards with an index."""
    Path("set").mkdir()
    weight_map = {}
    for number, name in enumerate("abc", 1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({f"{name}.weight": torch.full((3,), float(number)), f"{name}.bias": torch.ones(2)}, f"set/{shard}")
        weight_map |= {f"{name}.weight": shard, f"{name}.bias": shard}
    index = {"metadata": {"total_size": 60}, "weight_map": weight_map}
    Path("set/model.safetensors.index.json").write_text(json.dumps(index))
    return Path("set")


def contents(folder: Path = Path()) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def done(ckpt: Ckpt, *args: object) -> str:
    answer = ckpt(*args)
    assert answer.code == 0, answer.err
    return answer.err


def refusal(ckpt: Ckpt, *args: object) -> str:
    answer = ckpt(*args)
    assert (answer.code, answer.out) == (2, "")
    assert 1 <= len(answer.err.splitlines()) <= 2
    return answer.err


# --- backups ---------------------------------------------------------------------------------------------------------


def test_each_backup_gets_the_next_number(path: Path, ckpt: Ckpt) -> None:
    states = []
    edits = (["set", "w=1"], ["set", "epoch=123456789"], ["rename", "w", "x" * 900], ["rm", "epoch"])
    for number, (command, *rest) in enumerate(edits, 1):
        states.append(path.read_bytes())
        answer = json.loads(ckpt(command, path, *rest, "--backup", "--json").out)
        assert answer["backups"] == [answer["backup"]] == [backup_name("a.pt", number)]
    assert [Path(backup_name("a.pt", number)).read_bytes() for number in range(1, 5)] == states


def test_a_number_below_the_highest_is_not_used_again(path: Path, ckpt: Ckpt) -> None:
    Path("a.pt.bak.7").write_text("older")
    assert done(ckpt, "set", path, "w=1", "--backup").endswith("the old file is a.pt.bak.8\n")
    Path("a.pt.bak.9").symlink_to("nowhere")
    assert done(ckpt, "rm", path, "epoch", "--backup").endswith("the old file is a.pt.bak.10\n")
    assert Path("a.pt.bak.7").read_text() == "older"


def test_all_files_of_an_edit_have_one_number(folder: Path, ckpt: Ckpt) -> None:
    done(ckpt, "set", folder, "a.weight=5", "--backup")
    answer = json.loads(ckpt("rm", folder, "a", "b.bias", "--backup", "--json").out)
    names = {os.path.basename(each) for each in answer["backups"]}
    shards = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2)]
    assert names == {f"{name}.bak.2" for name in (*shards, "model.safetensors.index.json")}
    done(ckpt, "set", folder, "c.weight=5", "--backup")
    assert (folder / "model-00003-of-00003.safetensors.bak.3").exists()


def test_a_name_that_is_taken_meanwhile_is_left_alone(path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backup.highest

    def too_late(folder: str, names: list[str]) -> tuple[int, set[str]]:
        found = real(folder, names)
        Path("a.pt.bak").write_text("of another process")
        return found

    monkeypatch.setattr(backup, "highest", too_late)
    for edit in (["set", path, "w=1"], ["rm", path, "epoch"]):
        done(ckpt, *edit, "--backup")
    assert Path("a.pt.bak").read_text() == "of another process"
    assert Path("a.pt.bak.2").exists()
    assert Path("a.pt.bak.3").exists()


@pytest.mark.parametrize("edit", [["set", "w=1"], ["rm", "epoch"]])
@pytest.mark.parametrize("kept_by", ["link", "copy"])
def test_the_backup_of_a_stopped_edit_is_used_again(path: Path, ckpt: Ckpt, edit: list[str], kept_by: str) -> None:
    before = path.read_bytes()
    os.link(path, "a.pt.bak") if kept_by == "link" else shutil.copy2(path, "a.pt.bak")
    done(ckpt, edit[0], path, edit[1], "--backup")
    assert sorted(contents()) == [RECORD, "a.pt", "a.pt.bak"]
    assert Path("a.pt.bak").read_bytes() == before
    done(ckpt, "undo", path)
    assert contents() == {"a.pt": before}


def test_an_edit_that_fails_leaves_no_second_name_behind(
    path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = contents(), os.replace

    def fail(source: str, target: str) -> None:
        if os.path.basename(target) == "a.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    refusal(ckpt, "rm", path, "epoch", "--backup")
    assert contents() == before


def test_a_file_is_copied_where_there_are_no_hard_links(
    path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    before = path.read_bytes()
    for edit in (["set", path, "w=1"], ["rm", path, "epoch"]):
        done(ckpt, *edit, "--backup")
    assert Path("a.pt.bak").read_bytes() == before
    done(ckpt, "undo", path)
    done(ckpt, "undo", path)
    assert contents() == {"a.pt": before}


def test_a_name_that_has_no_room_for_a_backup_is_refused(here: Path, ckpt: Ckpt) -> None:
    name = "n" * 249 + ".pt"
    torch.save({"w": torch.ones(1)}, name)
    before = contents()
    for edit in (("set", name, "w=2"), ("cast", name, "float16")):
        told = refusal(ckpt, *edit, "--backup")
        assert "the name has 256 bytes, and the file system allows 255\nhint: leave --backup out" in told
        assert contents() == before


def test_a_backup_of_a_link_lies_beside_the_file(path: Path, ckpt: Ckpt) -> None:
    Path("links").mkdir()
    Path("links/l.pt").symlink_to("../a.pt")
    before = path.read_bytes()
    assert "a.pt.bak" in done(ckpt, "set", "links/l.pt", "w=1", "--backup")
    done(ckpt, "undo", "links/l.pt")
    assert path.read_bytes() == before
    assert Path("links/l.pt").is_symlink()


def test_the_names_of_backups() -> None:
    for name, number in (("a.pt", 1), ("a.pt", 2), ("a.pt.bak", 1), (".metadata", 12)):
        assert parse_backup(backup_name(name, number)) == (name, number)
    for other in ("a.pt", ".bak", "bak", "a.bak.1", "a.bak.02", "a.bak.", "a.bak.x", ".bak.2", "a.bak.²"):
        assert parse_backup(other) is None


# --- undo ------------------------------------------------------------------------------------------------------------


def test_undo_goes_back_one_edit_at_a_time(path: Path, ckpt: Ckpt) -> None:
    states = []
    for command, *rest in (["set", "w=1"], ["rm", "epoch"], ["set", "w[0]=9"], ["rename", "w", "x" * 900]):
        states.append(path.read_bytes())
        done(ckpt, command, path, *rest, "--backup")
    for number in (4, 3, 2, 1):
        name = backup_name("a.pt", number)
        assert done(ckpt, "undo", path, "-n") == f"a.pt: would be restored from {name}\n"
        assert done(ckpt, "undo", path) == f"a.pt: restored from {name}\n"
        assert path.read_bytes() == states.pop()
    assert os.listdir() == ["a.pt"]
    assert refusal(ckpt, "undo", path).startswith("ckpt: a.pt: has no backup to restore\n")


def test_undo_restores_all_files_of_a_set(folder: Path, ckpt: Ckpt) -> None:
    states = []
    for edit in (["set", folder, "a.weight=5"], ["rm", folder, "a", "b.bias"], ["cast", folder, "float16"]):
        states.append(contents(folder))
        done(ckpt, *edit, "--backup")
    names = [folder, folder / "model.safetensors.index.json", folder / "model-00001-of-00003.safetensors"]
    for name in names:
        done(ckpt, "undo", name)
        assert contents(folder) == states.pop()


def test_undo_of_a_shard_that_went_brings_all_back(folder: Path, ckpt: Ckpt) -> None:
    before = contents(folder)
    done(ckpt, "rm", folder, "a", "--backup")
    answer = json.loads(ckpt("undo", folder / "model-00001-of-00003.safetensors", "--json").out)
    assert sorted(answer["changed"]) == ["model-00001-of-00003.safetensors", "model.safetensors.index.json"]
    assert (answer["verb"], answer["in_place"], answer["dry_run"]) == ("restored", True, False)
    assert len(answer["backups"]) == 2
    assert contents(folder) == before


def test_a_file_that_changed_since_is_refused_unless_forced(path: Path, ckpt: Ckpt) -> None:
    before = path.read_bytes()
    done(ckpt, "set", path, "w=1", "--backup")
    for change in (lambda: ckpt("set", path, "w[2]=5"), lambda: torch.save({"other": 1}, path), path.unlink):
        change()
        told = refusal(ckpt, "undo", path)
        assert told.startswith("ckpt: a.pt: 'a.pt' changed since the edit that kept 'a.pt.bak'")
        assert told.endswith("\nhint: --force restores it all the same\n")
    done(ckpt, "undo", path, "--force")
    assert contents() == {"a.pt": before}


def test_a_set_of_which_one_file_changed_is_refused_as_a_whole(folder: Path, ckpt: Ckpt) -> None:
    done(ckpt, "cast", folder, "float16", "--backup")
    done(ckpt, "set", folder / "model-00003-of-00003.safetensors", "c.bias=7")
    before = contents(folder)
    assert "'model-00003-of-00003.safetensors' changed since" in refusal(ckpt, "undo", folder)
    assert contents(folder) == before


def test_a_large_file_that_changed_between_the_samples_is_seen(here: Path, ckpt: Ckpt) -> None:
    save_file({"w": torch.zeros(1 << 20)}, "big.safetensors")
    before = Path("big.safetensors").read_bytes()
    done(ckpt, "set", "big.safetensors", "w[5]=1", "--backup")
    done(ckpt, "undo", "big.safetensors", "-n")
    time.sleep(0.05)
    with open("big.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"x")
    assert "changed since" in refusal(ckpt, "undo", "big.safetensors")
    done(ckpt, "undo", "big.safetensors", "--force")
    for edit in (["set", "w[5]=1"], ["rename", "w", "a.longer.name" * 200]):
        done(ckpt, edit[0], "big.safetensors", *edit[1:], "--backup")
    for _ in range(2):
        done(ckpt, "undo", "big.safetensors")
    assert Path("big.safetensors").read_bytes()[:99_000] == before[:99_000]


def test_a_backup_without_a_record_is_restored_by_force_only(path: Path, ckpt: Ckpt) -> None:
    Path("a.pt.bak").write_bytes(b"of an older ckpt")
    assert "'a.pt.bak' has no record of the edit that kept it (an older ckpt wrote none)" in refusal(ckpt, "undo", path)
    Path(RECORD).write_bytes(b"ckpt-undo-1\n torn")
    assert "has no record" in refusal(ckpt, "undo", path)
    done(ckpt, "undo", path, "--force")
    assert path.read_bytes() == b"of an older ckpt"


def test_a_set_with_a_backup_missing_is_refused(folder: Path, ckpt: Ckpt) -> None:
    done(ckpt, "cast", folder, "float16", "--backup")
    (folder / "model-00002-of-00003.safetensors.bak").unlink()
    before = contents(folder)
    for force in ([], ["--force"]):
        assert "'model-00002-of-00003.safetensors.bak' is not there any more" in refusal(ckpt, "undo", folder, *force)
    assert contents(folder) == before


def test_a_record_cannot_name_files_elsewhere(path: Path, ckpt: Ckpt) -> None:
    done(ckpt, "set", path, "w=1", "--backup")
    from ckpt_cli.files.undo_record import RecordedFile, write_record

    for name, kept in (("../b.pt", "a.pt.bak"), ("b.pt", "a.pt.bak"), ("a.pt", "../a.pt.bak")):
        write_record(str(Path.cwd()), [RecordedFile("a.pt", "a.pt.bak", None), RecordedFile(name, kept, None)])
        before = contents()
        refusal(ckpt, "undo", path)
        assert contents() == before


def test_undo_of_an_edit_that_was_undone_but_for_its_backups_ends_it(folder: Path, ckpt: Ckpt) -> None:
    before = contents(folder)
    done(ckpt, "cast", folder, "float16", "--backup")
    for name, content in before.items():
        (folder / name).write_bytes(content)
    done(ckpt, "undo", folder)
    assert contents(folder) == before


def test_a_file_in_a_cache_is_not_restored(here: Path, ckpt: Ckpt) -> None:
    blob = Path("blobs") / ("0" * 40)
    blob.parent.mkdir()
    torch.save({"w": torch.ones(1)}, blob)
    Path(f"{blob}.bak").write_bytes(b"x")
    assert "hash of its content" in refusal(ckpt, "undo", blob, "--force")


def test_a_distributed_checkpoint_is_restored(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(3)}, "a.pt")
    done(ckpt, "convert", "a.pt", "dcp", "--to", "dcp")
    before = contents(Path("dcp"))
    done(ckpt, "set", "dcp", "w=4", "--backup")
    done(ckpt, "undo", "dcp")
    assert contents(Path("dcp")) == before
