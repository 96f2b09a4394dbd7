"""Write the folders of rank files beside this file: `python generate_ranks.py [NAME…]`.

Written with torch 2.13.0, deepspeed 0.19.8 and megatron-core 0.16.1, on the CPU, with gloo; the latter two run unbuilt
(`DS_ACCELERATOR=cpu`, their sources on PYTHONPATH). Beside most folders, `FOLDER.safetensors` is what the framework
itself puts together: zero_to_fp32, or FSDP's full state dict. `universal1` and `universal3` are what ds_to_universal.py
makes of `zero1` and `zero3`.
"""

import os
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import multiprocessing, nn

HERE = Path(os.environ.get("RANKS_OUT", Path(__file__).parent))
"""The folder that is written to; another one than this file's is written with what else can be compared."""

IS_ELSEWHERE = "RANKS_OUT" in os.environ


class Net(nn.Module):
    """Tied, frozen, odd and one-element parameters, and buffers that are saved and not saved."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.l1 = nn.Linear(3, 7)
        self.norm = norm(7)
        self.l2 = nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("mask", torch.arange(3))
        self.register_buffer("tmp", torch.ones(2), persistent=False)
        if IS_ELSEWHERE:
            self.register_buffer("calls", torch.tensor(3))  # of 0 dimensions, as neither trains a parameter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.l2(self.norm(self.l1(self.emb(x)))) * self.scale
        return self.head(hidden).square().sum() + 0 * self.frozen(self.emb(x)).sum()


def begin(rank: int, world: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.manual_seed(0)


def zero(rank: int, world: int, port: int, name: str, stage: int, bf16: bool, groups: bool) -> None:
    begin(rank, world, port)
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which would compile C++
    net = Net(nn.LayerNorm if bf16 or stage == 3 else nn.BatchNorm1d)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if groups:
        trained = [
            {"params": [each for each in trained if each.ndim > 1], "weight_decay": 0.1},
            {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
        ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
    }
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(trained, lr=0.01), config=config)
    for step in range(2):
        engine.backward(engine(torch.arange(2) + rank % 2 + step))
        engine.step()
    engine.save_checkpoint(str(HERE / name), tag="global_step2", client_state={"epoch": 1})
    if IS_ELSEWHERE:
        from deepspeed.utils import safe_get_full_fp32_param

        live = {
            key: safe_get_full_fp32_param(parameter)
            for key, parameter in net.named_parameters()
            if parameter.requires_grad
        }
        if rank == 0:
            torch.save({key: each.clone() for key, each in live.items()}, HERE / f"{name}.live.pt")


def fsdp(rank: int, world: int, port: int, name: str, mesh: tuple[int, ...], old: bool) -> None:
    begin(rank, world, port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard

    net = Net(nn.LayerNorm).requires_grad_(True)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    if old:
        net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.SHARDED_STATE_DICT):
            torch.save(net.state_dict(), folder / f"model_world_size_{world}_rank_{rank}.pt")
        with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
            full = net.state_dict()
    else:
        names = ("copies", "parts")[-len(mesh) :]
        fully_shard(net, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        net(torch.arange(2) + rank % 2).backward()
        optimizer.step()
        torch.save(net.state_dict(), folder / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save(optimizer.state_dict(), folder / f"optim_world_size_{world}_rank_{rank}.pt")
        if IS_ELSEWHERE:
            torch.distributed.checkpoint.save({"model": net.state_dict()}, checkpoint_id=HERE / f"{name}.dcp")
        full = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        save_file({key: value.clone() for key, value in full.items()}, HERE / f"{name}.safetensors")
    dist.destroy_process_group()


def fsdp1_run(rank: int, world: int, port: int) -> None:
    """Write `verl`, as verl's FSDPCheckpointManager does, and `local`, as Accelerate's save_fsdp_model does."""
    begin(rank, world, port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    net = FullyShardedDataParallel(
        Net(nn.LayerNorm).requires_grad_(True), device_id=torch.device("cpu"), use_orig_params=False
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    net(torch.arange(2) + rank % 2).backward()
    optimizer.step()
    scheduler.step()
    verl, local = HERE / "verl", HERE / "local"
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.SHARDED_STATE_DICT):
        rng = {"cpu": torch.get_rng_state()[:8].clone(), "random": random.Random(0).getstate()[:1]}
        saved = {
            "model": net.state_dict(),
            "optim": optimizer.state_dict(),
            "extra_state": {"lr_scheduler": scheduler.state_dict(), "rng": rng},
        }
        for kind, state in saved.items():
            torch.save(state, verl / f"{kind}_world_size_{world}_rank_{rank}.pt")
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.FULL_STATE_DICT):
        full = net.state_dict()
        if rank == 0:
            save_file({key: value.clone() for key, value in full.items()}, HERE / "verl.safetensors")
    with FullyShardedDataParallel.state_dict_type(net, StateDictType.LOCAL_STATE_DICT):
        torch.save(net.state_dict(), local / f"pytorch_model_fsdp_rank{rank}.bin")
    dist.destroy_process_group()


def join(name: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    full = get_fp32_state_dict_from_zero_checkpoint(str(HERE / name))
    save_file({key: value.clone() for key, value in full.items()}, HERE / f"{name}.safetensors")
    for script in ("zero_to_fp32.py", "zero_to_torch.py"):
        (HERE / name / script).unlink(missing_ok=True)


def megatron() -> None:
    """Write a checkpoint of Megatron-core in its format torch_dist: two layers stacked, and objects in shards."""
    begin(0, 1, 29950)
    dist.init_process_group("gloo")
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    folder = HERE / "megatron"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    key, state = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc1._extra_state"
    layers = [
        ShardedTensor.from_rank_offsets(key, torch.arange(12.0).view(3, 4) + 100 * layer, (0, layer, 2),
                                        prepend_axis_num=1)
        for layer in range(2)
    ]  # fmt: skip
    norm = ShardedTensor.from_rank_offsets("decoder.final_layernorm.weight", torch.ones(4))
    objects = [ShardedObject(state, {"layer": layer}, (12,), (layer,)) for layer in range(12)]
    dist_checkpointing.save(
        {
            "model": {"layers": layers, "norm": norm, "states": objects},
            "optimizer": {"param_groups": [{"lr": 0.01, "weight_decay": 0.1}]},
            "args": SimpleNamespace(hidden_size=4, num_layers=2),
            "iteration": 7,
            "checkpoint_version": 3.0,
            "rng": torch.arange(4, dtype=torch.uint8),
        },
        str(folder),
    )
    dist.destroy_process_group()


def universal(name: str, output: str) -> None:
    """Write the universal checkpoint of one of the others."""
    from deepspeed.checkpoint.ds_to_universal import main as convert

    arguments = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    shutil.rmtree(HERE / output, ignore_errors=True)
    convert(
        SimpleNamespace(
            input_folder=f"{HERE}/{name}/global_step2",
            output_folder=f"{HERE}/{output}/global_step2_universal",
            **arguments,
            **workers,
        )
    )


def main() -> None:
    for place, (name, world, *options) in enumerate(
        [("zero1", 2, 1, True, False), ("zero2", 3, 2, False, True), ("zero3", 3, 3, True, True)]
    ):
        if name not in (sys.argv[1:] or [name]):
            continue
        shutil.rmtree(HERE / name, ignore_errors=True)
        multiprocessing.start_processes(zero, (world, 29700 + place, name, *options), world, start_method="spawn")
        join(name)
    for place, (name, world, *options) in enumerate(
        [("fsdp2", 3, (3,), False), ("hsdp", 4, (2, 2), False), ("fsdp1", 2, (), True)]
    ):
        if name not in (sys.argv[1:] or [name]):
            continue
        shutil.rmtree(HERE / name, ignore_errors=True)
        multiprocessing.start_processes(fsdp, (world, 29800 + place, name, *options), world, start_method="spawn")
    if not {"verl", "local"}.isdisjoint(sys.argv[1:] or ["verl"]):
        for name in ("verl", "local"):
            shutil.rmtree(HERE / name, ignore_errors=True)
            (HERE / name).mkdir()
        multiprocessing.start_processes(fsdp1_run, (2, 29900), 2, start_method="spawn")
    if "megatron" in (sys.argv[1:] or ["megatron"]):
        megatron()
    for number in (1, 3):
        if f"universal{number}" in (sys.argv[1:] or [f"universal{number}"]):
            universal(f"zero{number}", f"universal{number}")


if __name__ == "__main__":
    main()
