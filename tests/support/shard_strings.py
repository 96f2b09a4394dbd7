"""Sets of safetensors shards with strings in their headers and their index."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def shards_of(folder: Path, strings: list[dict[str, str] | None], notes: dict[str, object] | None = None) -> Path:
    """A set of a shard for each map of strings, with an index unless `notes` is None."""
    folder.mkdir()
    names = [f"model-{number:05}-of-{len(strings):05}.safetensors" for number in range(1, len(strings) + 1)]
    for number, (name, metadata) in enumerate(zip(names, strings, strict=True)):
        save_file({f"t{number}": torch.full((2,), float(number))}, folder / name, metadata=metadata)
    if notes is not None:
        weight_map = {f"t{number}": name for number, name in enumerate(names)}
        (folder / INDEX).write_text(json.dumps({"metadata": notes, "weight_map": weight_map}))
    return folder


def strings_in(folder: Path) -> list[dict[str, str] | None]:
    """What the library reads from each shard."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(file.metadata())
    return found


def notes_in(folder: Path) -> dict[str, object]:
    """What the index says beside the names."""
    notes: dict[str, object] = json.loads((folder / INDEX).read_text())["metadata"]
    return notes
