"""Write `tests/samples/lora`: small models, adapters that PEFT makes of them, and what PEFT merges.

    python tests/oracles/lora_samples.py [FOLDER]    # in an environment with tests/oracles/requirements.txt

Each case is a folder: `base.safetensors`, `adapter/` as PEFT saves it, and `merged.safetensors`, the state_dict after
`merge_and_unload`. Factors are random, so that nothing is zero. With a FOLDER the cases are written there, from other
random numbers; `make oracles` does that.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn

SAMPLES = Path(__file__).parent.parent / "samples" / "lora"


class Net(nn.Module):
    """A model with a module of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 10), "norm": nn.LayerNorm(10)}) for _ in range(2))
        self.conv = nn.Conv2d(3, 5, 3)
        self.point = nn.Conv2d(5, 4, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(10, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Transposed(nn.Module):
    """Conv1D of transformers, whose weights are in × out, also square ones."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.attn = Conv1D(18, 6)
        self.proj = Conv1D(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


ALL = ["embed", "q", "conv", "point", "line", "head"]

CASES: dict[str, tuple[type[nn.Module], torch.dtype, dict[str, Any]]] = {
    "linear": (Net, torch.float32, {"target_modules": ["q", "head"], "r": 4, "lora_alpha": 16}),
    "rank1": (Net, torch.float32, {"target_modules": ["q", "head"], "r": 1, "lora_alpha": 3}),
    "patterns": (
        Net, torch.bfloat16,
        {"target_modules": ["q", "head"], "r": 4, "lora_alpha": 16, "rank_pattern": {"head": 2},
         "alpha_pattern": {"layers.1.q": 5, r".*\.0\.q": 7, "^head": 9}, "use_rslora": True},
    ),
    "embedding": (Net, torch.float32, {"target_modules": ["embed", "q"], "r": 4, "lora_alpha": 8}),
    "embedding-bfloat16": (Net, torch.bfloat16, {"target_modules": ["embed", "q"], "r": 4, "lora_alpha": 8}),
    "conv": (Net, torch.float32, {"target_modules": ["conv", "point", "line"], "r": 2, "lora_alpha": 8}),
    "saved": (
        Net, torch.bfloat16,
        {"target_modules": ["q"], "r": 2, "lora_alpha": 8, "modules_to_save": ["norm", "head"]},
    ),
    "bias": (Net, torch.float32, {"target_modules": ["q"], "r": 2, "lora_alpha": 8, "lora_bias": True}),
    "dora": (Net, torch.bfloat16, {"target_modules": ALL, "r": 3, "lora_alpha": 8, "use_dora": True}),
    "transposed": (
        Transposed, torch.float32,
        {"target_modules": ["attn", "proj"], "r": 3, "lora_alpha": 8, "fan_in_fan_out": True},
    ),
    "transposed-dora": (
        Transposed, torch.bfloat16,
        {"target_modules": ["attn", "proj"], "r": 3, "lora_alpha": 8, "fan_in_fan_out": True, "use_dora": True},
    ),
}  # fmt: skip


def write(folder: Path, name: str, seed: int) -> None:
    """Write one case."""
    kind, dtype, settings = CASES[name]
    torch.manual_seed(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = kind().to(dtype)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "base.safetensors")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for key, value in wrapped.named_parameters():
        if "lora_" in key:
            value.data = value.data.float()
            value.data += torch.randn(value.shape) / 4
        elif "modules_to_save" in key:
            value.data = torch.randn(value.shape).to(value.dtype)
    wrapped.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    merged = wrapped.merge_and_unload().state_dict()
    save_file({key: value.clone() for key, value in merged.items()}, folder / "merged.safetensors")


def main(arguments: list[str]) -> int:
    """Write all cases; returns the exit code."""
    target = Path(arguments[0]) if arguments else SAMPLES
    first = torch.seed() % 2**32 if arguments else 0
    for seed, name in enumerate(CASES, first):
        write(target / name, name, seed)
        print(f"{name}: written by peft {peft.__version__}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
