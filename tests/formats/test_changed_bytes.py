"""Files of runs, ranks and other containers with bytes that were changed: each is read, or refused in words."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from containers import changed, write_sb3
from dcp_formats import save
from test_archives import KINDS, archive
from zero_folders import model_name, optim_name, zero_folder

from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Tensor

SAMPLES = Path(__file__).parent.parent / "samples"
STATE = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(4)}
CHANGES = [b"", b"\xff", b"\x80", b"\0", b"\1", b"h", b"t", b"R", b"\x94", b"9", b"-1"]


def _sb3(folder: Path) -> tuple[Path, Path]:
    write_sb3({"policy": STATE, "policy.optimizer": {"state": {}, "param_groups": []}}, folder / "a.zip")
    return folder / "a.zip", folder / "a.zip"


def _archive(kind: str, folder: Path) -> tuple[Path, Path]:
    name, data, _ = KINDS[kind]
    made = Path(archive(folder / "a.nemo", {name: data, "model_config.yaml": b"a: 1\n"}))
    return made, made


def _equinox(folder: Path) -> tuple[Path, Path]:
    with open(folder / "a.eqx", "wb") as file:
        file.write(b'{"depth": 2}\n')
        for tensor in STATE.values():
            np.save(file, tensor.numpy())
    return folder / "a.eqx", folder / "a.eqx"


def _zero(folder: Path, stage: int, name: str) -> tuple[Path, Path]:
    made = zero_folder(folder / "run", stage, 2, [STATE], buffers={"c": torch.ones(2)})
    return made, made / "global_step7" / name


def _sample(folder: Path, sample: str, name: str) -> tuple[Path, Path]:
    made = Path(shutil.copytree(SAMPLES / sample, folder / "run"))
    return made, made / name


def _distributed(folder: Path) -> tuple[Path, Path]:
    save({"model": STATE, "epoch": 3}, folder / "run")
    return folder / "run", folder / "run" / ".metadata"


PLACES = {
    "stable-baselines3": _sb3,
    "nemo": lambda folder: _archive("nemo", folder),
    "allennlp": lambda folder: _archive("allennlp", folder),
    "equinox": _equinox,
    "zero 2, states": lambda folder: _zero(folder, 2, optim_name(1)),
    "zero 3, model": lambda folder: _zero(folder, 3, model_name(3, 0)),
    "zero, latest": lambda folder: _sample(folder, "zero1", "latest"),
    "verl": lambda folder: _sample(folder, "verl", "model_world_size_2_rank_1.pt"),
    "sharded tensors": lambda folder: _sample(folder, "fsdp1", "model_world_size_2_rank_0.pt"),
    "universal": lambda folder: _sample(folder, "universal1", "global_step2_universal/mp_rank_00_model_states.pt"),
    "megatron": lambda folder: _sample(folder, "megatron", ".metadata"),
    "megatron, common": lambda folder: _sample(folder, "megatron", "common.pt"),
    "accelerate": lambda folder: _sample(folder, "accelerate_sharded", "optimizer_0/.metadata"),
    "distributed": _distributed,
}
"""The checkpoint, and the file in it that changes."""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", PLACES)
def test_changed_bytes_are_read_or_refused(tmp_path: Path, kind: str, seed: int) -> None:
    checkpoint, file = PLACES[kind](tmp_path)
    assert file.exists()
    _read_or_refuse(checkpoint)
    sound = file.read_bytes()
    for content in changed(sound, CHANGES, seed):
        file.write_bytes(content)
        _read_or_refuse(checkpoint)
    for length in range(0, len(sound), max(len(sound) // 10, 1)):
        file.write_bytes(sound[:length])
        _read_or_refuse(checkpoint)


def _read_or_refuse(path: Path) -> None:
    try:
        checkpoint = open_checkpoint(str(path))
    except CkptError:
        return
    try:
        for entry in checkpoint.entries:
            if isinstance(entry, Tensor) and entry.storage is not None:
                assert len(entry.storage.view(0, entry.storage.nbytes)) == entry.storage.nbytes
    except CkptError:
        pass
    finally:
        checkpoint.close()
