"""Write the folders of training runs beside this file: `python generate_runs.py [NAME…]`.

Written with torch 2.13.0, transformers 5.24.0, accelerate 1.15.0 and peft 0.21.2, on the CPU: `trainer` by Hugging
Face's Trainer, `trainer_lora` by it with a PEFT adapter, and `accelerate` by `Accelerator.save_state`. So are
`accelerate_sharded` and `accelerate_full`, by two processes (gloo) that each have a part of the model (torch's
`fully_shard`, as Accelerate does not prepare it on a CPU itself). The folders have whatever these write, so that the
names and contents of the files are theirs.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


def trainer(name: str, *, lora: bool = False) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        output_dir=name, max_steps=4, save_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=1,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for folder in Path(name).iterdir():
        for each in folder.glob("README.md"):
            each.unlink()


def accelerate(name: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    data = torch.utils.data.DataLoader([torch.ones(3), torch.zeros(3)], batch_size=2, shuffle=True)
    model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)
    accelerator.register_for_checkpointing(scheduler)
    for batch in data:
        accelerator.backward(model(batch).square().sum())
        optimizer.step()
        scheduler.step()
    accelerator.save_state(name)


def of_rank(rank: int, name: str, kind: str, port: int) -> None:
    """Save what one of two processes has."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=f"{kind}_STATE_DICT", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    accelerator._models.append(model)
    accelerator._optimizers.append(optimizer)
    accelerator._schedulers.append(scheduler)
    accelerator.save_state(name)


def sharded(name: str, kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(of_rank, args=(name, kind, port), nprocs=2, start_method="spawn")


RUNS = {
    "trainer": trainer,
    "trainer_lora": lambda name: trainer(name, lora=True),
    "accelerate": accelerate,
    "accelerate_sharded": lambda name: sharded(name, "SHARDED"),
    "accelerate_full": lambda name: sharded(name, "FULL"),
}

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(HERE)  # as training_args.bin has the path of the folder
    for name in sys.argv[1:] or RUNS:
        shutil.rmtree(name, ignore_errors=True)
        torch.manual_seed(0)
        RUNS[name](name)
