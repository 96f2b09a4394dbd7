"""Where structural edits go, and what they say: JSON, dry runs, backups, outputs, links, folders of one file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ckpt
from run_edit import edited_as_told
from torch_files import FORMATS, load, saved

EDITS = {
    "rename": ["rename", "a", "x"],
    "rename to much more": ["rename", "a", "some.long.name" * 40],
    "rm": ["rm", "a"],
    "keep": ["keep", "a", "c"],
    "cast": ["cast", "float16"],
    "tie": ["tie", "a", "b"],
    "untie": ["untie", "d"],
    "compact": ["compact"],
    "set a value": ["set", "epoch=123456789"],
    "set a new one": ["set", "--new", "note=x"],
    "set both": ["set", "epoch=77", "a[0]=5"],
}


def sample() -> dict[str, Any]:
    """What every edit has something to do to."""
    shared = torch.zeros(3)
    return {"a": torch.ones(4), "b": torch.ones(4), "c": shared, "d": shared, "e": torch.ones(99)[:2], "epoch": 1}


@FORMATS
@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_reports_the_stable_shape_and_a_dry_run_the_same_numbers(
    tmp_path: Path, ckpt: Ckpt, edit: str, is_zip: bool
) -> None:
    path, out = saved(tmp_path / "a.pt", sample(), is_zip=is_zip), tmp_path / "out.pt"
    before = path.read_bytes()
    command, *rest = EDITS[edit]
    for more, target in (["-o", out], out), ([], path):
        done = edited_as_told(ckpt, command, path, *rest, *more)
        assert (done["path"], done["output"], done["in_place"]) == (str(path), str(target), not more)
        if not done["patched"]:
            assert done["bytes_written"] == target.stat().st_size
        assert (path.read_bytes() == before) == bool(more)
    assert load(out).keys() == load(path).keys()


@FORMATS
@pytest.mark.parametrize("edit", EDITS)
def test_a_backup_is_the_old_file(tmp_path: Path, ckpt: Ckpt, edit: str, is_zip: bool) -> None:
    path = saved(tmp_path / "a.pt", sample(), is_zip=is_zip)
    os.chmod(path, 0o640)
    before = path.read_bytes()
    command, *rest = EDITS[edit]
    answer = ckpt(command, path, *rest, "--backup")
    assert answer.code == 0
    assert "the old file is" in answer.err
    assert (tmp_path / "a.pt.bak").read_bytes() == before
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == [".a.pt.bak.ckpt-undo", "a.pt", "a.pt.bak"]


@pytest.mark.parametrize(
    "edit", [["rm", "a"], ["rename", "a", "x"], ["set", "a[0]=5"], ["set", "epoch=5"], ["convert"], ["show", "a"]]
)
def test_an_output_is_a_regular_file_and_has_a_name(tmp_path: Path, ckpt: Ckpt, edit: list[str]) -> None:
    path, pipe = saved(tmp_path / "a.pt", sample()), tmp_path / "pipe"
    before = path.read_bytes()
    os.mkfifo(pipe)
    option = [] if edit[0] == "convert" else ["-o"]
    for more in ([], ["-n"]) if edit[0] != "show" else ([],):
        to = ["--to", "pt", "--force"] if edit[0] == "convert" else []
        answer = ckpt(edit[0], path, *edit[1:], *to, *more, *option, pipe)
        assert (answer.code, "is not a regular file" in answer.err) == (2, True), answer.err
        assert pipe.is_fifo()
        answer = ckpt(edit[0], path, *edit[1:], *to, *more, *option, "")
        assert (answer.code, "empty name" in answer.err) == (2, True), answer.err
    assert "empty name" in ckpt("convert", path, "", "--to", "hf", "--force").err
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "pipe"]


def test_an_edit_through_a_link_replaces_what_it_points_to(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "real").mkdir()
    path = saved(tmp_path / "real" / "a.pt", sample())
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    assert ckpt("rename", link, "a", "x").code == 0
    assert link.is_symlink()
    assert "x" in load(path)
    out = tmp_path / "out.pt"
    out.symlink_to(tmp_path / "real" / "new.pt")
    assert ckpt("rename", link, "x", "a", "-o", out).code == 0
    assert out.is_symlink()
    assert "a" in load(tmp_path / "real" / "new.pt")


def test_a_blob_of_the_hub_is_not_rewritten(tmp_path: Path, ckpt: Ckpt) -> None:
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    saved(blob, sample())
    link = tmp_path / "model.pt"
    link.symlink_to(blob)
    before = blob.read_bytes()
    for arguments in (["rename", link, "a", "x"], ["set", link, "epoch=12345678901"], ["meta", link, "a=b"]):
        answer = ckpt(*arguments)
        assert (answer.code, "hash of its content" in answer.err) == (2, True)
    assert ckpt("rename", link, "a", "x", "-o", blob).code == 2
    assert blob.read_bytes() == before


def test_a_folder_that_may_not_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    """As another user, as root may write everywhere."""
    folder = tmp_path / "closed"
    folder.mkdir()
    path = saved(folder / "a.pt", sample())
    os.chmod(folder, 0o555)
    for at in (tmp_path, *tmp_path.parents):
        if at.owner() == path.owner() and at != Path("/"):
            at.chmod(at.stat().st_mode | 0o555)
    other = saved(tmp_path / "other.pt", sample())
    code = (
        "import os, sys\n"
        "from ckpt_cli.cli.main import run\n"
        "path, other, command, *rest = sys.argv[1:]\n"
        "assert run([command, other, *rest]) == 0\n"  # which imports what that user may not read
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "sys.stderr.write('then\\n')\n"
        "sys.exit(run([command, path, *rest]))"
    )
    for arguments in (["rename", "a", "x"], ["set", "--new", "note=1"]):
        call = [sys.executable, "-c", code, str(path), str(other), *arguments]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        told = done.stderr.partition("then\n")[2]
        assert told.startswith("ckpt: ")
        assert "Permission denied" in told
        assert len(told.splitlines()) <= 2
    assert os.listdir(folder) == ["a.pt"]


def test_names_of_a_map_may_be_many(tmp_path: Path, ckpt: Ckpt) -> None:
    count = 4000
    path = saved(tmp_path / "a.pt", {f"layer.{number}.w": number for number in range(count)})
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"layer.{number}.w": f"block.{number}.weight" for number in range(count)}))
    assert ckpt("rename", path, "--map", names).code == 0
    assert list(load(path)) == [f"block.{number}.weight" for number in range(count)]


# --- folders of one file ---------------------------------------------------------------------------------------------

FOLDED = pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])


@FOLDED
@pytest.mark.parametrize("edit", ["rename", "rm", "keep", "cast", "tie", "untie"])
def test_the_one_file_of_a_folder_is_edited_as_if_it_were_named(
    tmp_path: Path, ckpt: Ckpt, name: str, edit: str
) -> None:
    source, folder = saved(tmp_path / "a.pt", {**sample(), "epoch": torch.ones(1)}), tmp_path / "folder"
    folder.mkdir()
    assert ckpt("convert", source, folder / name).code == 0
    (folder / name).chmod(0o640)
    single = Path(shutil.copy(folder / name, tmp_path / name))
    done = []
    for path in (single, folder):
        command, *rest = EDITS[edit]
        arguments = [command, path, *rest]
        assert ckpt(*arguments, "-o", tmp_path / f"{path.name}.out").code == 0
        assert ckpt(*arguments, "-n").code == 0
        answer = ckpt(*arguments, "--backup", "--json")
        assert answer.code == 0, answer.err
        done.append({key: value for key, value in json.loads(answer.out).items() if isinstance(value, int | list)})
    assert {**done[1], "backups": 1} == {**done[0], "backups": 1}
    assert sorted(os.listdir(folder)) == [f".{name}.bak.ckpt-undo", name, f"{name}.bak"]
    assert (folder / name).read_bytes() == single.read_bytes()
    assert (folder / name).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder.out").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder.out").read_bytes() == (tmp_path / f"{name}.out").read_bytes()


@FOLDED
def test_the_one_file_of_a_folder_is_no_output_and_stays_in_its_cache(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    source, folder, blobs = saved(tmp_path / "a.pt", sample()), tmp_path / "folder", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    blob = blobs / ("ab" * 32)
    assert ckpt("convert", source, folder / name, "--tensors-only").code == 0
    (folder / name).rename(blob)
    before = blob.read_bytes()
    (folder / name).symlink_to(blob)
    for edit in (["rm", folder, "a"], ["cast", folder, "float16"], ["set", folder, "a[0]=7"]):
        for dry in ([], ["-n"]):
            assert "name is the hash of its content" in ckpt(*edit, *dry).err
    (folder / name).unlink()
    shutil.copy(blob, folder / name)
    for edit in (["rm", folder, "a", "-o"], ["set", folder, "a[0]=7", "-o"], ["convert", folder, "--force"]):
        answer = ckpt(*edit, folder / name)
        assert (answer.code, "the output is the file itself" in answer.err) == (2, True)
    assert blob.read_bytes() == (folder / name).read_bytes() == before
