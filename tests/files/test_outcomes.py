"""What an error says of the state of the files is true: nothing changed, complete, or completed by the next command."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer, Ckpt
from contract import write_shards
from safetensors.torch import save_file

from ckpt_cli.cli.main import run
from ckpt_cli.files.outcome import Outcome, interrupts_deferred

EDITS = {
    "in place": ("m.safetensors", "set", "m.safetensors", "b=7", "w=7"),
    "rewritten": ("m.safetensors", "cast", "m.safetensors", "float16"),
    "with a backup": ("m.safetensors", "cast", "m.safetensors", "float16", "--backup"),
    "to another file": ("there.safetensors", "set", "m.safetensors", "b=7", "-o", "there.safetensors"),
    "shards in place": ("shards", "set", "shards", "*=7"),
    "shards rewritten": ("shards", "cast", "shards", "float16"),
    "to a folder that is there": (
        "shards",
        "convert",
        "m.safetensors",
        "shards",
        "--to",
        "hf-bin",
        "--max-shard",
        "20B",
        "--force",
    ),
    "to a new folder": ("out", "convert", "m.safetensors", "out", "--max-shard", "20B"),
}
"""What an edit changes, and its command line."""


@pytest.fixture(params=EDITS)
def edit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """An edit of files in the current folder."""
    monkeypatch.chdir(tmp_path)
    edit: tuple[str, ...] = EDITS[request.param]
    return edit


def restore() -> None:
    """Write the files that the edits start from."""
    for path in Path().iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    state = {"w": torch.zeros(4), "b": torch.zeros(4)}
    save_file(state, "m.safetensors")
    save_file({"other": torch.zeros(2)}, "there.safetensors")
    write_shards(state, Path("shards"))


def held_by(target: str) -> dict[str, bytes]:
    """The content of a file, or of the visible files of a folder."""
    path = Path(target)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return {file.name: file.read_bytes() for file in files if not file.name.startswith(".")}


@contextmanager
def failing(name: str, at: int, act: Callable[[], None], *, onward: bool = False) -> Iterator[list[int]]:
    """Let a function of `os` fail at its nth call, or from then on; the list gets an item where it did."""
    count = 0
    failed: list[int] = []
    real = getattr(os, name)

    def either(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == at or (onward and count > at):
            failed.append(count)
            act()
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, either)
        yield failed


def raising(number: int) -> Callable[[], None]:
    """Something that raises an error of the system."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def require_truth(answer: Answer, target: str, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """Compare what the error says with what is there, before and after the next command."""
    before = held_by(target)
    assert "hint: free some space and try again" not in answer.err or Outcome.UNCHANGED.value in answer.err
    assert (run(["ls", target]) == 0) == Path(target).exists()
    after = held_by(target)
    assert after in (old, new)
    if Outcome.UNCHANGED.value in answer.err:
        assert before == after == old
    elif Outcome.DONE.value in answer.err:
        assert before == after == new
    else:
        assert Outcome.UNFINISHED.value in answer.err


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("pwrite", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("replace", errno.EIO),
        ("rename", errno.EIO),
        ("unlink", errno.EIO),
    ],
)
@pytest.mark.parametrize("onward", [False, True])
def test_an_error_at_any_call_says_truly_what_it_leaves(
    edit: tuple[str, ...], ckpt: Ckpt, call: str, number: int, *, onward: bool
) -> None:
    target, *arguments = edit
    restore()
    old = held_by(target)
    assert run(arguments) == 0
    new = held_by(target)
    for at in range(1, 200):
        restore()
        with failing(call, at, raising(number), onward=onward) as failed:
            answer = ckpt(*arguments)
        if not failed:
            return
        if answer.code:
            assert answer.code == 2
            require_truth(answer, target, old, new)
        else:
            assert held_by(target) == new
    pytest.fail("the edit never ends")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "rename", "unlink"])
def test_an_interrupt_that_comes_too_late_says_so(edit: tuple[str, ...], ckpt: Ckpt, call: str) -> None:
    target, *arguments = edit
    restore()
    old = held_by(target)
    assert run(arguments) == 0
    new = held_by(target)
    for at in range(1, 200):
        restore()
        with failing(call, at, lambda: os.kill(os.getpid(), signal.SIGINT)) as failed:
            answer = ckpt(*arguments)
        if not failed:
            return
        assert answer.code == 130
        assert answer.err in ("", f"ckpt: interrupted; {Outcome.DONE.value}\n")
        assert held_by(target) == (new if answer.err else old)
    pytest.fail("the edit never ends")


def test_an_edit_that_cannot_be_put_back_does_not_claim_that_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt
) -> None:
    monkeypatch.chdir(tmp_path)
    restore()
    with failing("pwrite", 3, raising(errno.ENOSPC), onward=True):
        answer = ckpt("set", "m.safetensors", "b=7", "w=7")
    assert answer.err == (
        "ckpt: m.safetensors: No space left on device;"
        " the change is incomplete until the next ckpt command on it completes or undoes it\n"
        "hint: free some space, then run a ckpt command such as ls on it\n"
    )
    assert run(["show", "m.safetensors"]) == 0
    assert len({bytes(part) for part in (Path("m.safetensors").read_bytes()[-32:-16], b"\0\0\xe0\x40" * 4)}) == 1


def test_a_recovery_that_fails_says_that_the_edit_is_still_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt
) -> None:
    monkeypatch.chdir(tmp_path)
    restore()
    with failing("pwrite", 3, raising(errno.ENOSPC), onward=True):
        ckpt("set", "m.safetensors", "b=7", "w=7")
        answer = ckpt("ls", "m.safetensors")
    assert (answer.code, answer.out) == (2, "")
    assert Outcome.UNFINISHED.value in answer.err
    assert run(["ls", "m.safetensors"]) == 0


def test_an_error_of_a_look_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Ckpt) -> None:
    monkeypatch.chdir(tmp_path)
    restore()
    monkeypatch.setattr("ckpt_cli.cli.ls.list_entries", lambda *_, **__: raising(errno.ENOSPC)())
    assert ckpt("ls", "m.safetensors").err == "ckpt: No space left on device\nhint: free some space and try again\n"


def test_a_deferred_interrupt_comes_at_the_end_of_the_block() -> None:
    steps = []

    def interrupted() -> None:
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("within")
        steps.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["within"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
