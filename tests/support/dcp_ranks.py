"""Saves the contract's sample from several ranks, its tensors sharded: run as `dcp_ranks.py RANK WORLD STATE OUT`.

`STATE` is a torch.save file; the ranks meet at `OUT.meet`. How a tensor is sharded is told by its name.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

ROWS, COLUMNS = ("0.weight", "3.running_mean"), ("2.weight", "4.columns")


def main(rank: int, world: int, state: str, out: str) -> None:
    """Shard the state over the ranks and save it together."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2, world // 2) if world > 2 else (world,))
    sharded = {}
    for name, tensor in torch.load(state).items():
        if name in ROWS or name in COLUMNS:
            dim = int(name in COLUMNS)
            placements = [Shard(dim), Shard(1 - dim)] if world > 2 else [Shard(dim)]
        else:
            placements = [Replicate()] * mesh.ndim
        sharded[name] = distribute_tensor(tensor.contiguous(), mesh, placements)
    dcp.save(sharded, checkpoint_id=out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
