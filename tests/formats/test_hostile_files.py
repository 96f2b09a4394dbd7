"""Files made to harm: each is opened in a process of its own, whose time and memory are limited and measured."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import old
from builders.hostile import CANARY, CASES
from builders.hostile_pickles import PICKLES, SCALE
from builders.pickles import pickled

CALLS = 80_000_000
"""Functions that opening a file may call; the costliest of these files, of some 10 MB, takes 72 million."""
MEBIBYTES = 300
INTERPRETER = 50
"""Mebibytes that a process takes that opens nothing."""


def _scaled(mebibytes: int, scale: float) -> float:
    """Return the memory that opening a file may take where limits are multiplied by `scale`."""
    return INTERPRETER + (mebibytes - INTERPRETER) * scale


@dataclass
class Server:
    """A process that opens files in forks of itself, and the folder that it does this in."""

    process: subprocess.Popen[str]
    folder: Path

    def opened(self, path: Path) -> dict[str, Any]:
        """How opening a file ended and what it cost."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        facts: dict[str, Any] = json.loads(self.process.stdout.readline())
        return facts


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[float, Server]]:
    """A server with the limits that users have, and one with those that the smaller files are to meet."""
    command = [sys.executable, str(Path(__file__).parent.parent / "support" / "hostile_server.py")]
    with ExitStack() as stack:
        started: dict[float, Server] = {}
        for scale in {1, SCALE}:
            folder = tmp_path_factory.mktemp("server")
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=folder,
                    env={**os.environ, "CKPT_LIMITS": str(scale)},
                )
            )
            assert process.stdin
            stack.callback(process.stdin.close)
            started[scale] = Server(process, folder)
        yield started


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_or_read_within_limits(
    name: str, tmp_path: Path, servers: dict[float, Server]
) -> None:
    server = servers[CASES[name].scale]
    path = tmp_path / "hostile"
    path.write_bytes(CASES[name].build())
    facts = server.opened(path)
    path.unlink()
    assert "died" not in facts
    refused = CASES[name].refused
    if refused is None:
        assert facts["error"] is None
    else:
        assert refused in (facts["error"] or "")
        assert facts["path"] == str(path)
        assert facts["error"].isprintable()
        assert len(facts["error"]) < 1000
    assert facts["peak"] < _scaled(MEBIBYTES, CASES[name].scale)
    assert facts["calls"] < CALLS * CASES[name].scale
    assert not {"torch", "numpy", "ctypes", "runpy"} & set(facts["modules"])
    assert os.listdir(server.folder) == []


def test_the_canary_appears_when_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    build = next(build for name, build, _ in PICKLES if name == "runs_os_system")
    with pytest.raises(pickle.UnpicklingError):  # of the tensor that follows
        pickle.loads(build())
    assert Path(CANARY).exists()


@pytest.mark.parametrize("name", [name for name, _, _ in PICKLES][::3])
def test_the_same_pickles_in_a_stream_stay_within_limits(
    name: str, tmp_path: Path, servers: dict[float, Server]
) -> None:
    """A pickle in a stream is read in growing pieces, so that each is begun several times."""
    server = servers[SCALE]
    pickled_badly = next(build for known, build, _ in PICKLES if known == name)()
    path = tmp_path / "hostile"
    path.write_bytes(old.save(None)[: -len(pickled(None) + pickled([]))] + pickled_badly + pickled([]))
    facts = server.opened(path)
    path.unlink()
    assert "died" not in facts
    assert facts["error"] is None or (facts["path"] == str(path) and facts["error"].isprintable())
    assert facts["peak"] < _scaled(MEBIBYTES, SCALE)
    assert facts["calls"] < CALLS * SCALE
    assert os.listdir(server.folder) == []
