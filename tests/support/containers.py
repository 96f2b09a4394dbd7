"""Checkpoints in containers of other libraries, written as these write them, and read by torch alone.

`tests/environments/containers.py` holds them to the libraries themselves.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

State = dict[str, torch.Tensor]

SB3_DATA: dict[str, Any] = {
    "policy_class": {
        ":type:": "<class 'abc.ABCMeta'>",
        ":serialized:": base64.b64encode(pickle.dumps(OrderedDict)).decode(),
        "__module__": "stable_baselines3.common.policies",
    },
    "num_timesteps": 10_000,
    "learning_rate": 0.0003,
    "_last_obs": None,
    "net_arch": [64, 64],
    "policy_kwargs": {"a": {"b": 1}},
}
"""Some of what an algorithm of Stable-Baselines3 has in its `data`."""


def write_sb3(files: dict[str, Any], path: Path, *, data: object = SB3_DATA, method: int = zipfile.ZIP_STORED) -> None:
    """As stable_baselines3/common/save_util.py (`save_to_zip_file`) does, with one file for each of `files`."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("data", json.dumps(data, indent=4))
        for name, state in files.items():
            with archive.open(f"{name}.pth", "w", force_zip64=True) as file:
                torch.save(state, file)
        archive.writestr("_stable_baselines3_version", "2.3.2")
        archive.writestr("system_info.txt", "- OS: Linux")


def write_policy(state: State, path: Path) -> None:
    """A policy alone."""
    write_sb3({"policy": state}, path)


def read_sb3(path: Path, name: str = "policy") -> State:
    """One of its files; the checksums of the archive and of the file in it are verified."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data = archive.read(f"{name}.pth")
    with zipfile.ZipFile(io.BytesIO(data)) as inner:
        assert inner.testzip() is None
    found: State = torch.load(io.BytesIO(data))
    return found
