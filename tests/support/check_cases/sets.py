"""Sets of shards and distributed checkpoints with one fault each, and their twins without it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from check_cases.case import PT, case, hub, patched, two

# shards


def reindexed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@case("missing-shard")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / SECOND).unlink()
    return folder


@case("missing-tensor")
def _(folder: Path, fault: bool) -> Path:
    return reindexed(hub(folder), lambda index: index["weight_map"].update({"ghost": FIRST} if fault else {}))


@case("no-index")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / "model.safetensors.index.json").unlink()
    return folder


@case("no-checkpoint")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    return folder


@case("stray-shard")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        shutil.copy(folder / SECOND, folder / "model-00003-of-00003.safetensors")
    return folder


@case("shard-count")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    if fault:
        for name in (FIRST, SECOND):
            (folder / name).rename(folder / name.replace("of-00002", "of-00003"))
        text = (folder / "model.safetensors.index.json").read_text()
        (folder / "model.safetensors.index.json").write_text(text.replace("of-00002", "of-00003"))
    return folder


@case("unlisted-tensor")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)

    def forget(index: dict[str, Any]) -> None:
        if fault:
            del index["weight_map"]["l1.weight"]

    return reindexed(folder, forget)


@case("tensor-twice")
def _(folder: Path, fault: bool) -> Path:
    names = ("x", "y") if not fault else ("x", "x")
    for shard, name in zip((FIRST, SECOND), names, strict=True):
        save_file({name: torch.ones(2), shard: torch.ones(3)}, folder / shard, PT)
    weight_map = {**dict(zip(names, (FIRST, SECOND), strict=True)), FIRST: FIRST, SECOND: SECOND}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@case("total-size")
def _(folder: Path, fault: bool) -> Path:
    return reindexed(hub(folder), lambda index: index["metadata"].update({"total_size": 7} if fault else {}))


@case("stale-index")
def _(folder: Path, fault: bool) -> Path:
    path = hub(folder) / "model.safetensors.index.json"
    return patched(path, lambda raw: raw.replace(b"of-00002", b"of-00030" if fault else b"of-00002")).parent


@case("stale-index")
def _(folder: Path, fault: bool) -> Path:
    """One of the shards was saved again under another name; the other is where the index says."""
    hub(folder)
    if fault:
        (folder / SECOND).rename(folder / "model-00002-of-00003.safetensors")
    return folder


@case("second-checkpoint")
def _(folder: Path, fault: bool) -> Path:
    hub(folder)
    save_file(two(), folder / ("model.safetensors" if fault else "other.safetensors"), PT)
    return folder


@case("shard-metadata")
def _(folder: Path, fault: bool) -> Path:
    save_file(load_file(hub(folder) / SECOND), folder / SECOND, {"format": "flax"} if fault else PT)
    return folder


@case("shard-metadata")
def _(folder: Path, fault: bool) -> Path:
    """A note: what is not the format."""
    save_file(load_file(hub(folder) / SECOND), folder / SECOND, {**PT, "step": "3"} if fault else PT)
    return folder


# distributed checkpoints


def distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**two(), "epoch": 3}, checkpoint_id=folder, no_dist=True)
    return folder


@case("unreadable", "oddity")
def _(folder: Path, fault: bool) -> Path:
    distributed(folder)
    if fault:
        (folder / "__0_0.distcp").unlink()
        return folder
    return folder / ".metadata"


@case("stray-items")
def _(folder: Path, fault: bool) -> Path:
    distributed(folder)
    if fault:
        shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    return folder


@case("unread-bytes")
def _(folder: Path, fault: bool) -> Path:
    np.save(folder / "m.npy", np.ones(2))
    return patched(folder / "m.npy", lambda data: data + b"junk" * fault)


@case("truncated")
def _(folder: Path, fault: bool) -> Path:
    os.truncate(distributed(folder) / "__0_0.distcp", 1000 if fault else (folder / "__0_0.distcp").stat().st_size)
    return folder


@case("ranks")
def _(folder: Path, fault: bool) -> Path:
    run = shutil.copytree(Path(__file__).parents[2] / "samples" / "zero2", folder / "run")
    if fault:
        next(run.glob("*/*rank_1_*optim_states.pt")).unlink()
    return run
