"""Networks to pickle, and the trees that `ckpt tree` makes of a saved object and of a bare pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ckpt_cli.model.checkpoint import Checkpoint, Storage
from ckpt_cli.nn.tree import Tree, tree_of
from ckpt_cli.pickles.flatten import entries_of
from ckpt_cli.pickles.read import read_pickle
from ckpt_cli.render.tree import View, tree_text


class Block(nn.Module):
    """A transformer's block, of a class that ckpt cannot import."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.act, self._cache, self.none = dim, "gelu", 3, None
        self.attn = nn.MultiheadAttention(dim, 2)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Network(nn.Module):
    """Tied weights, repeated blocks, a parameter of its own, a shared activation and a child that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(10, 8)
        self.h = nn.ModuleList([Block(8) for _ in range(3)])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.wte.weight
        self.scale = nn.Parameter(torch.ones(1, 8))
        self.act = nn.ReLU()
        self.act2 = self.act
        self.register_module("down", None)


class Plain(nn.Module):
    """A class whose instances have no settings of their own, so that print(net) tells what ckpt tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.down = None
        self.register_module("up", None)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)])


class _AnyStorage:
    """A finder that has every storage."""

    big_endian = False

    def __init__(self) -> None:
        self.known: dict[str, Storage] = {}

    def find(self, key: str, nbytes: int, location: str) -> Storage:
        return self.known.setdefault(key, Storage(key, nbytes, location))


def graph_tree(data: bytes, offset: int = 0) -> Tree:
    """The tree of a pickle by itself."""
    graph = read_pickle(data, offset=offset)
    entries = entries_of(graph, _AnyStorage())
    container: Any = None
    return tree_of(Checkpoint("x", "test", entries, container, document=graph))


def text_of(found: Tree, style: str = "auto", **options: Any) -> str:
    return "".join(tree_text(found, View(**options), style))
