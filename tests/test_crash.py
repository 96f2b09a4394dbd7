"""Edits stopped at every step: the file is exactly old or exactly new after the next command, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from contract import contents, write_shards
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn

from ckpt_cli.cli.main import run

CHILD = Path(__file__).with_name("crash_child.py")


@dataclass(frozen=True)
class Scene:
    """An edit, and the folder before and after it."""

    arguments: tuple[str, ...]
    target: str
    """The file or folder that must be old or new."""
    old: dict[str, bytes]
    """What it held before, by file; nothing where it was not there."""
    new: dict[str, bytes]
    steps: list[str]
    """The calls of a run that nothing stops."""
    start: Path
    """A folder with the files that the edit starts from."""
    runner: Runner
    """What runs it."""


class Runner:
    """Runs one command again and again, each time in a process of its own that has everything imported already."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        call = [sys.executable, str(CHILD), *arguments]
        self._process = subprocess.Popen(call, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder: Path, step: int, mode: str) -> Done:
        """Run it in a folder, stopped at a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "step": step, "mode": mode}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Done(answer["code"], answer["err"], answer["steps"])

    def close(self) -> None:
        """End it."""
        self._process.communicate()


@dataclass(frozen=True)
class Done:
    """How one run ended."""

    returncode: int
    stderr: str
    steps: list[str]


def tied_net() -> nn.Module:
    """A network whose layers 0 and 2 are one."""
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3))


def fill(folder: Path) -> None:
    """The files that edits start from."""
    torch.save(tied_net().state_dict(), folder / "a.pt")
    torch.save(tied_net().state_dict(), folder / "longer.pt")
    assert run(["rename", str(folder / "longer.pt"), "--add", "p" * 900]) == 0
    save_model(tied_net(), str(folder / "a.safetensors"))
    torch.save({"other": torch.ones(3)}, folder / "there.pt")
    torch.save(tied_net().state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "w": torch.ones(3)}, folder / "train.pt")
    write_shards(tied_net().state_dict(), folder / "shards")
    shutil.copy(folder / "a.pt", folder / "edited.pt")
    assert run(["set", str(folder / "edited.pt"), "3.bias=1", "--backup"]) == 0
    (folder / "sharded").mkdir()
    tensors = {name: tensor.clone() for name, tensor in tied_net().state_dict().items()}
    weight_map = {name: f"model-{int(name[0]) // 2 + 1:05}-of-00002.safetensors" for name in tensors}
    weight_map |= {name: "model-00003-of-00003.safetensors" for name in tensors if name[0] == "0"}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / "sharded" / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "sharded", folder / "edited")
    assert run(["rm", str(folder / "edited"), "0", "3.bias", "--backup"]) == 0


def held_by(target: Path) -> dict[str, bytes]:
    """The content of a file, or of each file of a folder that is not hidden and no backup."""
    if not target.is_dir():
        return contents(target) if target.exists() else {}
    return {
        each.name: each.read_bytes()
        for each in sorted(target.iterdir())
        if not each.name.startswith(".") and ".bak" not in each.suffixes
    }


SCENES = {
    "in place, pt": ("a.pt", "set", "a.pt", "2.weight[0,0]=100", "3.bias=[1,2,3]", "0.weight[::2,1]*=2"),
    "in place, safetensors": ("a.safetensors", "set", "a.safetensors", "2.weight[0,0]=100", "3.bias+=1"),
    "with a backup": ("a.pt", "set", "--backup", "a.pt", "2.weight[0,0]=100"),
    "to a new file": ("out.pt", "set", "a.pt", "2.weight[0,0]=100", "-o", "out.pt"),
    "to a file that is there": ("there.pt", "set", "a.pt", "2.weight[0,0]=100", "-o", "there.pt"),
    "in place, shards": ("shards", "set", "shards", "0.bias[1]=100", "3.bias=[1,2,3]", "2.weight[0]*=2"),
    "shards to a new folder": ("out", "set", "shards", "3.bias=0", "0.bias=1", "-o", "out"),
    "to a new safetensors": ("out.st", "set", "a.safetensors", "3.bias=0", "-o", "out.st"),
    "rename": ("a.pt", "rename", "a.pt", "--add", "net"),
    "rename by as much": ("a.pt", "rename", "a.pt", "3", "4"),
    "rename by more": ("a.pt", "rename", "a.pt", "--add", "a.prefix.that.the.file.has.no.room.for" * 9),
    "rename by less after that": ("longer.pt", "rename", "longer.pt", "--strip", "p" * 900),
    "rename a header in place": ("a.safetensors", "rename", "a.safetensors", "--sub", r"\.weight$", ".w"),
    "rename with a new header": ("a.safetensors", "rename", "a.safetensors", "--add", "a.prefix.as.long.as.that"),
    "meta": ("a.safetensors", "meta", "a.safetensors", "f=p"),
    "remove with a backup": ("a.pt", "rm", "a.pt", "3", "--backup"),
    "cast": ("a.pt", "cast", "a.pt", "bfloat16"),
    "keep, to a file that is there": ("there.pt", "keep", "a.pt", "3", "-o", "there.pt"),
    "untie a legacy stream": ("old.pt", "untie", "old.pt", "2.weight"),
    "set values": ("train.pt", "set", "train.pt", "epoch=123456789", "w[0]=5", "--backup"),
    "set values by as much": ("train.pt", "set", "train.pt", "epoch=7", "w[0]=5"),
    "rename in shards": ("shards", "rename", "shards", "--add", "net"),
    "rename by more in shards": ("shards", "rename", "shards", "--add", "a.prefix.that.is.long" * 200),
    "remove a shard": ("sharded", "rm", "sharded", "0", "3.bias"),
    "cast in shards with a backup": ("sharded", "cast", "sharded", "float16", "3.bias", "--backup"),
    "tie in shards to a new folder": ("out", "tie", "sharded", "0.weight", "2.weight", "--force", "-o", "out"),
    "undo": ("edited.pt", "undo", "edited.pt"),
    "undo in shards": ("edited", "undo", "edited"),
    "converted to a new file": ("out.safetensors", "convert", "a.pt", "out.safetensors", "--force"),
    "converted to a file that is there": ("there.pt", "convert", "a.safetensors", "there.pt", "--force"),
    "converted to a new folder": ("out", "convert", "a.pt", "out", "--max-shard", "300B", "--force"),
    "converted within a folder": (
        "shards",
        "convert",
        "shards",
        "shards",
        "--to",
        "hf-bin",
        "--max-shard",
        "1MB",
        "--force",
    ),
}
"""The target of each edit, and its command line."""


@pytest.fixture(params=SCENES, scope="module")
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Each kind of edit, run once to the end to learn its steps and its result."""
    start, folder, first = (tmp_path_factory.mktemp(name) for name in ("start", "whole", "first"))
    target, *arguments = SCENES[request.param]
    fill(start)
    for each in (folder, first):
        shutil.copytree(start, each, dirs_exist_ok=True)
    runner = Runner(first, *arguments)
    try:
        old = held_by(folder / target)
        done = runner.run(folder, 0, "")
        assert done.returncode == 0, done.stderr
        yield Scene(tuple(arguments), target, old, held_by(folder / target), done.steps, start, runner)
    finally:
        runner.close()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one, as thousands of edits wait for a disk thousands of times."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="ckpt-crash-", dir=memory if os.path.isdir(memory) else None) as folder:
        yield Path(folder)


def stop_everywhere(scene: Scene, folder: Path, mode: str, calls: tuple[str, ...] = ()) -> None:
    """Stop the edit at each step, or at each of some calls, and look at what is left."""
    cases = [step for step, call in enumerate(scene.steps, 1) if not calls or call.split()[0] in calls]
    assert cases or calls
    for step in cases:
        problem = _stopped(scene, folder, step, mode)
        assert problem is None, problem


def _stopped(scene: Scene, folder: Path, step: int, mode: str) -> str | None:
    """What is wrong after a stop, or None."""
    here = folder / f"{step}-{mode}"
    shutil.copytree(scene.start, here)
    told = f"step {step} of {len(scene.steps)} ({scene.steps[step - 1]}), {mode}"
    done = scene.runner.run(here, step, mode)
    problem = _after_stop(scene, here, mode, done)
    if problem is None:
        problem = _after_next_edit(scene, here)
    shutil.rmtree(here)
    return problem and f"{told}: {problem}"


def _after_stop(scene: Scene, here: Path, mode: str, done: Done) -> str | None:
    killed = mode in ("kill", "torn", "after")
    target = here / scene.target
    if target.exists() and run(["ls", str(target)]) != 0:
        return "the next command failed"
    found = held_by(target)
    if found not in (scene.old, scene.new):
        return "neither old nor new"
    if killed:
        return None if done.returncode == -9 else f"was not killed: {done.returncode}"
    if done.returncode == 0:
        return None if found == scene.new else "said that all is well, but the file is old"
    lines = done.stderr.splitlines()
    if mode == "interrupt":
        told = lines == ["ckpt: interrupted; the change itself is complete"] and found == scene.new
        return None if done.returncode == 130 and (told or not lines) else f"exit {done.returncode}: {done.stderr}"
    if done.returncode != 2 or not lines[0].startswith("ckpt: ") or len(lines) > 2:
        return f"exit {done.returncode}: {done.stderr}"
    return None if found == scene.old or mode == "broken" else "failed, but the file is new"


def _after_next_edit(scene: Scene, here: Path) -> str | None:
    """The same edit again brings the new file, and nothing is left beside it that no edit leaves."""
    if "-o" in scene.arguments and (here / scene.target).is_dir():  # where it is whole already, it is refused
        shutil.rmtree(here / scene.target)
    files = {name: str(here / name) for name in (*os.listdir(scene.start), scene.target)}
    if held_by(here / scene.target) == scene.old or scene.arguments[0] == "convert":
        if run([files.get(argument, argument) for argument in scene.arguments]) != 0:
            return "the next edit failed"
    elif run(["set", files[scene.target], f"{_LEFT.get(scene.target, '3.bias')}=1"]) != 0:
        return "another edit failed"
    left = {path.name for path in here.rglob(".*") if path.suffix != ".ckpt-undo"}
    if left:
        return f"left behind: {left}"
    return _unreadable(here / scene.target)


_LEFT = {"train.pt": "w", "there.pt": "*.weight", "shards": "*.bias", "sharded": "*.weight", "out": "*.weight",
         "edited": "*.weight", "a.pt": "*.weight", "a.safetensors": "*.bias"}  # fmt: skip
"""A name that is in each target whatever was done to it."""


def _unreadable(target: Path) -> str | None:
    if target.is_dir():
        shards = (path for path in target.iterdir() if path.suffix in (".bin", ".safetensors"))
        return next(filter(None, map(_unreadable, shards)), None)
    if zipfile.is_zipfile(target):
        with zipfile.ZipFile(target) as archive:
            if archive.testzip() is not None:
                return "a wrong CRC"
        torch.load(target)
        return None
    if target.name == "old.pt":
        torch.load(target)
        return None
    with safe_open(target, "pt") as file:
        return None if file.keys() else "no tensors"


def test_a_kill_before_any_step_leaves_the_file_old_or_new(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "kill")


def test_a_kill_in_the_middle_of_any_write_leaves_the_file_old_or_new(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "torn", ("pwrite", "write"))


def test_a_kill_right_after_the_last_step_leaves_the_new_file(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "after", ("replace", "unlink"))


def test_a_full_disk_leaves_the_old_file_and_says_so(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "full", ("open", "pwrite", "write", "ftruncate", "copy_file_range"))


def test_a_broken_disk_leaves_the_file_old_or_new_and_says_so(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "broken", ("fsync", "replace", "unlink"))


def test_an_interrupt_at_any_step_leaves_the_file_old_or_new(scene: Scene, scratch: Path) -> None:
    stop_everywhere(scene, scratch, "interrupt", ("pwrite", "replace", "rename", "link", "unlink", "mkdir"))


def _is_staged(steps: list[str]) -> bool:
    """Whether files are staged in a folder of their own first, whose order of steps is that of neither kind of edit."""
    return any(".new.ckpt-tmp" in step for step in steps)


def _require_durable_backups(scene: Scene) -> None:
    """A backup is on disk before it is renamed, and so is a journal that says so where there are several."""
    moved = [place for place, step in enumerate(scene.steps) if step.startswith(("replace", "rename"))]
    logged = [place for place, step in enumerate(scene.steps) if step.startswith("fsync") and "-journal" in step]
    synced = [place for place, step in enumerate(scene.steps) if step.startswith("fsync") and step.endswith(".bak")]
    assert len(moved) == len(synced)
    assert max((*synced, *logged)) < min(moved)
    assert bool(logged) == (len(moved) > 1)
    assert scene.steps[max(moved) + 1].startswith("fsync")


def test_a_new_file_is_on_disk_before_it_takes_its_place(scene: Scene) -> None:
    steps = [step for step in scene.steps if ".bak" not in step]
    renamed = [place for place, step in enumerate(steps) if step.startswith(("replace", "rename"))]
    if scene.arguments[0] == "undo":
        _require_durable_backups(scene)
        return
    if not renamed or _is_staged(steps):
        assert any("ckpt-journal" in step for step in steps)
        return
    synced = [place for place, step in enumerate(steps) if step.startswith("fsync") and "ckpt-tmp" in step]
    written = [place for place, step in enumerate(steps) if step.startswith(("pwrite", "copy")) and "ckpt-tmp" in step]
    assert max(written) < max(synced) < min(renamed) <= max(renamed) < len(steps) - 1
    assert steps[-1].startswith("fsync")


def test_the_journal_is_on_disk_before_the_first_change_and_gone_after_the_last(scene: Scene) -> None:
    steps = [step for step in scene.steps if ".bak" not in step]
    journal = [place for place, step in enumerate(steps) if "ckpt-journal" in step]
    if not journal or _is_staged(steps) or scene.arguments[0] == "undo":
        steps = scene.steps
        assert any(step.startswith(("replace", "rename")) for step in steps)
        return
    is_set = any("ckpt-tmp" in step for step in steps)
    change = ("replace",) if is_set else ("pwrite", "write")
    changes = [place for place, step in enumerate(steps) if step.split()[0] in change and not step.endswith("-journal")]
    logged = [place for place in journal if steps[place].startswith("fsync")]
    synced = [place for place, step in enumerate(steps) if step.startswith("fsync")]
    folder_synced = min(place for place in synced if place > max(logged))
    removed = [place for place in journal if steps[place].startswith("unlink")]
    assert max(logged) < folder_synced < min(changes)
    assert max(changes) < min(place for place in synced if place > max(changes)) < min(removed)
    assert steps[journal[0]].startswith("open")
    assert steps[-1].startswith("fsync")


def test_two_writers_take_turns_and_both_edits_stand(tmp_path: Path) -> None:
    fill(tmp_path)
    calls = [[sys.executable, "-m", "ckpt_cli", "set", "a.pt", f"3.weight[{row}]={row + 10}"] for row in range(3)]
    writers = [subprocess.Popen(call, cwd=tmp_path, stderr=subprocess.PIPE) for call in calls]
    for writer in writers:
        assert writer.wait(60) == 0
        assert writer.stderr is not None
        writer.stderr.close()
    state = torch.load(tmp_path / "a.pt")
    assert state["3.weight"].eq(torch.tensor([10.0, 11.0, 12.0])[:, None]).all()
    assert _unreadable(tmp_path / "a.pt") is None
