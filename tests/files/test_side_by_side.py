"""Readers beside writers: they wait, read again, or say that a file changed; they never call it broken."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from contract import write_shards
from safetensors.torch import save_file
from side_by_side import problems_of

import ckpt_cli
from ckpt_cli.errors import BusyError, ChangedError
from ckpt_cli.files import lock as locks
from ckpt_cli.files import open as opened
from ckpt_cli.files import unchanged as reading
from ckpt_cli.files.atomic import locked_temporary
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint


def nested() -> dict[str, object]:
    """Tensors below `model`, and one beside them."""
    return {"model": {"a": torch.zeros(9), "b": torch.zeros(300)}, "still": torch.zeros(5000)}


def flat() -> dict[str, torch.Tensor]:
    """The same, as a state_dict."""
    return {"model.a": torch.zeros(9), "model.b": torch.zeros(300), "still": torch.zeros(5000)}


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors", "shards"])
def test_100_rounds_of_set_rename_ls_and_show_side_by_side_fail_nowhere(here: Path, container: str) -> None:
    path = here / "m"
    if container == "safetensors":
        save_file(flat(), path)
    elif container == "shards":
        path.mkdir()
        shards = {name: f"model-0000{1 + (name == 'still')}-of-00002.safetensors" for name in flat()}
        for shard in set(shards.values()):
            save_file({name: flat()[name] for name in shards if shards[name] == shard}, path / shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    else:
        torch.save(nested(), path, _use_new_zipfile_serialization=container == "zip")
    assert problems_of(path, 25) == []


@contextmanager
def written(path: str) -> Iterator[int]:
    """Have a file locked as a writer does, by a descriptor that is not known to be this process's own."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do something on another thread."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for others for a short time only."""
    for module in (locks, reading, opened):
        monkeypatch.setattr(module, "PATIENCE", 0.5)


@pytest.mark.usefixtures("patience")
def test_a_reader_waits_for_a_writer_that_patches_and_says_so_at_last(work: Path, ckpt: Ckpt) -> None:
    (work / ".mlp.pt.ckpt-journal").touch()
    with written("mlp.pt"):
        answer = ckpt("ls", "mlp.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "ckpt: mlp.pt: another process is writing it; try again when it is done\n"


@pytest.mark.usefixtures("patience")
def test_a_reader_does_not_wait_for_a_writer_that_only_makes_a_new_file(work: Path, ckpt: Ckpt) -> None:
    expected = ckpt("ls", "mlp.pt")
    with written("mlp.pt"):
        assert ckpt("ls", "mlp.pt") == expected


@pytest.mark.usefixtures("patience")
def test_a_file_that_a_writer_changes_without_end_is_not_called_broken(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, size = LocalFile.read, os.stat(work / "mlp.pt").st_size
    sizes = itertools.cycle(range(size - 100, size))

    def read(file: LocalFile, offset: int, nbytes: int) -> bytes:
        os.truncate("mlp.pt", next(sizes))
        return real(file, offset, min(nbytes, size - 100 - offset))

    monkeypatch.setattr(LocalFile, "read", read)
    answer = ckpt("ls", "mlp.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "ckpt: mlp.pt: changed while it was read; try again\n"


def test_a_writer_waits_while_a_document_is_read_and_not_longer(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[bool] = []

    def is_free() -> bool:
        fd = os.open("mlp.pt", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    real = LocalFile.read

    def read(file: LocalFile, offset: int, nbytes: int) -> bytes:
        free.append(is_free())
        return real(file, offset, nbytes)

    monkeypatch.setattr(LocalFile, "read", read)
    with ckpt_cli.open("mlp.pt") as checkpoint:
        assert free
        assert not any(free)
        assert is_free()
        free.clear()
        checkpoint["0.weight"].numpy()
        assert all(free)
    assert ckpt("set", "mlp.pt", "2.bias=1").code == 0


def test_a_file_that_was_replaced_while_the_reader_waited_is_opened_again(work: Path) -> None:
    def replace() -> None:
        torch.save({"new": torch.ones(1)}, "other.pt")
        os.replace("other.pt", "mlp.pt")

    released = threading.Event()

    def hold() -> None:
        with written("mlp.pt"):
            released.wait(10)
            replace()

    with meanwhile(hold):
        timer = threading.Timer(0.05, released.set)
        timer.start()
        with ckpt_cli.open("mlp.pt") as checkpoint:
            names = list(checkpoint)
    assert names in (["new"], ["0.weight", "0.bias", "2.weight", "2.bias"])
    with ckpt_cli.open("mlp.pt") as checkpoint:
        assert list(checkpoint) == ["new"]


def test_this_process_reads_what_it_writes_itself_without_waiting(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda _: pytest.fail("it waits for itself"))
    with locked_temporary("out.pt") as target:
        os.pwrite(target.fd, (work / "mlp.pt").read_bytes(), 0)
        open_checkpoint(target.path).close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EACCES, errno.EIO])
def test_a_file_system_without_locks_is_read_all_the_same(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    expected = ckpt("ls", "mlp.pt")

    def refuse(_: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert ckpt("ls", "mlp.pt") == expected


def test_a_document_without_a_lock_is_read_again_where_the_file_changed(
    work: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "try_share", lambda _: None)
    real, first = LocalFile.read, [True]

    def read(file: LocalFile, offset: int, nbytes: int) -> bytes:
        if first and file.path == "mlp.pt":
            first.clear()
            os.utime("mlp.pt", ns=(1, 1))
            (work / "mlp.pt").write_bytes((work / "tied.pt").read_bytes())
        return real(file, offset, nbytes)

    expected = ckpt("ls", "tied.pt").out
    monkeypatch.setattr(LocalFile, "read", read)
    answer = ckpt("ls", "mlp.pt")
    assert (answer.code, answer.out) == (0, expected)


VALUES = {
    "show": ("show", "m.pt", "a"),
    "show --json": ("show", "m.pt", "--json"),
    "stats": ("stats", "m.pt"),
    "hash": ("hash", "m.pt"),
    "diff": ("diff", "m.pt", "other.pt"),
    "ties --equal": ("ties", "--equal", "m.pt"),
    "check --deep": ("check", "--deep", "m.pt"),
    "scan": ("scan", "m.pt"),
    "convert": ("convert", "m.pt", "out.npz"),
    "cast": ("cast", "m.pt", "float16", "-o", "out.pt"),
    "set": ("set", "m.pt", "b=1", "-o", "out.pt"),
}


@pytest.mark.parametrize("command", VALUES)
def test_a_command_that_reads_values_reads_them_again_or_says_that_they_changed(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Another process changes the file at the first read of a value, then at each one."""
    state = {"a": torch.arange(6000.0), "b": torch.arange(6000.0)}
    torch.save(state, "m.pt")
    torch.save(state, "other.pt")
    real = LocalFile.note_read
    times = [0]
    place = (here / "m.pt").read_bytes().index(torch.arange(6000.0).numpy().tobytes())

    def note_read(file: LocalFile) -> None:
        real(file)
        if file.path == "m.pt" and times[0]:
            times[0] -= 1
            with open("m.pt", "r+b") as other:
                other.seek(place + 8)
                other.write(b"\0\0\xe0\x40")
            os.utime("m.pt", ns=(times[0], times[0]))

    monkeypatch.setattr(LocalFile, "note_read", note_read)
    if command == "scan":
        real_open = reading.open_to_scan

        def open_to_scan(path: str) -> LocalFile:
            file = real_open(path)
            note_read(file)
            return file

        monkeypatch.setattr("ckpt_cli.ops.scan.open_to_scan", open_to_scan)
    if command in ("convert", "cast", "set"):  # may copy without a read
        real_check = reading.require_unchanged

        def check(files: Iterator[LocalFile]) -> None:
            files = list(files)
            for file in files:
                note_read(file)
            real_check(files)

        for module in ("convert", "transaction"):
            monkeypatch.setattr(f"ckpt_cli.edits.{module}.require_unchanged", check)
    arguments = VALUES[command]
    times[0] = 1
    assert ckpt(*arguments).err.count("changed while it was read") == 0
    for name in ("out.npz", "out.pt"):
        with suppress(FileNotFoundError):
            os.unlink(name)
    os.utime("m.pt", ns=(1, 1))
    times[0] = 10
    answer = ckpt(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "ckpt: m.pt: changed while it was read; try again\n"
    assert sorted(os.listdir()) == ["m.pt", "other.pt"]


def test_a_file_that_goes_to_another_process_is_the_one_that_was_opened(here: Path) -> None:
    torch.save(flat(), "m.pt")
    with LocalFile("m.pt") as file:
        sent = pickle.dumps(file)
    assert pickle.loads(sent).size == os.stat("m.pt").st_size
    torch.save(flat(), "n.pt")
    with LocalFile("n.pt") as file:
        sent = pickle.dumps(file)
    torch.save(flat(), "n.pt.new")
    os.replace("n.pt.new", "n.pt")
    with pytest.raises(ChangedError, match="changed while it was read"):
        pickle.loads(sent)


def test_a_set_whose_index_and_shards_are_replaced_while_it_is_opened_is_opened_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(flat(), here / "old")
    write_shards({f"new.{name}": tensor for name, tensor in flat().items()}, here / "new")
    real, first = LocalFile.__init__, [True]

    def opening(file: LocalFile, path: str, *, write: bool = False, follow: bool = True) -> None:
        if first and "-00001-of" in path:
            first.clear()
            for name in os.listdir(here / "new"):
                os.replace(here / "new" / name, here / "old" / name)
        real(file, path, write=write, follow=follow)

    monkeypatch.setattr(LocalFile, "__init__", opening)
    with ckpt_cli.open(here / "old") as checkpoint:
        assert sorted(checkpoint) == sorted(f"new.{name}" for name in flat())


def test_a_writer_that_finds_a_pointer_to_its_index_finishes_the_edit_first(here: Path, ckpt: Ckpt) -> None:
    """It has locked the index by then, and must not wait for itself."""
    write_shards(flat(), here / "m")
    index = next(name for name in os.listdir("m") if name.endswith(".json"))
    shard = json.loads((here / "m" / index).read_text())["weight_map"]["still"]
    (here / "m" / f".{shard}.ckpt-journal").write_bytes(b"ckpt-journal-of\n" + index.encode())
    answer = ckpt("set", "m", "still=1")
    assert (answer.code, answer.err.count("\n")) == (0, 2), answer
    assert not [name for name in os.listdir("m") if name.startswith(".")]


def test_a_busy_file_is_not_tried_again_without_end(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with written("mlp.pt"), pytest.raises(BusyError):
        open_checkpoint("mlp.pt", write=True)


def test_two_writers_take_turns_and_both_edits_stand(here: Path) -> None:
    torch.save({"w": torch.zeros(3, 2)}, "a.pt")
    calls = [[sys.executable, "-m", "ckpt_cli", "set", "a.pt", f"w[{row}]={row + 10}"] for row in range(3)]
    writers = [subprocess.Popen(call, stderr=subprocess.DEVNULL) for call in calls]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert torch.load("a.pt")["w"].eq(torch.tensor([10.0, 11.0, 12.0])[:, None]).all()


def test_values_that_are_printed_are_not_called_changed_by_an_edit_after_them(
    here: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.arange(6000.0)}, "m.pt")
    expected = ckpt("show", "m.pt", "a")
    real = reading.settle

    def settle(files: list[LocalFile]) -> None:
        real(files)
        os.utime("m.pt", ns=(1, 1))

    monkeypatch.setattr(reading, "settle", settle)
    assert ckpt("show", "m.pt", "a") == expected
