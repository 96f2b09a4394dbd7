"""The requests and bytes of commands on checkpoints elsewhere: held by tests, and shown by docs/remote.md."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

SHARDS = 9


@dataclass(frozen=True)
class Cost:
    """What a command costs on each kind of server."""

    of: str
    """The checkpoint, in words."""
    commands: tuple[str, ...]
    """Those that cost the same; `FILE` is where the checkpoint is."""
    name: str
    """The path of the checkpoint below what `build` makes."""
    https: int
    """Requests."""
    s3: int
    hf: int
    """To the hub and its CDN together."""
    most_bytes: int
    """A bound for the bytes of all replies, on every server."""
    size: str
    """The bytes in words, for the documentation."""

    def requests(self, kind: str) -> int:
        """The requests that it takes on a kind of server."""
        return {"https": self.https, "s3": self.s3, "hf": self.hf}[kind]


COSTS = (
    Cost("a zip `.pt` of 1 GB with 200 tensors", ("ls FILE", "info FILE", "tree FILE", "ties FILE"),
         "one/big.pt", 2, 2, 3, 600_000, "0.54 MB"),
    Cost("the same", ("show FILE 'layers.7.weight[:5]'",), "one/big.pt", 3, 3, 4, 620_000, "0.55 MB"),
    Cost("a safetensors file, header 0.8 MB", ("ls FILE", "tree FILE"), "one/m.safetensors", 2, 2, 3,
         1_100_000, "the header and at most 0.3 MB"),
    Cost("a legacy `.pt` of 50 storages", ("ls FILE",), "one/legacy.pt", 1, 1, 2, 300_000, "0.02 MB"),
    Cost("a set of 9 shards with an index", ("ls FILE", "info FILE", "tree FILE"), "set",
         SHARDS + 2, SHARDS + 2, 2 * SHARDS + 3, SHARDS * 300_000, "0.26 MB a shard"),
    Cost("the same, by its index", ("ls FILE/model.safetensors.index.json",), "set",
         SHARDS + 1, SHARDS + 2, 2 * SHARDS + 3, SHARDS * 300_000, "0.26 MB a shard"),
    Cost("a `torch.distributed.checkpoint` folder", ("ls FILE",), "dcp", 3, 2, 3, 300_000,
         "`.metadata`; over https 0.26 MB a file"),
)  # fmt: skip
"""One row for each, as measured."""


def build(folder: Path) -> None:
    """Write the checkpoints that the costs are of."""
    import torch
    from safetensors.torch import save_file
    from torch.distributed import checkpoint as dcp

    (folder / "one").mkdir()
    (folder / "set").mkdir()
    with torch.serialization.skip_data():
        state = {f"layers.{number}.weight": torch.empty(1_310_720) for number in range(200)}
        torch.save(state, folder / "one" / "big.pt")
    save_file({f"layers.{number}.weight": torch.zeros(4, 4) for number in range(10_000)}, folder / "one/m.safetensors")
    legacy = {f"layers.{number}": torch.zeros(50) for number in range(50)}
    torch.save(legacy, folder / "one" / "legacy.pt", _use_new_zipfile_serialization=False)
    places = {}
    for number in range(1, SHARDS + 1):
        name = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        save_file({f"w{number}": torch.zeros(300, 300)}, folder / "set" / name, metadata={"format": "pt"})
        places[f"w{number}"] = name
    index = {"metadata": {"total_size": SHARDS * 360_000}, "weight_map": places}
    (folder / "set" / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({f"w{number}": torch.ones(1000) for number in range(20)}, checkpoint_id=folder / "dcp", no_dist=True)
