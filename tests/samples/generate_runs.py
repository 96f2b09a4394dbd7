"""Write the folders of training runs beside this file: `python generate_runs.py [NAME…]`.

Written with torch 2.13.0, transformers 5.24.0, accelerate 1.15.0 and peft 0.21.2, on the CPU: `trainer` by Hugging
Face's Trainer, `trainer_lora` by it with a PEFT adapter, `accelerate` by `Accelerator.save_state`. The folders have
whatever these write, so that the names and contents of the files are theirs.
"""

import os
import shutil
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


RUNS = {
    "trainer": trainer,
    "trainer_lora": lambda name: trainer(name, lora=True),
    "accelerate": accelerate,
}

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(HERE)  # as training_args.bin has the path of the folder
    for name in sys.argv[1:] or RUNS:
        shutil.rmtree(name, ignore_errors=True)
        torch.manual_seed(0)
        RUNS[name](name)
