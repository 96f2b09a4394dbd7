"""`ckpt tree` sums parameters and bytes of each module, and points at modules that are tied."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from trees import Network

from ckpt_cli.nn.tree import Tree, walk


def sizes(found: Tree) -> dict[str, tuple[int, int]]:
    return {branch.path: (branch.parameters, branch.nbytes) for branch in walk(found.root)}


def test_parameters_and_bytes_count_ties_once_within_each_subtree(tree: Any) -> None:
    net = Network()
    told = json.loads(tree(net, "--json", "--full"))
    assert told["inferred"] is False
    counted = {}
    stack = [told["tree"]]
    while stack:
        branch = stack.pop()
        counted[branch["path"]] = (branch["parameters"], branch["nbytes"])
        stack += branch["children"]
    for name, module in net.named_modules(remove_duplicate=False):
        expected = sum(parameter.numel() for parameter in module.parameters())
        assert counted[name] == (expected, 4 * expected), name


def test_a_tied_module_points_at_the_first_one(tree: Any) -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert "  (2): = (0)\n)" in tree(net)
    assert tree(net, "--bare") == f"{net!r}\n"
    assert "(2): = (0)" not in tree(net, "--full")
    state = net.state_dict()
    assert "  (2): = (0)\n)" in tree(state)
    assert "= (model)" in tree({"model": net, "ema": net})


def test_a_module_of_another_class_is_told_to_be_tied_and_shown(tree: Any) -> None:
    out = tree(Network(), "-f", "table")
    line = next(line for line in out.splitlines() if "(head)" in line)
    text, note = line.split("  # ")
    assert text.strip() == "(head): Linear(in_features=8, out_features=10, bias=False)"
    assert note == "80 parameters, 320 B, tied to wte"
    assert "(act2): = (act)" in out
    assert "(down): None" in out


def test_equal_values_that_are_stored_apart_are_not_tied(tree: Any) -> None:
    assert " = (" not in tree({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)})


def test_modules_without_tensors_are_only_tied_where_they_are_one_object(tree: Any) -> None:
    relu = nn.ReLU()
    out = tree(nn.Sequential(relu, nn.ReLU(), relu))
    assert out == "Sequential(\n  (0): ReLU()\n  (1): ReLU()\n  (2): = (0)\n)\n"
