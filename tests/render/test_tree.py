"""The command `ckpt tree`: options, JSON, rows, and text that cannot write to the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import Ckpt
from torch import nn
from trees import Network


def test_depth_leaves_out_what_lies_deeper(tree: Any) -> None:
    net = Network()
    assert tree(net, "--depth", "0") == "Network(...)\n"
    assert "  (h): ModuleList(...)\n" in tree(net, "--depth", "1")
    assert "    (0-2): 3 x Block(dim=8, act='gelu', ...)\n" in tree(net, "--depth", "2")


def test_a_name_shows_one_subtree_and_a_wrong_one_suggests_others(tree: Any, tmp_path: Path, ckpt: Ckpt) -> None:
    assert tree(Network(), "h.1.norm") == "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)\n"
    answer = ckpt("tree", tmp_path / "x.pt", "h.1.nrm")
    assert answer.code == 2
    assert "did you mean h.1.norm" in answer.err
    assert "did you mean h.1.norm?" in ckpt("tree", tmp_path / "x.pt", "h.1.norm.weight").err


def test_json_has_its_documented_keys_and_points_at_ties(tree: Any) -> None:
    told = json.loads(tree({"a.weight": (shared := torch.ones(2, 3)), "b.weight": shared}, "--json"))
    assert set(told) == {"path", "format", "inferred", "tree"}
    assert told["inferred"] is True
    first, second = told["tree"]["children"]
    assert first == {
        "name": "a",
        "path": "a",
        "class": "Linear",
        "text": "Linear(in_features=3, out_features=2, bias=False)",
        "inferred": True,
        "parameters": 6,
        "nbytes": 24,
        "tied_to": None,
        "tensors": [
            {"name": "a.weight", "kind": "tensor", "dtype": "float32", "shape": [2, 3], "numel": 6, "nbytes": 24}
        ],
        "children": [],
    }
    assert second["tied_to"] == "a"


def test_rows_have_a_module_each(tree: Any) -> None:
    rows = [line.split("\t") for line in tree({"0.weight": torch.ones(2, 3)}, "-f", "tsv").splitlines()]
    assert rows == [
        ["''", "Sequential()", "6", "24", "yes", ""],
        ["0", "Linear(in_features=3, out_features=2, bias=False)", "6", "24", "yes", ""],
    ]


def test_names_and_settings_cannot_write_to_the_terminal(tree: Any) -> None:
    net = nn.Conv2d(1, 1, 1)
    net.padding_mode = "\x1b[31m\nred"
    for saved in (net, {"a\x1b[31m.weight": torch.ones(2, 2)}, {"x\n": net}):
        for style in ("auto", "table", "tsv"):
            out = tree(saved, "-f", style)
            assert out.replace("\n", "").replace("\t", "").isprintable()
            assert "\nred" not in out
