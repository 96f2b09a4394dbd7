"""Print what many commands answer without torch, and the digests of the files that they write.

`make environments` runs this in the development environment and in one with the oldest dependencies, and compares.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from ckpt_cli.cli.main import run

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLES = [
    path
    for folder in ("sample_checkpoints", "tests/samples")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix not in (".py", ".sh") and path.is_file()
]
READING = (
    "ls -a -l {}", "ls -f table {}", "ls --json {}", "show {}", "show --json {}", "stats {}", "stats --json {}",
    "check --deep {}", "hash {}", "diff {0} {0}", "ties --equal {}", "scan {}",
)  # fmt: skip
DTYPES = (
    "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu",
)  # fmt: skip


def answer(line: str) -> None:
    """Run one command line; print it, what it says, and its exit code."""
    print(f"$ ckpt {line}", flush=True)
    print(f"[exit {run(shlex.split(line))}]", flush=True)


def main() -> None:
    """Run all commands in a folder with copies of the samples."""
    sys.modules["torch"] = None  # an import of it fails from now on
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
        for sample in SAMPLES:
            shutil.copy(sample, folder)
        for command in READING:
            for sample in SAMPLES:
                answer(command.format(sample.name))
        for dtype in DTYPES:
            answer(f"cast mlp.pt {dtype} -o {dtype}.pt")
            answer(f"show {dtype}.pt")
            answer(f"stats --json {dtype}.pt")
        answer("set mlp.pt '0.weight[0,:2]=[1.5,-3]' '2.bias*=0.1' -o set.pt")
        answer("set mlp.pt '0.weight=@x.npy' --dry-run")
        for suffix in ("safetensors", "npz"):
            answer(f"convert tied.pt tied-new.{suffix}")
            answer(f"convert mlp.pt mlp-new.{suffix} --dtype float16")
        for path in sorted(Path().iterdir()):
            if path.is_file():
                print(hashlib.sha256(path.read_bytes()).hexdigest(), path)
        os.chdir("/")


main()
