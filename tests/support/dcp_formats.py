"""Distributed checkpoints, as torch.distributed.checkpoint writes and reads them."""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

State = dict[str, torch.Tensor]

_TEMPORARY = tempfile.gettempdir()
"""The folder for temporary ones, also while a test names another one."""


def save(state: dict[str, Any], path: Path, **options: Any) -> None:
    """What one process saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=FileSystemWriter(path, sync_files=False, **options), no_dist=True)


def read(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    """What torch reads, the names flat again."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(path, f"{folder}/whole.pt")
        found: dict[str, Any] = torch.load(f"{folder}/whole.pt", weights_only=weights_only)
    return found


def save_safetensors(state: State, path: Path) -> None:
    """As safetensors, which hold contiguous tensors that share nothing."""
    apart = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save(apart, path, serialization_format=SerializationFormat.SAFETENSORS)


def read_safetensors(path: Path) -> State:
    """What the safetensors library reads; torch 2.13 has no reader that takes these with their `.metadata`."""
    found: State = {}
    for file in sorted(path.glob("*.distcp")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def save_ranks(state: State, path: Path, world: int = 2) -> None:
    """As several ranks save it together; written once a session, then copied."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    shutil.copytree(_by_ranks(buffer.getvalue(), world), path)


@cache
def _by_ranks(saved: bytes, world: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ckpt-dcp-", dir=_TEMPORARY))
    atexit.register(shutil.rmtree, folder)
    (folder / "state.pt").write_bytes(saved)
    server = _ranks()
    assert server.stdin
    assert server.stdout
    print(json.dumps([world, str(folder / "state.pt"), str(folder / "out")]), file=server.stdin, flush=True)
    assert server.stdout.readline() == "0\n", _errors_of_ranks().read_text()
    return folder / "out"


@cache
def _ranks() -> subprocess.Popen[str]:
    """Start the process that saves by ranks; it serves until the tests end."""
    command = [sys.executable, str(Path(__file__).with_name("dcp_ranks.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with _errors_of_ranks().open("w") as errors:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/"
        )
    atexit.register(server.communicate)
    return server


@cache
def _errors_of_ranks() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ckpt-dcp-", dir=_TEMPORARY))
    atexit.register(shutil.rmtree, folder)
    return folder / "errors"
