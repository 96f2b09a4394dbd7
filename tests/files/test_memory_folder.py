"""Every reading command on a checkpoint that lies wholly in memory: what it says is what it says of the one on disk."""

from __future__ import annotations

import builtins
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ckpt
from contract import FORMATS, Format
from safetensors.torch import load_file

from ckpt_cli.errors import TruncatedError
from ckpt_cli.files.memory import MemoryFolder, MemorySource
from ckpt_cli.files.places import LOCAL, Folder, files_below, folder_of, mounted, name_of, names_in
from ckpt_cli.files.source import Window

HERE = "memory://"

COMMANDS = [
    "ls FILE",
    "ls FILE -l -a --sort file",
    "ls FILE --fold",
    "ls FILE --waste",
    "ls FILE -a --json",
    "info FILE",
    "info FILE --json",
    "show FILE",
    "stats FILE --total",
    "hash FILE",
    "hash FILE --json --algorithm sha256",
    "diff FILE FILE",
    "match FILE FILE --json",
    "ties FILE --equal",
    "tree FILE",
    "check FILE",
    "check FILE --deep --json",
    "scan FILE --all",
    "meta FILE",
    "FILE",
]
"""Every command that only reads; for `show` the name of the first tensor is added."""


def in_memory(folder: Path) -> MemoryFolder:
    """The files below a folder, as a folder in memory."""
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return MemoryFolder({HERE + name.as_posix(): data for name, data in files.items()})


@contextmanager
def no_system_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Context manager: the system is not asked about a path in memory within the block."""

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *args: Any, **options: Any) -> Any:
            assert not str(path).startswith("memory:"), f"{call.__name__}({path!r})"
            return call(path, *args, **options)

        return guarded

    with monkeypatch.context() as patched:
        for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink"):
            patched.setattr(os, name, guard(getattr(os, name)))
        patched.setattr(builtins, "open", guard(builtins.open))
        yield


def require_same(ckpt: Ckpt, here: Path, name: str, monkeypatch: pytest.MonkeyPatch, tensor: str = "") -> None:
    """Run each command on a checkpoint in the current folder, then in memory with nothing left on the disk."""
    commands = [each + f" {tensor}" if each.startswith("show ") else each for each in COMMANDS]
    on_disk = [ckpt(*command.replace("FILE", name).split(" ")) for command in commands]
    memory = in_memory(here)
    for each in here.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    with mounted("memory", memory), no_system_calls(monkeypatch):
        for command, wanted in zip(commands, on_disk, strict=True):
            found = ckpt(*command.replace("FILE", HERE + name).split(" "))
            where = (found.out.replace(HERE, ""), found.err.replace(HERE, ""), found.code)
            assert where == (wanted.out, wanted.err, wanted.code), command
            assert "Traceback" not in found.err


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.label)
def test_every_reading_command_says_the_same_of_a_checkpoint_in_memory(
    kind: Format, ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"model{kind.suffix}"
    kind.put(here / name)
    if not kind.suffix:
        (here / name / "config.json").write_text('{"model_type": "bert", "hidden_size": 4}')
    require_same(ckpt, here, name, monkeypatch, kind.named("0.weight"))


def test_every_reading_command_says_the_same_of_an_array_in_memory(
    ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(here / "a.npy", np.arange(12.0).reshape(3, 4))
    require_same(ckpt, here, "a.npy", monkeypatch)


def test_every_reading_command_says_the_same_of_a_deepspeed_folder_in_memory(
    ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "run" / "step1").mkdir(parents=True)
    (here / "run" / "latest").write_text("step1")
    torch.save({"module": {"w": torch.ones(2)}}, here / "run" / "step1" / "mp_rank_00_model_states.pt")
    require_same(ckpt, here, "run", monkeypatch)


@pytest.mark.parametrize("name", ["cut.pt", "page.bin", "empty.pt", "missing.pt", "cut.safetensors"])
def test_what_does_not_open_in_memory_is_refused_with_the_same_words(
    name: str, ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.ones(999)}, here / "whole.pt")
    (here / "cut.pt").write_bytes((here / "whole.pt").read_bytes()[:-40])
    (here / "page.bin").write_bytes(b"<html>not found</html>")
    (here / "empty.pt").write_bytes(b"")
    (here / "cut.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    require_same(ckpt, here, name, monkeypatch)


def test_a_set_in_memory_with_a_missing_shard_says_so(ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = next(kind for kind in FORMATS if kind.label == "shards-zip")
    kind.put(here / "model")
    min((here / "model").glob("*-of-*")).unlink()
    require_same(ckpt, here, "model", monkeypatch)


def test_a_checkpoint_in_memory_is_not_edited_in_place_but_into_a_new_file(ckpt: Ckpt, here: Path) -> None:
    torch.save({"w": torch.ones(3)}, here / "m.pt")
    with mounted("memory", in_memory(here)):
        for command in ("set FILE w[0]=2", "rename FILE --strip w", "rm FILE w", "undo FILE"):
            answer = ckpt(*command.replace("FILE", HERE + "m.pt").split(" "))
            assert (answer.code, answer.out) == (2, "")
            assert "does not lie on this machine's disk" in answer.err
            assert answer.err.splitlines()[1:] in ([], ["hint: -o OUT writes an edited copy"])
        assert ckpt("set", HERE + "m.pt", "w[0]=2", "-o", "set.pt").code == 0
        assert ckpt("rename", HERE + "m.pt", "--sub", "w", "x", "-o", "renamed.pt").code == 0
        assert ckpt("convert", HERE + "m.pt", "converted.safetensors").code == 0
        assert ckpt("convert", HERE + "m.pt", "folder", "--to", "hf").code == 0
    assert torch.load("set.pt")["w"].tolist() == [2, 1, 1]
    assert torch.load("renamed.pt")["x"].tolist() == [1, 1, 1]
    for converted in ("converted.safetensors", "folder/model.safetensors"):
        assert load_file(converted)["w"].tolist() == [1, 1, 1]


def test_a_folder_in_memory_answers_every_question_as_the_disk_does(here: Path) -> None:
    for name in ("a/x", "a/b/y", "a/.git/z", "top"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(name.encode())
    memory = in_memory(here)
    for path in ("a", "a/", "a/b", "a/x", "top", "a/none", "none/x"):
        there = HERE + path
        for name in ("is_folder", "is_file", "exists", "is_link", "is_taken"):
            assert getattr(memory, name)(there) == getattr(LOCAL, name)(path), (name, path)
        for name in ("size_of", "links_of", "names_in", "open"):
            assert outcome(memory, name, there) == outcome(LOCAL, name, path), (name, path)
        assert (memory.identity_of(there) is None) == (not LOCAL.is_file(path))
        assert (name_of(there), folder_of(there)) == (name_of(path), HERE + folder_of(path))
    assert memory.present(HERE + "a", ["x", "b", "b/y", "none"]) == LOCAL.present("a", ["x", "b", "b/y", "none"])
    below = [(name, HERE + path) for name, path in LOCAL.files_below("a")]
    assert list(memory.files_below(HERE + "a")) == below
    assert memory.head_of(HERE + "a/x", 1) == LOCAL.head_of("a/x", 1) == b"a"
    assert memory.is_same(HERE + "a/", HERE + "a")
    assert not memory.is_same(HERE + "a", HERE + "top")


def outcome(folder: Folder, name: str, path: str) -> object:
    """What a question about a file answers; for what is not a file, only that it raises OSError."""
    if folder.is_folder(path) and name != "names_in":
        return "of a folder"
    try:
        answer = getattr(folder, name)(path)
    except OSError as error:
        return type(error) if name != "names_in" else "cannot be listed"
    return (answer.size, answer.read(0, answer.size)) if name == "open" else answer


def test_a_folder_in_memory_lists_its_names_and_those_below_it_but_no_hidden_folders() -> None:
    folder = MemoryFolder({f"memory://{name}": b"" for name in ("b", "a/x", "a/c/y", ".git/z", "a/.h")})
    with mounted("memory", folder):
        assert names_in("memory://") == [".git", "a", "b"]
        assert names_in("memory://a/") == [".h", "c", "x"]
        assert [name for name, _ in files_below("memory://")] == ["b", "a/.h", "a/x", "a/c/y"]
    with pytest.raises(FileNotFoundError):
        names_in("memory://a")


def test_a_source_in_memory_and_a_part_of_it_read_the_same_in_another_process() -> None:
    source = MemorySource(bytes(range(100)), "m")
    part = pickle.loads(pickle.dumps(Window(Window(source, 10, 80), 5, 20)))
    assert (part.begin, part.size, part.path) == (15, 20, "m")
    assert part.read(0, 3) == bytes([15, 16, 17]) == bytes(part.view(0, 3))
    into = bytearray(2)
    part.read_into(memoryview(into), 18)
    assert into == bytes([33, 34])
    for reads in (part.read, part.view, part.check):
        with pytest.raises(TruncatedError):
            reads(19, 2)
