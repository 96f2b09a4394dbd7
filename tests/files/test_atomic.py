"""New files: all or nothing, with the right permissions, holes and content."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_cli.errors import BusyError, FormatError, RefusedError, TruncatedError
from ckpt_cli.files import copy as copying
from ckpt_cli.files.atomic import refuse_cached, replacing, replacing_folder
from ckpt_cli.files.copy import copy_into
from ckpt_cli.files.hidden_files import temporary_path
from ckpt_cli.files.journal import replace as replace_set
from ckpt_cli.files.open import Opener
from ckpt_cli.files.source import LocalFile
from tests.support.counting import counted_reads


def write(target: Path, content: bytes, **options: Any) -> None:
    """Write a file through `replacing`."""
    with replacing(str(target), **options) as file:
        os.write(file.fd, content)


def test_a_file_appears_whole_and_keeps_the_permissions_of_what_it_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write(target, b"first")
    target.chmod(0o640)
    write(target, b"second")
    assert target.read_bytes() == b"second"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_takes_the_permissions_of_its_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"")
    model.chmod(0o604)
    write(tmp_path / "a", b"x", mode_of=str(model))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o604


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(str(target)) as file:
            os.write(file.fd, b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("create", [replacing, replacing_folder])
@pytest.mark.parametrize("call", ["open", "flock", "fstat", "lstat"])
def test_an_interrupt_while_it_is_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Any, call: str
) -> None:
    holder = fcntl if call == "flock" else os
    real = getattr(holder, call)

    def interrupted(*arguments: Any) -> Any:
        done = real(*arguments)
        monkeypatch.setattr(holder, call, real)
        if call == "open":
            os.close(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(holder, call, interrupted)
    with pytest.raises(KeyboardInterrupt), create(str(tmp_path / "a")):
        pass
    assert os.listdir(tmp_path) == []
    with create(str(tmp_path / "a")):
        pass
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    Path(temporary_path(str(tmp_path / "a"))).write_bytes(b"half of something longer")
    write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_target_that_another_process_writes_is_busy(tmp_path: Path) -> None:
    with open(temporary_path(str(tmp_path / "a")), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            write(tmp_path / "a", b"new")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=8), st.booleans())
def test_a_copy_has_every_byte_and_keeps_holes(pieces: list[tuple[bool, int]], in_kernel: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not in_kernel:
            patch.delattr(os, "copy_file_range")
        patch.setattr(copying, "CHUNK", 10_000)
        source = Path(folder) / "source"
        with source.open("wb") as file:
            for is_data, count in pieces:
                if is_data:
                    file.write(os.urandom(4096 * count))
                else:
                    file.seek(65536 * count, os.SEEK_CUR)
            file.truncate()
        with LocalFile(str(source)) as opened, replacing(f"{folder}/copy") as target:
            copy_into(opened, target)
        copy = Path(folder) / "copy"
        assert copy.read_bytes() == source.read_bytes()
        assert copy.stat().st_blocks <= source.stat().st_blocks + 8


@pytest.mark.parametrize(
    "place",
    [
        "hub/models--a--b/blobs/" + "0a" * 32,
        "hub/models--a--b/blobs/" + "0a" * 20,
        ".git/annex/objects/xx/yy/SHA256E-s1--aa/SHA256E-s1--aa",
        ".dvc/cache/files/md5/ab/" + "0" * 30,
        ".git/lfs/objects/aa/bb/" + "0a" * 32,
    ],
)
def test_a_file_whose_name_is_the_hash_of_its_content_is_not_edited(tmp_path: Path, place: str) -> None:
    blob = tmp_path / place
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"content")
    link = tmp_path / "model.pt"
    link.symlink_to(blob)
    for path in (link, blob):
        with pytest.raises(RefusedError) as refused:
            refuse_cached(str(path))
        assert "-o OUT" in (refused.value.hint or "")
    assert refuse_cached(str(tmp_path / "blobs.pt")) == os.path.realpath(tmp_path / "blobs.pt")


def test_a_local_file_reads_just_the_ranges_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted_reads(monkeypatch)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with LocalFile(str(tmp_path / "a")) as file:
        assert file.read(10, 5) == bytes(range(10, 15))
        assert bytes(file.view(98, 2)) == b"bc"
        assert sum(counts) == 7
        for offset, nbytes in ((99, 2), (-1, 1), (0, 101), (1 << 62, 1 << 62)):
            with pytest.raises(TruncatedError):
                file.read(offset, nbytes)
            with pytest.raises(TruncatedError):
                file.view(offset, nbytes)


def test_a_large_view_is_mapped_and_outlives_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted_reads(monkeypatch)
    with (tmp_path / "a").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(2 << 20)
        file.write(b"x")
    with LocalFile(str(tmp_path / "a")) as opened:
        view = opened.view(100, 3 * 2**20 - 100)
        assert counts == []
    assert view[2 * 2**20 - 100] == ord("x")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="not a regular file"):
        LocalFile(str(tmp_path / "pipe"))
    with pytest.raises(FormatError, match="not a regular file"):
        LocalFile("/dev/null")
    with pytest.raises(IsADirectoryError):
        LocalFile(str(tmp_path))


def test_what_a_set_is_finished_from_stays_while_its_journal_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(replace_set, "remove_journal", fail)
    monkeypatch.setattr(replace_set, "sync_folder", _failing_at(2, replace_set.sync_folder, fail))
    with pytest.raises(OSError, match="Input/output"):
        _replace_both(tmp_path)
    monkeypatch.undo()
    open_to_finish = Opener().open_all([str(tmp_path / "b")])
    for file in open_to_finish:
        file.close()
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {"a": b"new", "b": b"new"}


def _replace_both(folder: Path) -> None:
    with replace_set.replacing_set(str(folder), "a") as work:
        for name in ("a", "b"):
            os.pwrite(work.create(name).fd, b"new", 0)


def _failing_at(call: int, real: Callable[[str], None], fail: Callable[[], None]) -> Callable[[str], None]:
    """A function that fails when it is called for the so-manieth time."""
    calls = iter(range(1, 100))

    def either(folder: str) -> None:
        (fail if next(calls) == call else lambda: real(folder))()

    return either
