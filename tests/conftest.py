"""What every test of the command line starts from: copies of the samples, and `ckpt` run in this process."""

from __future__ import annotations

import os

# Before torch and numpy are imported: on few cores their threads take more time to wait for each other than to compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from ckpt_cli.cli.main import run
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint

if TYPE_CHECKING:
    from buckets import Buckets
    from set_editor import Editor

signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in a shell's background it is ignored


def _not_synced(fd: int) -> None:
    os.fstat(fd)


os.fsync = _not_synced  # thousands of edits would wait for the disk, and only a crash of the machine could tell

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))  # `make fuzz` draws other examples each time


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without searches for garbage, and leave the million objects that it makes out of later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)  # searches after each 700 new objects cost 2 % of the time
        gc.enable()


SAMPLES = Path(__file__).parent.parent / "sample_checkpoints"


@dataclass(frozen=True)
class Answer:
    """What one command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Of stdout."""
        return self.out.splitlines()


Ckpt = Callable[..., Answer]


def refused(path: str) -> CkptError:
    """Why a file does not open, in one line."""
    with pytest.raises(CkptError) as error:
        open_checkpoint(path)
    assert error.value.path == path
    assert "\n" not in str(error.value)
    return error.value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def work(here: Path) -> Path:
    """A folder with copies of the sample checkpoints, which is also the current one."""
    for sample in SAMPLES.iterdir():
        if sample.suffix in (".pt", ".safetensors"):
            shutil.copy(sample, here)
    return here


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Ckpt:
    """Run a command line in this process: `ckpt("ls", "mlp.pt")`."""

    def call(*args: object) -> Answer:
        capsys.readouterr()
        code = run([os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg) for arg in args])
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return call


@pytest.fixture
def shell() -> Ckpt:
    """Run a command line in a process of its own, with a changed environment if wanted."""

    def call(*args: object, **environment: str) -> Answer:
        command = [sys.executable, "-m", "ckpt_cli", *map(str, args)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **environment}, check=False)
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def tree(tmp_path: Path, ckpt: Ckpt) -> Callable[..., str]:
    """What `ckpt tree` prints of an object that torch.save saved."""
    import torch

    def call(saved: object, *args: object, **options: Any) -> str:
        torch.save(saved, tmp_path / "x.pt", **options)
        answer = ckpt("tree", tmp_path / "x.pt", *args)
        assert (answer.code, answer.err) == (0, "")
        return answer.out

    return call


@pytest.fixture
def editor(here: Path, ckpt: Ckpt) -> Editor:
    """`ckpt set` on a checkpoint in an empty current folder."""
    from set_editor import Editor

    return Editor(ckpt)


@pytest.fixture(scope="session")
def bucket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buckets]:
    """One server of S3 for all tests of a process."""
    from buckets import buckets_in

    with buckets_in(tmp_path_factory.mktemp("buckets")) as made:
        yield made


@pytest.fixture
def buckets(bucket_server: Buckets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Buckets]:
    """A server of S3 with the empty bucket `bucket`, and the environment that leads to it."""
    from buckets import one_bucket

    with one_bucket(bucket_server, monkeypatch, tmp_path / "staging") as alone:
        yield alone
