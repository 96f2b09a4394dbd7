"""`set` stopped at every step: the file is exactly old or exactly new after the next command, and nothing is left."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from contract import contents, write_shards
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_model
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


def tied_net() -> nn.Module:
    """A network whose layers 0 and 2 are one."""
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3))


def fill(folder: Path) -> None:
    """The files that edits start from."""
    torch.save(tied_net().state_dict(), folder / "a.pt")
    save_model(tied_net(), str(folder / "a.safetensors"))
    torch.save({"other": torch.ones(3)}, folder / "there.pt")
    write_shards(tied_net().state_dict(), folder / "shards")
    (folder / "hf").mkdir()
    state = {"a.w": torch.ones(8), "b.w": torch.zeros(8), "c.w": torch.randn(8)}
    save_torch_state_dict(state, str(folder / "hf"), max_shard_size=32)


def held_by(target: Path) -> dict[str, bytes]:
    """The content of a file, or of each file of a folder that is not hidden."""
    found = contents(target) if target.exists() else {}
    return {name: content for name, content in found.items() if not name.startswith(".")}


class Server:
    """A process that runs commands in processes which it forks."""

    def __init__(self) -> None:
        call = [sys.executable, str(CHILD), "serve"]
        self._process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, folder: Path, step: int, mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder, stopped at a step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = [str(folder), str(step), mode, "" if step else "steps.log", *arguments]
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(call, code, "", said)

    def close(self) -> None:
        """End the process."""
        self._process.communicate("", timeout=60)


_SERVERS: queue.Queue[Server] = queue.Queue()


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    """Two processes that run commands."""
    for _ in range(2):
        _SERVERS.put(Server())
    yield
    while not _SERVERS.empty():
        _SERVERS.get().close()


def command(folder: Path, step: int, mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, stopped at a step."""
    server = _SERVERS.get()
    try:
        return server.run(folder, step, mode, *arguments)
    finally:
        _SERVERS.put(server)


SCENES = {
    "in place, pt": ("a.pt", "set", "a.pt", "2.weight[0,0]=100", "3.bias=[1,2,3]", "0.weight[::2,1]*=2"),
    "in place, safetensors": ("a.safetensors", "set", "a.safetensors", "2.weight[0,0]=100", "3.bias+=1"),
    "with a backup": ("a.pt", "set", "--backup", "a.pt", "2.weight[0,0]=100"),
    "to a new file": ("out.pt", "set", "a.pt", "2.weight[0,0]=100", "-o", "out.pt"),
    "to a file that is there": ("there.pt", "set", "a.pt", "2.weight[0,0]=100", "-o", "there.pt"),
    "in place, shards": ("shards", "set", "shards", "0.bias[1]=100", "3.bias=[1,2,3]", "2.weight[0]*=2"),
    "shards to a new folder": ("out", "set", "shards", "3.bias=0", "0.bias=1", "-o", "out"),
    "renamed in place, pt": ("a.pt", "rename", "a.pt", "3", "a.much.longer.name" * 40, "--backup"),
    "renamed in place of the same length, pt": ("a.pt", "rename", "a.pt", "3", "4"),
    "renamed in the header": ("a.safetensors", "rename", "a.safetensors", "3", "4"),
    "removed, safetensors": ("a.safetensors", "rm", "a.safetensors", "3"),
    "cast, shards": ("shards", "cast", "shards", "bfloat16"),
    "a shard removed": ("hf", "rm", "hf", "b"),
    "renamed to a new folder": ("out", "rename", "hf", "--add", "x", "-o", "out"),
    "to a new safetensors": ("out.st", "set", "a.safetensors", "3.bias=0", "-o", "out.st"),
}


@pytest.fixture(params=SCENES, scope="module")
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Each kind of edit, run once to the end to learn its steps and its result."""
    start, folder = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("whole")
    target, *arguments = SCENES[request.param]
    fill(start)
    shutil.copytree(start, folder, dirs_exist_ok=True)
    old = held_by(folder / target)
    done = command(folder, 0, "", *arguments)
    assert done.returncode == 0, done.stderr
    steps = (folder / "steps.log").read_text().splitlines()
    return Scene(tuple(arguments), target, old, held_by(folder / target), steps, start)


def stop_everywhere(scene: Scene, folder: Path, mode: str, calls: tuple[str, ...] = ()) -> None:
    """Stop the edit at each step, or at each of some calls, and look at what is left."""
    cases = [(step, mode) for step, call in enumerate(scene.steps, 1) if not calls or call.split()[0] in calls]
    assert cases or calls
    with ThreadPoolExecutor(2) as pool:
        for problem in pool.map(lambda case: _stopped(scene, folder, *case), cases):
            assert problem is None, problem


def _stopped(scene: Scene, folder: Path, step: int, mode: str) -> str | None:
    """What is wrong after a stop, or None."""
    here = folder / f"{step}-{mode}"
    shutil.copytree(scene.start, here)
    told = f"step {step} of {len(scene.steps)} ({scene.steps[step - 1]}), {mode}"
    done = command(here, step, mode, *scene.arguments)
    problem = _after_stop(scene, here, mode, done)
    if problem is None:
        problem = _after_next_edit(scene, here)
    shutil.rmtree(here)
    return problem and f"{told}: {problem}"


def _after_stop(scene: Scene, here: Path, mode: str, done: subprocess.CompletedProcess[str]) -> str | None:
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
        return None if done.returncode == 130 and not lines else f"exit {done.returncode}: {done.stderr}"
    if done.returncode != 2 or not lines[0].startswith("ckpt: ") or len(lines) > 2:
        return f"exit {done.returncode}: {done.stderr}"
    return None if found == scene.old or mode == "broken" else "failed, but the file is new"


def _after_next_edit(scene: Scene, here: Path) -> str | None:
    """The same edit again brings the new file, and nothing is left beside it that no edit leaves.

    An edit that cannot be done twice must be whole where it took place.
    """
    if "-o" in scene.arguments and (here / scene.target).is_dir():  # where it is whole already, it is refused
        shutil.rmtree(here / scene.target)
    files = {name: str(here / name) for name in (*os.listdir(scene.start), scene.target)}
    is_done = scene.arguments[0] != "set" and held_by(here / scene.target) == scene.new and "-o" not in scene.arguments
    if run([files.get(argument, argument) for argument in scene.arguments]) != (2 if is_done else 0):
        return "the next edit failed"
    if held_by(here / scene.target).keys() != scene.new.keys():
        return "the next edit made something else"
    left = {path.name for path in here.rglob(".*")}
    if left:
        return f"left behind: {left}"
    return _unreadable(here / scene.target)


def _unreadable(target: Path) -> str | None:
    if target.is_dir():
        return next(filter(None, map(_unreadable, target.glob("*.bin"))), None)
    if zipfile.is_zipfile(target):
        with zipfile.ZipFile(target) as archive:
            if archive.testzip() is not None:
                return "a wrong CRC"
        torch.load(target)
        return None
    with safe_open(target, "pt") as file:
        return None if file.keys() else "no tensors"


def test_a_kill_before_any_step_leaves_the_file_old_or_new(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "kill")


def test_a_kill_in_the_middle_of_any_write_leaves_the_file_old_or_new(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "torn", ("pwrite", "write"))


def test_a_kill_right_after_the_last_step_leaves_the_new_file(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "after", ("replace", "unlink"))


def test_a_full_disk_leaves_the_old_file_and_says_so(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "full", ("open", "pwrite", "write", "ftruncate", "copy_file_range"))


def test_a_broken_disk_leaves_the_file_old_or_new_and_says_so(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "broken", ("fsync", "replace", "unlink"))


def test_an_interrupt_at_any_step_leaves_the_file_old_or_new(scene: Scene, tmp_path: Path) -> None:
    stop_everywhere(scene, tmp_path, "interrupt")


def test_the_journal_is_on_disk_before_the_first_patch_and_gone_after_the_last(scene: Scene) -> None:
    replaced = [place for place, step in enumerate(scene.steps) if step.startswith("replace") and ".bak" not in step]
    if "-o" not in scene.arguments and replaced:
        journal = [place for place, step in enumerate(scene.steps) if "ckpt-journal" in step]
        synced = [place for place, step in enumerate(scene.steps) if step.startswith("fsync") and "ckpt-tmp" in step]
        written = [place for place, step in enumerate(scene.steps) if step.startswith("pwrite") and "ckpt-tmp" in step]
        assert max(written) < synced[-1] < replaced[0]
        assert scene.steps[-1].startswith("fsync")
        if journal:  # of several files
            made = [place for place in journal if scene.steps[place].startswith("fsync")]
            assert synced[-1] < journal[0]
            assert made[-1] + 1 < replaced[0]
            assert scene.steps[made[-1] + 1].startswith("fsync")
            assert replaced[-1] < next(place for place in journal if scene.steps[place].startswith("unlink"))
        return
    if "-o" in scene.arguments:
        renamed = next(place for place, step in enumerate(scene.steps) if step.startswith(("replace", "rename")))
        synced = [place for place, step in enumerate(scene.steps) if step.startswith("fsync") and "ckpt-tmp" in step]
        written = [place for place, step in enumerate(scene.steps) if step.startswith("pwrite")]
        assert max(written) < synced[-1] < renamed < len(scene.steps) - 1
        assert scene.steps[-1].startswith("fsync")
        return
    steps = [step for step in scene.steps if ".bak" not in step and "ckpt-tmp" not in step]
    journal = [step for step in steps if "ckpt-journal" in step]
    first_patch = next(i for i, step in enumerate(steps) if step.startswith("pwrite") and "journal" not in step)
    last_patch = max(i for i, step in enumerate(steps) if step.startswith("pwrite") and "journal" not in step)
    journal_synced = next(i for i, step in enumerate(steps) if step.startswith("fsync") and "journal" in step)
    folder_synced = steps.index(
        next(s for s in steps[journal_synced + 1 :] if s.startswith("fsync")), journal_synced + 1
    )
    file_synced = next(i for i, step in enumerate(steps) if i > last_patch and step.startswith("fsync"))
    removed = next(i for i, step in enumerate(steps) if step.startswith("unlink"))
    assert journal_synced < folder_synced < first_patch <= last_patch < file_synced < removed
    assert journal[0].startswith("open")
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
