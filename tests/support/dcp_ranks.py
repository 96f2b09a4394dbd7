"""Saves tensors from several ranks, sharded; each request is a line of JSON on stdin, `[WORLD, STATE, OUT]`.

`STATE` is a torch.save file; the ranks meet at `OUT.meet`. The name of a tensor says how it is sharded. The ranks of
all requests are forks of one process, for most of the time would go into importing torch in each. The answer is 1 where
a rank fails, which says why on stderr, else 0.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

ROWS, COLUMNS = ("0.weight", "3.running_mean"), ("2.weight", "4.columns")


def save(rank: int, world: int, state: str, out: str) -> None:
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


def save_by_ranks(world: int, state: str, out: str) -> int:
    """Save by every rank; returns 1 where one fails."""
    ranks = [os.fork() or _run(rank, world, state, out) for rank in range(world)]
    return int(any(os.waitpid(rank, 0)[1] for rank in ranks))


def _run(rank: int, world: int, state: str, out: str) -> int:
    """Be one rank, in a process of its own, which ends here."""
    try:
        save(rank, world, state, out)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    for line in sys.stdin:
        print(save_by_ranks(*json.loads(line)), flush=True)
