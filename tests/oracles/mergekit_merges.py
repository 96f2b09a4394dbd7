"""Merge small models with mergekit, for `ckpt avg` and `ckpt mix` to give the same bits.

Run by `make oracles`: `python mergekit_merges.py FOLDER [SEED]` writes three Llama models of random float32 weights,
FOLDER/base.safetensors, one and two, and what mergekit makes of them in float32, rounded once to bfloat16: linear,
task, ties and slerp. The samples of the tests are those of seed 0.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip


def models(folder: Path, seed: int) -> None:
    """Write a base, and two models that differ from it by noise in which no two magnitudes are equal."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.float32)
    for name in ("base", "one", "two"):
        if name != "base":
            for parameter in base.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        base.to(torch.float32).save_pretrained(folder / name)


def merged(folder: Path, name: str, configuration: dict) -> None:
    configuration |= {"dtype": "float32", "out_dtype": "bfloat16"}
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(configuration)))
    run_merge(config, str(folder / name), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))


def main(target: Path, folder: Path, seed: int) -> None:
    models(folder, seed)
    base, one, two = (str(folder / name) for name in ("base", "one", "two"))
    weighted = [{"model": one, "parameters": {"weight": 0.7}}, {"model": two, "parameters": {"weight": 0.4}}]
    merged(folder, "linear", {"merge_method": "linear", "models": weighted})
    merged(folder, "task", {"merge_method": "task_arithmetic", "base_model": base, "models": weighted})
    sparse = [{"model": each["model"], "parameters": {**each["parameters"], "density": 0.3}} for each in weighted]
    merged(folder, "ties", {"merge_method": "ties", "base_model": base, "models": sparse})
    merged(folder, "slerp", {
        "merge_method": "slerp", "base_model": base, "models": [{"model": base}, {"model": two}],
        "parameters": {"t": 0.35},
    })  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    for name in ("base", "one", "two", "linear", "task", "ties", "slerp"):
        shutil.copyfile(folder / name / "model.safetensors", target / f"{name}.safetensors")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
