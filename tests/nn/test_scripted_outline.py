"""`ckpt tree` of TorchScript: the true classes, with what their shapes tell."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
import torch
from torch import nn
from trees import graph_tree, text_of

from ckpt_cli.nn.tree import Tree, walk


def scripted(module: Any) -> Tree:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return graph_tree(archive.read(name))


class Scripted(nn.Module):
    """Layers of which TorchScript keeps few settings."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Dropout(), nn.LayerNorm(3))
        self.conv = nn.ConvTranspose2d(3, 5, 3)
        self.bn = nn.BatchNorm2d(5)
        self.lstm = nn.LSTM(2, 3, 2, bidirectional=True)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.table = nn.Embedding(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_has_its_true_classes_and_what_its_shapes_tell() -> None:
    assert text_of(scripted(torch.jit.script(Scripted())), bare=True) == (
        "Scripted(\n"
        "  (seq): Sequential(\n"
        "    (0): Linear(in_features=2, out_features=3, bias=False)\n"
        "    (1): ReLU()\n"
        "    (2): Dropout()\n"
        "    (3): LayerNorm((3,))\n"
        "  )\n"
        "  (conv): ConvTranspose2d(3, 5, kernel_size=(3, 3), stride=?)\n"
        "  (bn): BatchNorm2d(5)\n"
        "  (lstm): LSTM(2, 3, num_layers=2, bidirectional=True)\n"
        "  (blocks): ModuleList(\n"
        "    (0-1): 2 x Linear(in_features=2, out_features=2, bias=True)\n"
        "  )\n"
        "  (table): Embedding(5, 4)\n"
        ")\n"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_module_is_told_by_names_without_their_mangling() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Tanh())
    found = scripted(torch.jit.trace(net, torch.ones(1, 2)))
    assert text_of(found, bare=True) == f"{net!r}\n"
    assert {branch.description.qualified for branch in walk(found.root)} == {
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.activation.Tanh",
    }
