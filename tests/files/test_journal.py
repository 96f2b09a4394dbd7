"""The journal: applied, recovered, refused."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from ckpt_cli.errors import CkptError, RefusedError
from ckpt_cli.files.hidden_files import journal_path
from ckpt_cli.files.journal import apply as journal
from ckpt_cli.files.journal import log as journal_log
from ckpt_cli.files.journal.pointer import is_name_below
from ckpt_cli.files.patches import Overlay
from ckpt_cli.files.source import LocalFile

OLD = bytes(range(256)) * 8
NEW = OLD[:10] + b"changed" + OLD[17:1500] + b"here too" + OLD[1508:]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A file with the old content."""
    (tmp_path / "a.pt").write_bytes(OLD)
    return str(tmp_path / "a.pt")


def overlay_of(path: str) -> Overlay:
    """Two patches that make the new content of it."""
    overlay = Overlay([LocalFile(path, write=True)])
    overlay.write(overlay.files[0], 10, b"changed")
    overlay.write(overlay.files[0], 1500, b"here too")
    return overlay


def complete_journal(path: str) -> bytes:
    """The journal of the edit as it stands before the first patch."""
    kept: list[bytes] = []

    def keep(*_: Any) -> None:
        kept.append(Path(journal_path(path)).read_bytes())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "write_patches", keep)
        with pytest.raises(KeyboardInterrupt):
            journal.apply(overlay_of(path))
    return kept[0]


def content(path: str) -> bytes:
    """What the file holds."""
    return Path(path).read_bytes()


def test_apply_writes_the_patches_and_leaves_no_journal(path: str) -> None:
    written = journal.apply(overlay_of(path))
    assert content(path) == NEW
    assert os.listdir(os.path.dirname(path)) == ["a.pt"]
    assert 15 < written < 400


def test_an_empty_overlay_touches_nothing(path: str) -> None:
    before = os.stat(path).st_mtime_ns
    assert journal.apply(Overlay([LocalFile(path, write=True)])) == 0
    assert os.stat(path).st_mtime_ns == before


def test_an_interrupted_apply_puts_the_old_bytes_back(path: str) -> None:
    complete_journal(path)
    assert content(path) == OLD
    assert os.listdir(os.path.dirname(path)) == ["a.pt"]


def test_recover_finishes_a_complete_journal_whatever_was_written_of_it(path: str) -> None:
    log = complete_journal(path)
    for part in (OLD[:10] + b"chan" + OLD[14:], OLD[:10] + b"changed" + OLD[17:], NEW):
        Path(journal_path(path)).write_bytes(log)
        Path(path).write_bytes(part)
        assert journal.recover(path)
        assert content(path) == NEW
        assert not os.path.exists(journal_path(path))


def test_a_journal_of_which_nothing_was_written_yet_is_dropped(path: str) -> None:
    Path(journal_path(path)).write_bytes(complete_journal(path))
    assert not journal.recover(path)
    assert content(path) == OLD
    assert not os.path.exists(journal_path(path))


def test_a_journal_cut_short_anywhere_leaves_the_old_file(path: str) -> None:
    log = complete_journal(path)
    for length in range(len(log)):
        Path(journal_path(path)).write_bytes(log[:length])
        assert not journal.recover(path)
        assert content(path) == OLD
        assert not os.path.exists(journal_path(path))


def test_a_journal_with_a_wrong_byte_anywhere_is_never_half_applied(path: str) -> None:
    log = complete_journal(path)
    for place in range(len(log)):
        damaged = bytearray(log)
        damaged[place] ^= 0x41
        Path(path).write_bytes(OLD)
        Path(journal_path(path)).write_bytes(damaged)
        journal.recover(path)
        assert content(path) == OLD


@pytest.mark.parametrize("replaced", [OLD + b"more", b"x" * len(OLD)])
def test_a_journal_of_a_file_that_was_replaced_is_refused(path: str, replaced: bytes) -> None:
    log = complete_journal(path)
    Path(path).write_bytes(replaced)
    Path(journal_path(path)).write_bytes(log)
    with pytest.raises(RefusedError, match="replaced or changed since") as refused:
        journal.recover(path)
    assert journal_path(path) in (refused.value.hint or "")
    assert content(path) == replaced


def test_a_journal_cannot_reach_out_of_its_folder(path: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    victim, bait = tmp_path / "a.pt", inner / "b.pt"
    bait.write_bytes(OLD)
    log = complete_journal(path)
    _, length, _ = journal_log._HEAD.unpack_from(log)
    real = json.loads(log[journal_log._HEAD.size : journal_log._HEAD.size + length])
    named = [{**real["files"][0], "name": name} for name in ("b.pt", "../a.pt")]
    header = json.dumps({**real, "files": named}).encode()
    forged = journal_log._HEAD.pack(journal_log.MAGIC, len(header), zlib.crc32(header)) + header
    Path(journal_path(str(bait))).write_bytes(forged + log[journal_log._HEAD.size + length :])
    with pytest.raises(RefusedError, match="does not point back"):
        journal.recover(str(bait))
    assert victim.read_bytes() == OLD


@pytest.mark.parametrize("end", [b"a longer end than there was", b"shorter", b"", b"with zeros\0\0\0\0\0\0\0\0"])
@pytest.mark.parametrize("zeros", [b"", b"\0" * 40])
def test_a_file_becomes_longer_or_shorter_or_stays(
    path: str, monkeypatch: pytest.MonkeyPatch, *, end: bytes, zeros: bytes
) -> None:
    old = OLD[:2000] + b"the old end" + zeros
    new = OLD[:3] + b"changed" + OLD[10:2000] + end
    assert len({len(old), len(new)}) == 2

    def edit() -> int:
        with LocalFile(path, write=True) as file:
            overlay = Overlay([file])
            overlay.write(file, 3, b"changed")
            overlay.replace_end(file, 2000, end)
            assert overlay.read(file, 0, len(new)) == new
            return journal.apply(overlay)

    Path(path).write_bytes(old)
    edit()
    assert content(path) == new

    log: list[bytes] = []
    states: list[bytes] = []
    real = {name: getattr(os, name) for name in ("pwrite", "ftruncate", "fsync")}

    def noting(name: str) -> Any:
        def call(fd: int, *arguments: Any) -> Any:
            if os.path.exists(journal_path(path)) and os.path.samestat(os.fstat(fd), os.stat(path)):
                log[:] = [content(journal_path(path))]
                states.append(content(path))
            return real[name](fd, *arguments)

        return call

    Path(path).write_bytes(old)
    for name in real:
        monkeypatch.setattr(os, name, noting(name))
    edit()
    monkeypatch.undo()
    assert states[0] == old
    for state in {*states, new, *(state[:2001] for state in states)}:
        Path(journal_path(path)).write_bytes(log[0])
        Path(path).write_bytes(state)
        if min(len(old), len(new)) <= len(state):
            assert journal.recover(path) == (state != old)
            assert content(path) == (old if state == old else new)
        else:
            with pytest.raises(RefusedError):
                journal.recover(path)
            os.unlink(journal_path(path))


@pytest.mark.parametrize("end", [b"a longer end than there was", b"shorter"])
@pytest.mark.parametrize("step", ["pwrite", "ftruncate", "fsync"])
def test_an_end_that_cannot_be_replaced_is_the_old_one(
    path: str, monkeypatch: pytest.MonkeyPatch, *, end: bytes, step: str
) -> None:
    old = OLD[:2000] + b"the old end"
    Path(path).write_bytes(old)
    real = getattr(os, step)

    def failing(fd: int, *arguments: Any) -> Any:
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            monkeypatch.undo()
            raise OSError(errno.ENOSPC, "no space")
        return real(fd, *arguments)

    with LocalFile(path, write=True) as file:
        overlay = Overlay([file])
        overlay.replace_end(file, 2000, end)
        monkeypatch.setattr(os, step, failing)
        with pytest.raises(OSError, match="no space"):
            journal.apply(overlay)
    assert content(path) == old
    assert not os.path.exists(journal_path(path))


def pair_of(folder: Path) -> tuple[list[str], Overlay]:
    """Three files, and patches of the first and the last of them."""
    paths = [str(folder / name) for name in ("a.pt", "b.json", "c.pt")]
    for path in paths:
        Path(path).write_bytes(OLD)
    overlay = Overlay([LocalFile(path, write=True) for path in paths])
    overlay.write(overlay.files[2], 1500, b"here too")
    overlay.write(overlay.files[0], 10, b"changed")
    return paths, overlay


NEW_PAIR = [OLD[:10] + b"changed" + OLD[17:], OLD, OLD[:1500] + b"here too" + OLD[1508:]]


def test_several_files_are_patched_under_one_journal(tmp_path: Path) -> None:
    paths, overlay = pair_of(tmp_path)
    journal.apply(overlay)
    assert [content(path) for path in paths] == NEW_PAIR
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.json", "c.pt"]


@pytest.mark.parametrize("opened", [0, 2])
@pytest.mark.parametrize("patched", [0, 1])
def test_an_edit_of_several_is_finished_from_whichever_is_opened(tmp_path: Path, opened: int, patched: int) -> None:
    paths, overlay = pair_of(tmp_path)
    kept: dict[str, bytes] = {}
    real = journal.write_patches

    def stop(overlay: Overlay, file: LocalFile, target: LocalFile) -> None:
        if len(kept) == patched:
            kept.update({log: content(log) for log in map(str, tmp_path.glob(".*"))})
            raise KeyboardInterrupt
        kept[os.path.basename(file.path)] = b""
        real(overlay, file, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "write_patches", stop)
        with pytest.raises(KeyboardInterrupt):
            journal.apply(overlay)
    for file in overlay.files:
        file.close()
    for log, held in kept.items():
        if log.startswith("/"):
            Path(log).write_bytes(held)
    if patched:
        Path(paths[0]).write_bytes(NEW_PAIR[0])
    assert journal.recover(paths[opened]) == bool(patched)  # what was not begun is dropped
    assert [content(path) for path in paths] == (NEW_PAIR if patched else [OLD] * 3)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.json", "c.pt"]


def test_a_pointer_without_its_journal_is_removed_and_nothing_else_done(tmp_path: Path) -> None:
    paths, overlay = pair_of(tmp_path)
    for file in overlay.files:
        file.close()
    Path(journal_path(paths[2])).write_bytes(b"ckpt-journal-of\na.pt")
    assert not journal.recover(paths[2])
    Path(journal_path(paths[2])).write_bytes(b"ckpt-journal-of\ngone.pt")
    assert not journal.recover(paths[2])
    Path(journal_path(paths[2])).write_bytes(b"ckpt-journal-")
    assert not journal.recover(paths[2])
    assert [content(path) for path in paths] == [OLD] * 3
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.json", "c.pt"]


def overlay_over(folder: Path, *names: str) -> Overlay:
    """An overlay that changes the first byte of files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(OLD)
    overlay = Overlay([LocalFile(str(folder / name), write=True) for name in names])
    for file in overlay.files:
        overlay.write(file, 0, b"x")
    return overlay


def test_files_of_a_folder_in_another_are_patched_as_one(tmp_path: Path) -> None:
    names = ("other/c.pt", "a.pt", "more/d.pt")
    overlay = overlay_over(tmp_path, *names)
    journal.apply(overlay)
    assert all((tmp_path / name).read_bytes() == b"x" + OLD[1:] for name in names)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.pt", "c.pt", "d.pt"]


@pytest.mark.parametrize("names", [("a.pt", "b/c/d.pt"), ("a/x.pt", "b/y.pt")])
def test_files_further_apart_are_not_patched_as_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    overlay = overlay_over(tmp_path, *names)
    with pytest.raises(RefusedError, match="several folders"):
        journal.apply(overlay)
    assert all((tmp_path / name).read_bytes() == OLD for name in names)


@pytest.mark.parametrize("name", ["../a.pt", "b/../../a.pt", "link/a.pt", "/a.pt", "b/c/a.pt", ""])
def test_a_journal_names_no_file_that_is_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path)
    assert not is_name_below(name, str(tmp_path))
    assert is_name_below("b/a.pt", str(tmp_path))


@pytest.mark.parametrize("failing", ["fsync", "pwrite"])
def test_an_error_while_writing_puts_the_old_bytes_back(
    path: str, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    overlay = overlay_of(path)
    real = getattr(os, failing)
    calls = 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += args[0] == overlay.files[0].fd
        if calls == 1 and args[0] == overlay.files[0].fd:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        journal.apply(overlay)
    assert content(path) == OLD
    assert os.listdir(os.path.dirname(path)) == ["a.pt"]


def test_a_file_that_may_not_be_written_says_that_an_edit_must_be_finished(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(journal_path(path)).write_bytes(complete_journal(path))
    real = os.open

    def open_read_only(name: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_read_only)
    with pytest.raises(CkptError, match="an interrupted edit must be finished"):
        journal.recover(path)
