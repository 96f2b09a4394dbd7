"""Write the sample checkpoints: the two networks of the lesson on parameters, and a training checkpoint.

Run by `make samples`; the files are committed, so that the tool can be tried without torch.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file, save_model
from torch import nn

FOLDER = Path(__file__).parent


def mlp() -> nn.Sequential:
    """`net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def tied_mlp() -> nn.Sequential:
    """A network whose layers 2 and 4 are the same module; its layer 6 has an equal copy of layer 2's bias."""
    torch.manual_seed(1)
    shared = nn.Linear(8, 8)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)
    )
    with torch.no_grad():
        net[6].bias.copy_(shared.bias)
    return net


def trained() -> dict[str, object]:
    """A training checkpoint: model, Adam state, epoch, arguments, and an object of a class that nobody can import."""
    net = mlp()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 2,
        "args": argparse.Namespace(lr=1e-3, data="imagenet", layers=[4, 8, 1]),
        "meter": _private_class()(),
    }


def _private_class() -> type:
    """A class in a module that exists only while this script runs."""
    module = types.ModuleType("lab.meters")

    def start(self: object) -> None:
        vars(self).update(sum=3.5, n=7)

    kind = type("AverageMeter", (), {"__module__": "lab.meters", "__init__": start})
    module.AverageMeter = kind  # type: ignore[attr-defined]
    sys.modules.setdefault("lab", types.ModuleType("lab"))
    sys.modules["lab.meters"] = module
    return kind


def main() -> None:
    """Write every sample."""
    torch.save(mlp().state_dict(), FOLDER / "mlp.pt")
    torch.save(tied_mlp().state_dict(), FOLDER / "tied.pt")
    torch.save(trained(), FOLDER / "train.pt")
    save_file(mlp().state_dict(), FOLDER / "mlp.safetensors", metadata={"format": "pt"})
    save_model(tied_mlp(), str(FOLDER / "tied.safetensors"))


if __name__ == "__main__":
    main()
