"""Edits that meet a fault at one of their steps: wholly old or wholly new, and what they said of it is true.

`make fuzz` tries every fault at every step (`tests/support/fuzz_faults.py`); here each edit meets a kill at every
step, and the other faults at some.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_forks import KINDS
from fault_scenes import SCENES, fill
from fault_server import Server
from in_memory import MEMORY
from safetensors import safe_open

MOST = {"kill": 40, "torn": 4}
"""Steps at which a kind of fault is tried at most in a scene, evenly spread; 3 of the others."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Works in memory where there is a folder in it, as thousands of edits wait for a disk thousands of times."""
    with tempfile.TemporaryDirectory(prefix="ckpt-", dir=MEMORY) as folder:
        start = Path(folder) / "start"
        start.mkdir()
        fill(start)
        server = Server(start)
        try:
            yield server
        finally:
            server.close()


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_meets_a_fault_leaves_old_or_new_and_says_which(server: Server, scene: str, kind: str) -> None:
    answer = server.ask(scene=scene, kind=kind, most=MOST.get(kind, 3))
    assert answer["problems"] == []
    assert answer["trials"] or kind == "torn" or (scene == "undo" and kind in ("full", "filled"))  # a mere rename


@pytest.mark.parametrize("scene", SCENES)
def test_a_recovery_that_meets_a_fault_is_completed_by_the_next(server: Server, scene: str) -> None:
    answer = server.ask(scene=scene, kind="recovery", kinds=["kill", "broken"], most=2, then=3)
    assert answer["problems"] == []


@pytest.mark.parametrize("scene", SCENES)
def test_a_new_file_is_on_disk_before_it_takes_its_place(server: Server, scene: str) -> None:
    if scene.startswith("undo"):
        _require_durable_backups(server.ask(scene=scene)["steps"])
        return
    steps = [step for step in server.ask(scene=scene)["steps"] if ".bak" not in step]
    renamed = [place for place, step in enumerate(steps) if step.startswith(("replace", "rename"))]
    if not renamed or _is_staged(steps):
        assert any("ckpt-journal" in step for step in steps)
        return
    synced = [place for place, step in enumerate(steps) if step.startswith("fsync") and "ckpt-tmp" in step]
    written = [place for place, step in enumerate(steps) if step.startswith(("pwrite", "copy")) and "ckpt-tmp" in step]
    assert max(written) < max(synced) < min(renamed) <= max(renamed) < len(steps) - 1
    assert steps[-1].startswith("fsync")


@pytest.mark.parametrize("scene", SCENES)
def test_the_journal_is_on_disk_before_the_first_change_and_gone_after_the_last(server: Server, scene: str) -> None:
    steps = [step for step in server.ask(scene=scene)["steps"] if ".bak" not in step]
    journal = [place for place, step in enumerate(steps) if "ckpt-journal" in step]
    if not journal or _is_staged(steps) or scene.startswith("undo"):
        steps = server.ask(scene=scene)["steps"]
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


def _require_durable_backups(steps: list[str]) -> None:
    """Require that a backup is on disk before it is renamed, and a journal that says so where there are several."""
    moved = [place for place, step in enumerate(steps) if step.startswith(("replace", "rename"))]
    logged = [place for place, step in enumerate(steps) if step.startswith("fsync") and "-journal" in step]
    synced = [place for place, step in enumerate(steps) if step.startswith("fsync") and step.endswith(".bak")]
    assert len(moved) == len(synced)
    assert max((*synced, *logged)) < min(moved)
    assert bool(logged) == (len(moved) > 1)
    assert steps[max(moved) + 1].startswith("fsync")


def _is_staged(steps: list[str]) -> bool:
    """Whether files are staged in a folder of their own first, whose order of steps is that of neither kind of edit."""
    return any(".new.ckpt-tmp" in step for step in steps)


@pytest.mark.parametrize("scene", SCENES)
def test_the_new_state_is_one_that_torch_or_safetensors_reads(server: Server, scene: str, tmp_path: Path) -> None:
    assert server.ask(scene=scene, kind="new", into=str(tmp_path))["new"] == sorted(_files_below(tmp_path)) != []
    for path in filter(Path.is_file, sorted(tmp_path.iterdir())):
        if path.suffix in (".pt", ".bin", ".legacy") or path.name == "out.pt":
            assert torch.load(path)
        elif path.suffix in (".safetensors", ".st"):
            with safe_open(path, "pt") as file:
                assert file.keys()


def _files_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
