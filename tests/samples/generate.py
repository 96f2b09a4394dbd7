"""Write the small files that the fuzzer damages, beyond the sample checkpoints.

python tests/samples/generate.py
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from builders import old  # noqa: E402
from contract import FORMATS, sample  # noqa: E402

SAMPLES = {"module.pt": "zip-module", "script.pt": "torchscript", "program.pt2": "pt2", "old.pt2": "pt2-old"}
"""The file names, and which format of the contract suite writes them."""


def write_old_formats() -> None:
    """What was written before the zip files, and what numpy and pickle write."""
    weight = torch.randn(3, 4)
    state = {"w": weight, "tied": weight, "b": torch.ones(4, dtype=torch.bfloat16), "epoch": 3, "a": np.arange(4.0)}
    torch.save(state, HERE / "legacy.pt", _use_new_zipfile_serialization=False)
    with (HERE / "two.pt").open("wb") as file:
        for _ in range(2):
            torch.save({"w": weight}, file, _use_new_zipfile_serialization=False)
    storage = old.TarStorage(5, "Float", np.arange(4, dtype="<f4").tobytes())
    tensors = [old.TarTensor(9, 5, "Float", (2, 2), (2, 1)), old.TarTensor(10, 6, "Float", (2,), (1,))]
    root = {"a": old.numbered(9), "p": old.numbered(10)}
    (HERE / "old.tar").write_bytes(old.tar(root, [storage], tensors, [(6, 5, 1, 3)]))
    item = {
        "t": weight,
        "a": np.asfortranarray(np.ones((2, 3))),
        "s": np.float32(2),
        "o": np.array([None]),
        "n": [1, "x"],
    }
    for protocol in (0, 2, 5):
        (HERE / f"pickle{protocol}.pkl").write_bytes(pickle.dumps(item, protocol))
    np.save(HERE / "x.npy", np.arange(6.0).reshape(2, 3))
    np.savez(HERE / "x.npz", a=np.ones(3), b=np.arange(4, dtype=">i2"))
    np.savez_compressed(HERE / "packed.npz", a=np.ones(300), b=np.arange(4))


def main() -> None:
    """Write every sample."""
    torch.manual_seed(0)
    write_old_formats()
    writers = {each.label: each.write for each in FORMATS}
    for name, label in SAMPLES.items():
        writers[label](sample(), HERE / name)


if __name__ == "__main__":
    main()
