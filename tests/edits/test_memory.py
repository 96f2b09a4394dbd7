"""Structural edits of checkpoints far larger than what they may take of memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memory_in_use import memory_of

GIB = 1 << 30


def write_zip(folder: Path, nbytes: int) -> str:
    """A torch.save file whose storages are holes, with a tie and a slice."""
    tensors = {f"layers.{number}.weight": torch.empty(nbytes // 40 // 4) for number in range(40)}
    tensors["head.weight"] = tensors["layers.0.weight"]
    tensors["slice"] = torch.empty(nbytes // 40 // 4)[: nbytes // 80 // 4]
    with torch.serialization.skip_data():
        torch.save(tensors, folder / "a.pt")
    return "a.pt"


def write_safetensors(folder: Path, nbytes: int, name: str = "a.safetensors") -> str:
    """A safetensors file whose tensors are holes."""
    size = nbytes // 40
    raw = json.dumps(
        {
            f"{name[0]}.{number}.weight": {
                "dtype": "F32", "shape": [size // 4], "data_offsets": [number * size, (number + 1) * size],
            }
            for number in range(40)
        }
    ).encode()  # fmt: skip
    with (folder / name).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 40 * size)
    return name


def write_set(folder: Path, nbytes: int) -> str:
    """A set of two such files."""
    (folder / "set").mkdir()
    weight_map = {}
    for number in (1, 2):
        name = write_safetensors(folder / "set", nbytes // 2, f"{number}-{number:05}-of-00002.safetensors")
        weight_map |= {f"{number}.{at}.weight": name for at in range(40)}
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "set" / "model.safetensors.index.json").write_text(json.dumps(index))
    return "set"


@pytest.mark.parametrize("edit", [["rename", "F", "--add", "a.long.prefix"], ["rm", "F", "*.3*.weight"]])
@pytest.mark.parametrize("write", [write_zip, write_safetensors, write_set])
def test_twenty_gigabytes_are_edited_in_little_memory_and_stay_holes(
    tmp_path: Path, write: Callable[[Path, int], str], edit: list[str]
) -> None:
    name = write(tmp_path, 20 * 10**9)
    assert memory_of(tmp_path, *[name if argument == "F" else argument for argument in edit]) < 250 << 20
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 10 * 10**9
    assert sum(path.stat().st_blocks for path in files) * 512 < 100 * 10**6


@pytest.mark.parametrize(
    "edit",
    [["cast", "F", "bfloat16"], ["untie", "F", "head.weight"], ["compact", "F"],
     ["set", "F", "--new", f"note={'x' * 9999}"]],
    ids=lambda edit: edit[0],
)  # fmt: skip
def test_what_makes_new_bytes_takes_little_memory(tmp_path: Path, edit: list[str]) -> None:
    nbytes = GIB // 2 if edit[0] == "cast" else 8 * GIB
    name = write_zip(tmp_path, nbytes)
    assert memory_of(tmp_path, *[name if argument == "F" else argument for argument in edit]) < 250 << 20
