"""Every command works where torch is not installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import Ckpt

COMMANDS = (
    "ls -a train.pt", "info train.pt", "tree train.pt", "show mlp.pt", "ties tied.pt --equal", "stats tied.pt --total",
    "diff mlp.pt mlp.safetensors", "match mlp.pt mlp.safetensors", "series mlp.pt mlp.safetensors",
    "check --deep tied.pt", "hash mlp.pt", "scan train.pt",
    "set mlp.pt 2.bias=0 --backup", "undo mlp.pt", "rename mlp.pt 2 last", "rm mlp.pt 0.bias", "keep mlp.pt 0",
    "cast mlp.pt bfloat16", "tie tied.pt 2.weight 6.weight --force", "untie tied.pt 4.bias", "compact tied.pt -n",
    "to tied.pt cuda:1", "resize mlp.pt 0.weight=3 -o resized.pt", "avg train.pt train.pt -o mean.pt",
    "merge mlp.pt tied.safetensors --prefix tied.safetensors=b -o both.pt", "graft both.pt mlp.pt:0",
    "mix mlp.pt mlp.pt --method ties --density 0.5 -o mix.pt",
    "delta create mlp.pt both.pt -o delta.safetensors", "delta apply mlp.pt delta.safetensors -o applied.pt",
    "lora info lora/adapter --base lora/base.safetensors",
    "dequantize quantized/model.safetensors -o plain.safetensors",
    "lora extract lora/base.safetensors lora/merged.safetensors --rank 2 -o extracted",
    "lora resize extracted --rank 1 -o smaller",
    "apply tied.pt recipe.toml -o recipe.pt",
    "lora merge lora/base.safetensors lora/adapter -o merged.safetensors",
    "meta tied.safetensors a=b", "convert tied.pt dcp --to dcp", "convert tied.pt new.safetensors",
    "convert tied.pt new.npz", "convert new.safetensors shards --max-shard 300B", "convert shards joined.pt",
    "index shards",
    "convert shards bin --to hf-bin --dtype float16",
)  # fmt: skip

SCRIPT = """
import json, sys

sys.modules["torch"] = None  # an import of it fails from now on
from ckpt_cli.cli.main import run

codes = {command: run(command.split()) for command in json.loads(sys.argv[1])}
print("\\n" + json.dumps(codes))
"""


def test_every_command_works_where_torch_is_not_installed(work: Path) -> None:
    shutil.copytree(Path(__file__).parent.parent / "samples" / "lora" / "linear", "lora")
    shutil.copytree(Path(__file__).parent.parent / "samples" / "quantized" / "deepseek", "quantized")
    Path("recipe.toml").write_text('version = 1\n[[step]]\nremove = ["0.bias"]\n')
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMMANDS)], capture_output=True, text=True, check=True
    )
    codes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    nothing_to_do = {"compact tied.pt -n": 2}
    assert {command: code for command, code in codes.items() if code} == nothing_to_do, done.stderr


def test_all_commands_are_among_them(ckpt: Ckpt) -> None:
    rows = ckpt("--help").out.split("\nLook:\n")[1].splitlines()
    assert {row.split()[0] for row in rows if row.startswith("  ") and row[2:3].strip()} == {
        command.split()[0] for command in COMMANDS
    }
