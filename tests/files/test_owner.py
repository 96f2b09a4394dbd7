"""Owner, group and permissions survive a rewrite, and what cannot be kept is said."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import Ckpt

from ckpt_cli.files.atomic import take_after

IS_ROOT = os.geteuid() == 0
OTHER = (54321, 54322)
"""An owner and a group that are not ours."""

EDITS = {
    "set in place": ("set", "w=2"), "set a longer value": ("set", "note=" + "x" * 9000), "rename": ("rename", "w", "v"),
    "rm": ("rm", "epoch"), "cast": ("cast", "float16"),
}  # fmt: skip


def owned(path: Path, mode: int = 0o640) -> tuple[int, int, int]:
    """Give a file to others where we may; returns its owner, group and permissions."""
    if IS_ROOT:
        os.chown(path, *OTHER)
    path.chmod(mode)
    return facts(path)


def facts(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def saved(path: Path, *, is_zip: bool = True) -> Path:
    torch.save({"w": torch.ones(4), "epoch": 1, "note": ""}, path, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_its_backup_and_undo_keep_owner_group_and_mode(here: Path, ckpt: Ckpt, edit: str, is_zip: bool) -> None:
    path = saved(Path("a.pt"), is_zip=is_zip)
    before = owned(path)
    assert before[:2] == OTHER or not IS_ROOT
    command, *rest = EDITS[edit]
    assert ckpt(command, path, *rest, "--backup").code == 0
    assert facts(path) == facts(Path("a.pt.bak")) == before
    assert ckpt("undo", path).code == 0
    assert facts(path) == before


def test_a_set_keeps_the_owner_of_each_file(here: Path, ckpt: Ckpt) -> None:
    assert ckpt("convert", saved(Path("a.pt")), "set", "--max-shard", "20B", "--tensors-only").code == 0
    before = {path.name: owned(path, 0o600 + number) for number, path in enumerate(sorted(Path("set").iterdir()))}
    for edit in (["cast", "set", "float16"], ["undo", "set"]):
        more = ["--backup"] if edit[0] == "cast" else []
        assert ckpt(*edit, *more).code == 0
        assert {name: facts(Path("set") / name) for name in before} == before


def test_an_output_that_is_there_keeps_its_owner_and_a_new_one_is_ours(here: Path, ckpt: Ckpt) -> None:
    path, there = saved(Path("a.pt")), saved(Path("there.pt"))
    owned(path)
    before = owned(there, 0o600)
    for output in ("there.pt", "new.pt"):
        assert ckpt("set", path, "w=1", "-o", output).code == 0
    assert facts(there) == before
    assert facts(Path("new.pt"))[::2] == (os.geteuid(), 0o640)


def test_files_of_a_folder_that_are_replaced_keep_their_owners(here: Path, ckpt: Ckpt) -> None:
    saved(Path("a.pt"))
    convert = ("convert", "a.pt", "set", "--max-shard", "20B", "--tensors-only", "--force")
    assert ckpt(*convert).code == 0
    before = {path.name: owned(path) for path in Path("set").iterdir()}
    assert ckpt(*convert).code == 0
    assert {path.name: facts(path) for path in Path("set").iterdir()} == before


def test_what_cannot_be_kept_is_said_and_the_edit_stands() -> None:
    """As another user, who may not give files away; root becomes one once everything is imported."""
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder) / "a.pt")
        shutil.copy(path, f"{folder}/first.pt")
        os.chmod(folder, 0o777)
        path.chmod(0o666)
        before = facts(path)
        call = [sys.executable, "-c", AS_OTHER.format(group=OTHER[1], user=OTHER[0]), folder]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        if IS_ROOT:
            lost = f"it belonged to user {before[0]} and group {before[1]}, which this user may not keep"
            assert warnings == [f"warning: {path}: {lost}"]
            assert facts(path) == (*OTHER, 0o666)
        else:
            assert (warnings, facts(path)) == ([], before)


AS_OTHER = """
import logging, os, sys
from ckpt_cli.cli.main import run
folder = sys.argv[1]
run(["rm", folder + "/first.pt", "epoch"])
if os.geteuid() == 0:
    os.setgroups([])
    os.setegid({group})
    os.seteuid({user})
sys.exit(run(["rm", folder + "/a.pt", "epoch"]))
"""


def test_the_group_is_kept_where_the_owner_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.touch()
    real = os.fchown

    def no_giving_away(fd: int, uid: int, gid: int) -> None:
        if uid != -1:
            raise PermissionError
        real(fd, uid, gid)

    monkeypatch.setattr(os, "fchown", no_giving_away)
    now = path.stat()
    group = OTHER[1] if IS_ROOT else now.st_gid
    wanted = os.stat_result((0o100640, now.st_ino, now.st_dev, 1, now.st_uid + 1, group, 0, 0, 0, 0))
    with path.open("r+b") as file:
        lost = take_after(file.fileno(), wanted)
    assert lost == f"it belonged to user {now.st_uid + 1}, which this user may not keep"
    assert facts(path) == (now.st_uid, group, 0o640)
