"""An interrupted edit is never applied to a file that was saved again since."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from contract import write_shards
from killing import killed_at
from safetensors.torch import load_file, save_file

from ckpt_cli.cli.main import run
from ckpt_cli.errors import RefusedError
from ckpt_cli.files.hidden_files import journal_path, temporary_path
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.journal import log as journal_log
from ckpt_cli.files.journal import replace as replace_set
from ckpt_cli.files.journal.pointer import write_pointer
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile

OLD = bytes(range(256)) * 4096
NEW = OLD[:10] + b"changed" + OLD[17:500_000] + b"here too" + OLD[500_008:]
HALF = OLD[:10] + b"changed" + OLD[17:]


def edit(paths: list[Path]) -> None:
    """Patch two ranges of each file."""
    files = [LocalFile(str(path), write=True) for path in paths]
    try:
        overlay = Overlay(files)
        for file in files:
            overlay.write(file, 10, b"changed")
            overlay.write(file, 500_000, b"here too")
        journal.apply(overlay)
    finally:
        for file in files:
            file.close()


def half_edited(folder: Path, names: tuple[str, ...] = ("a.pt",), *, writes: int = 3) -> list[Path]:
    """Files whose edit was killed at one of its writes: the first ones are of the pointers and of the journal."""
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(OLD)
    with killed_at("pwrite", writes):
        edit(paths)
    return paths


@pytest.mark.parametrize("fsync", range(1, 6))
def test_a_file_that_replaced_a_half_edited_one_keeps_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: int
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.full((4, 4), 1.0), "b": torch.zeros(4)}, "m.safetensors")
    save_file({"w": torch.full((4, 4), 2.0), "b": torch.zeros(4)}, "new")
    new = Path("new").read_bytes()
    with killed_at("fsync", fsync):
        run(["set", "m.safetensors", "b=7"])
    os.replace("new", "m.safetensors")
    run(["ls", "m.safetensors"])
    assert Path("m.safetensors").read_bytes() == new


def test_a_half_edited_file_that_nobody_touched_is_completed(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    assert path.read_bytes() == HALF
    assert journal.recover(str(path))
    assert path.read_bytes() == NEW


def test_a_replaced_file_is_refused_even_if_its_bytes_are_those_of_the_half_edited_one(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    (tmp_path / "copy").write_bytes(HALF)
    os.replace(tmp_path / "copy", path)
    with pytest.raises(RefusedError, match="replaced or changed since") as refused:
        journal.recover(str(path))
    assert f"rm '{journal_path(str(path))}'" in (refused.value.hint or "")
    assert path.read_bytes() == HALF


@pytest.mark.parametrize("changed_at", [0, 20, 400_000, len(OLD) - 1])
def test_a_file_that_was_saved_again_in_place_is_refused(tmp_path: Path, changed_at: int) -> None:
    (path,) = half_edited(tmp_path)
    saved = bytearray(HALF)
    saved[max(changed_at - 9000, 0) : changed_at + 9000] = b"x" * len(
        saved[max(changed_at - 9000, 0) : changed_at + 9000]
    )
    saved[10:17], saved[500_000:500_008] = NEW[10:17], OLD[500_000:500_008]  # as if it were half patched
    path.write_bytes(saved)
    with pytest.raises(RefusedError, match="replaced or changed since"):
        journal.recover(str(path))
    assert path.read_bytes() == saved


def test_an_old_copy_that_was_put_back_with_its_time_is_refused(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    path.write_bytes(HALF)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    with pytest.raises(RefusedError):
        journal.recover(str(path))
    assert path.read_bytes() == HALF


def test_old_bytes_that_were_put_back_in_place_stay(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    path.write_bytes(OLD)
    assert not journal.recover(str(path))
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_copy_of_the_whole_folder_is_completed(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    half_edited(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)
    assert journal.recover(str(tmp_path / "there" / "a.pt"))
    assert (tmp_path / "there" / "a.pt").read_bytes() == NEW


@pytest.mark.parametrize("saved", [0, 1])
def test_the_other_files_of_an_edit_are_put_back_where_one_was_saved_again(tmp_path: Path, saved: int) -> None:
    paths = half_edited(tmp_path, ("a.pt", "b.pt"), writes=6)
    assert [path.read_bytes() for path in paths] == [NEW, HALF]
    (tmp_path / "new").write_bytes(b"n" * len(OLD))
    os.replace(tmp_path / "new", paths[saved])
    for path in paths:
        with pytest.raises(RefusedError, match=f"{paths[saved].name}: a journal") as refused:
            journal.recover(str(path))
        assert list(refused.value.details) == [f"{paths[1 - saved]} is as it was before the edit"]
    assert paths[saved].read_bytes() == b"n" * len(OLD)
    assert paths[1 - saved].read_bytes() == OLD
    Path(journal_path(str(paths[0]))).unlink()  # as the hint says
    assert not any(journal.recover(str(path)) for path in paths)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


@pytest.mark.parametrize("gone", [0, 1])
def test_the_other_file_is_put_back_where_one_is_gone(tmp_path: Path, gone: int) -> None:
    paths = half_edited(tmp_path, ("a.pt", "b.pt"), writes=6)
    paths[gone].unlink()
    assert not journal.recover(str(paths[1 - gone]))
    assert paths[1 - gone].read_bytes() == OLD
    assert os.listdir(tmp_path) == [paths[1 - gone].name]


def as_version_1(log: Path) -> None:
    """Write a journal of patches as the version before did, without identities."""
    data = log.read_bytes()
    _, length, _ = journal_log._HEAD.unpack_from(data)
    begin = journal_log._HEAD.size
    files = json.loads(data[begin : begin + length])["files"]
    header = json.dumps(
        {"files": [{key: each[key] for key in ("name", "size", "new_size")} for each in files]}
    ).encode()
    head = journal_log._HEAD.pack(b"ckpt-journal-1\n\0", len(header), zlib.crc32(header))
    log.write_bytes(head + header + data[begin + length :])


def test_a_journal_of_the_version_before_completes_a_half_edited_file(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    as_version_1(Path(journal_path(str(path))))
    assert journal.recover(str(path))
    assert path.read_bytes() == NEW


def test_a_journal_of_the_version_before_leaves_a_file_with_the_old_bytes_in_its_ranges_alone(tmp_path: Path) -> None:
    (path,) = half_edited(tmp_path)
    as_version_1(Path(journal_path(str(path))))
    saved = b"y" * 10 + OLD[10:17] + b"y" * (500_000 - 17) + OLD[500_000:500_008] + b"y" * (len(OLD) - 500_008)
    path.write_bytes(saved)
    assert not journal.recover(str(path))
    assert path.read_bytes() == saved


def half_replaced(folder: Path) -> list[Path]:
    """Two files that were to be replaced as one, of which one was when the process was killed."""
    paths = [folder / "a", folder / "b"]
    for path in paths:
        path.write_bytes(b"old")
        os.utime(path, (1_000_000_000, 1_000_000_000))
    with killed_at("replace", 2), replace_set.replacing_set(str(folder), "a") as work:
        for path in paths:
            os.pwrite(work.create(path.name).fd, b"new", 0)
    assert [path.read_bytes() for path in paths] == [b"new", b"old"]
    return paths


def test_a_half_replaced_set_is_completed(tmp_path: Path) -> None:
    paths = half_replaced(tmp_path)
    assert journal.recover(str(paths[1]))
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_of_a_set_that_was_saved_again_is_not_replaced(tmp_path: Path, *, in_place: bool) -> None:
    paths = half_replaced(tmp_path)
    if not in_place:
        paths[1].unlink()
    paths[1].write_bytes(b"own")
    for path in paths:
        with pytest.raises(RefusedError, match=r"b: a journal .* saved again since"):
            journal.recover(str(path))
    assert [path.read_bytes() for path in paths] == [b"new", b"own"]


def test_a_file_of_a_set_that_was_saved_again_after_it_was_replaced_keeps_its_bytes(tmp_path: Path) -> None:
    paths = half_replaced(tmp_path)
    paths[0].write_bytes(b"own")
    assert journal.recover(str(paths[0]))
    assert [path.read_bytes() for path in paths] == [b"own", b"new"]


def test_new_content_that_was_removed_is_missed(tmp_path: Path) -> None:
    paths = half_replaced(tmp_path)
    Path(temporary_path(str(paths[1]))).unlink()
    with pytest.raises(RefusedError, match=r"b: .* the new content of this one is gone"):
        journal.recover(str(paths[1]))
    assert paths[1].read_bytes() == b"old"


@pytest.mark.parametrize("saved", [True, False])
def test_a_set_journal_of_the_version_before_goes_by_times(tmp_path: Path, *, saved: bool) -> None:
    paths = half_replaced(tmp_path)
    log = Path(journal_path(str(paths[0])))
    raw = json.dumps({"replace": ["a", "b"], "remove": []}).encode()
    log.write_bytes(replace_set._HEAD.pack(b"ckpt-replace-1\n\0", len(raw), zlib.crc32(raw)) + raw)
    if saved:
        paths[1].write_bytes(b"own")
        os.utime(paths[1], (4_000_000_000, 4_000_000_000))
        with pytest.raises(RefusedError, match="saved again since"):
            journal.recover(str(paths[1]))
    else:
        assert journal.recover(str(paths[1]))
    assert [path.read_bytes() for path in paths] == [b"new", b"own" if saved else b"new"]


@pytest.mark.parametrize("raw", [b"[]", b"{}", b'{"replace": 1, "remove": []}', b'{"replace": [{}], "remove": [3]}'])
def test_a_set_journal_that_no_ckpt_wrote_replaces_nothing(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a").write_bytes(b"old")
    head = replace_set._HEAD.pack(replace_set.MAGIC, len(raw), zlib.crc32(raw))
    Path(journal_path(str(tmp_path / "a"))).write_bytes(head + raw)
    assert not journal.recover(str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_pointer_leads_to_no_file_that_was_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"a": torch.zeros(4), "b": torch.zeros(4)}
    write_shards(state, tmp_path / "shards")
    with killed_at("pwrite", 6):
        run(["set", "shards", "a=7", "b=7"])
    shards = sorted(path for path in Path("shards").iterdir() if path.suffix in (".bin", ".safetensors"))
    for path in shards:
        shutil.copy(path, "saved")
        data = bytearray(Path("saved").read_bytes())
        data[-1] ^= 1
        Path("saved").write_bytes(data)
        os.replace("saved", path)
    before = {path: path.read_bytes() for path in shards}
    assert run(["ls", "shards"]) == 2
    assert {path: path.read_bytes() for path in shards} == before


def test_a_journal_of_another_users_neighbour_does_not_patch_our_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = half_edited(tmp_path, ("evil.pt", "ours.pt"), writes=6)
    assert Path(journal_path(str(paths[1]))).exists()
    real = os.fstat
    ours = os.stat(paths[1]).st_ino

    def fstat(fd: int) -> os.stat_result:
        found = real(fd)
        uid = 1000 if found.st_ino == ours else 12345
        return os.stat_result((*found[:4], uid, *found[5:10]), {"st_mtime_ns": found.st_mtime_ns})

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(RefusedError, match="another user"):
        journal.recover(str(paths[1]))
    assert [path.read_bytes() for path in paths] == before


def test_names_that_only_a_pointer_holds_are_found(tmp_path: Path) -> None:
    write_pointer(str(tmp_path / "b"), str(tmp_path / "a"))
    assert journal.target_of(journal_path(str(tmp_path / "b"))) == "b"


def test_a_killed_edit_of_a_checkpoint_is_completed_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.zeros(4), "b": torch.zeros(4)}, "m.safetensors")
    with killed_at("pwrite", 3):
        run(["set", "m.safetensors", "b=7", "w=7"])
    assert run(["ls", "m.safetensors"]) == 0
    assert {name: float(tensor[0]) for name, tensor in load_file("m.safetensors").items()} == {"w": 7.0, "b": 7.0}
