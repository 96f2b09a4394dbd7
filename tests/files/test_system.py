"""What only POSIX systems or Linux have: it stands in one file, and each fallback does the same."""

from __future__ import annotations

import ast
import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import other_system
import pytest

import ckpt_cli
from ckpt_cli.files import interrupts, system

PACKAGE = Path(ckpt_cli.__file__).parent

PORTABLE = {"O_RDONLY", "O_WRONLY", "O_RDWR"}
"""Flags that every system has."""

CALLS = {*other_system.CALLS, "fsync", "sync"}
"""Calls of `os` that only `files/system.py` makes: `fsync` as well, which is not enough on macOS."""


def uses(path: Path) -> Iterator[str]:
    """The modules and calls in a source file that other systems lack."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from {*named, *(alias.name for alias in node.names)} & {*other_system.MODULES, "msvcrt"}
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                yield from {alias.name for alias in node.names} & CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.attr
            is_flag = name.startswith("O_") and name not in PORTABLE
            if node.value.id == "os" and (name in CALLS or is_flag):
                yield f"os.{name}"
            elif (name.startswith("SIG") and name != "SIGINT") or name == "setitimer" or name.startswith("MADV_"):
                yield f"{node.value.id}.{name}"


def test_what_only_posix_or_linux_has_stands_in_one_file_and_signals_in_another() -> None:
    found = {str(path.relative_to(PACKAGE)): sorted(uses(path)) for path in sorted(PACKAGE.rglob("*.py"))}
    assert [path for path, names in found.items() if names] == ["files/interrupts.py", "files/system.py"]
    assert not [name for name in found["files/interrupts.py"] if name.startswith("os.")]
    assert "os.pread" in found["files/system.py"]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module on a system that has none of it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return other_system.load()


@pytest.fixture(params=["here", "elsewhere"])
def either(request: pytest.FixtureRequest, bare: Any) -> Any:
    """The module on this system, and on one that has none of it."""
    return system if request.param == "here" else bare


def test_ranges_are_read_and_written_where_they_are_asked_for(either: Any, tmp_path: Path) -> None:
    fd = either.open_file(str(tmp_path / "a"), write=True, create=True)
    either.write_all(fd, b"abcdef", 0)
    either.write_all(fd, memoryview(b"XY"), 3)
    buffer = bytearray(3)
    assert (either.read_at(fd, 4, 1), either.read_at(fd, 4, 4), either.read_at(fd, 4, 9)) == (b"bcXY", b"Yf", b"")
    assert (either.read_into_at(fd, memoryview(buffer), 2), bytes(buffer)) == (3, b"cXY")
    assert (either.read_into_at(fd, memoryview(buffer), 5), bytes(buffer)) == (1, b"fXY")
    either.begin_to_read(fd, 0, 3)
    either.begin_to_write(fd, 0, 3)
    either.sync(fd)
    either.sync_folder(str(tmp_path))
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"abcXYf"


def test_threads_read_the_ranges_that_they_ask_for(bare: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"".join(number.to_bytes(4, "little") for number in range(4000)))
    fd = bare.open_file(str(tmp_path / "a"))
    wrong: list[int] = []

    def read(first: int) -> None:
        wrong.extend(n for n in range(first, 4000, 4) if bare.read_at(fd, 4, 4 * n) != n.to_bytes(4, "little"))

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert wrong == []


def test_a_link_is_not_followed_and_a_name_that_is_taken_not_used(either: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to("a")
    for name, number, options in (
        ("link", errno.ELOOP, {"follow": False}),
        ("link", errno.EEXIST, {"create": True}),
        ("a", errno.EEXIST, {"create": True}),
        ("b", errno.ENOENT, {"write": True}),
    ):
        with pytest.raises(OSError, match=name) as error:
            either.open_file(str(tmp_path / name), **options)
        assert error.value.errno == number
    with pytest.raises(FileExistsError):
        either.create_private(str(tmp_path / "link"))
    os.close(either.create_private(str(tmp_path / "private")))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_an_open_folder_is_known_by_any_name(either: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fd = either.open_folder(str(tmp_path / "folder"))
    assert os.path.samestat(either.stat_of(fd), os.lstat(tmp_path / "folder"))
    (tmp_path / "folder").rename(tmp_path / "other")
    assert os.path.samestat(either.stat_of(fd), os.lstat(tmp_path / "other"))
    os.close(fd)
    (tmp_path / "link").symlink_to("other")
    for name in ("link", "gone"):
        with pytest.raises((NotADirectoryError, FileNotFoundError, OSError)):
            either.open_folder(str(tmp_path / name))
    fd = os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT)  # perhaps the same number
    assert os.path.samestat(either.stat_of(fd), os.fstat(fd))
    os.close(fd)


def test_a_file_is_copied_without_help_of_the_system(bare: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 10)
    source, target = bare.open_file(str(tmp_path / "a")), bare.create_private(str(tmp_path / "b"))
    assert not bare.share_blocks(source, target)
    assert bare.copy_in_kernel(source, target, 10, 0, 0) is None
    assert bare.next_data(source, 3, 10) == (3, 10)
    os.close(source)
    os.close(target)


def test_a_system_without_users_and_attributes_says_so(bare: Any, tmp_path: Path) -> None:
    fd = bare.create_private(str(tmp_path / "a"))
    bare.set_owner(fd, 1, 1)
    bare.set_mode(fd, 0o777)
    assert (bare.user(), bare.name_limit("."), bare.get_attribute(fd, "user.a")) == (0, None, None)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError, match="supported"):
        bare.set_attribute(fd, "user.a", b"a")
    with pytest.raises(OSError, match="supported"):
        bare.link(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(OSError, match="supported"):
        bare.lock(fd)
    bare.unlock(fd)
    bare.allow_open_files(1000)
    assert bare.processors() >= 1
    os.close(fd)


class _Msvcrt(ModuleType):
    """Locks of byte ranges as Windows has them: exclusive, by open file, also against the same process."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: list[tuple[int, int, int, int]] = []

    def locking(self, fd: int, mode: int, nbytes: int) -> None:
        begin, inode = os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_ino
        if mode == self.LK_UNLCK:
            self.held.remove((inode, begin, begin + nbytes, fd))
            return
        if any(lock[0] == inode and begin < lock[2] and lock[1] < begin + nbytes for lock in self.held):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self.held.append((inode, begin, begin + nbytes, fd))


def test_many_readers_or_one_writer_have_the_lock_on_windows(tmp_path: Path) -> None:
    windows = other_system.load(msvcrt=_Msvcrt())
    (tmp_path / "a").write_bytes(b"abc")
    one, two, writer = (windows.open_file(str(tmp_path / "a"), write=True) for _ in range(3))
    assert windows.lock(one, shared=True)
    assert windows.lock(two, shared=True)
    assert not windows.lock(writer)
    windows.unlock(one)
    assert not windows.lock(writer)
    windows.unlock(two)
    assert windows.lock(writer)
    assert not windows.lock(one, shared=True)
    assert not windows.lock(two)
    assert windows.read_at(one, 3, 0) == b"abc"
    windows.unlock(writer)
    windows.unlock(writer)
    assert windows.lock(one)
    for fd in (one, two, writer):
        os.close(fd)


def test_an_interrupt_comes_later_where_there_is_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGALRM")
    assert interrupts.interrupt_numbers() == (signal.SIGINT,)
    came = threading.Event()
    monkeypatch.setattr("_thread.interrupt_main", came.set)
    interrupts.interrupt_after(0.001)
    assert came.wait(10)
    came.clear()
    call_off = interrupts.interrupt_after(10)
    call_off()
    assert not came.is_set()
