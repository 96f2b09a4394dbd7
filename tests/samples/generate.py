"""Write the small files that the fuzzer damages, beyond the sample checkpoints.

python tests/samples/generate.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from contract import FORMATS, sample  # noqa: E402

SAMPLES = {"module.pt": "zip-module", "script.pt": "torchscript", "program.pt2": "pt2", "old.pt2": "pt2-old"}
"""The file names, and which format of the contract suite writes them."""


def main() -> None:
    """Write every sample."""
    torch.manual_seed(0)
    writers = {each.label: each.write for each in FORMATS}
    for name, label in SAMPLES.items():
        writers[label](sample(), HERE / name)


if __name__ == "__main__":
    main()
