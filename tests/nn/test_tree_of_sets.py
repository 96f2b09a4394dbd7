"""The tree of a set of shards folds equal blocks as that of the joined file does, wherever a shard ends."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_cli.formats import open_checkpoint
from ckpt_cli.nn.tree import tree_of
from ckpt_cli.render.tree import View, tree_text

BLOCKS = 6

TENSORS = {
    f"model.layers.{number}.{name}": torch.zeros(shape)
    for number in range(BLOCKS)
    for name, shape in (
        ("attn.q_proj.weight", (4, 4)),
        ("attn.o_proj.weight", (4, 4)),
        ("mlp.up.weight", (8, 4)),
        ("mlp.up.bias", (8,)),
        ("norm.weight", (4,)),
    )
}


def shards(folder: Path, groups: list[list[str]], suffix: str) -> Path:
    """Write a set with some names in each shard."""
    folder.mkdir(exist_ok=True)
    places = {}
    for number, names in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.{suffix}"
        part = {name: TENSORS[name].clone() for name in names}
        if suffix == "safetensors":
            save_file(part, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard)
        places |= dict.fromkeys(names, shard)
    (folder / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def folded(path: Path) -> list[str]:
    """The lines of the blocks: which are one line, and what is in it, whatever its order."""
    checkpoint = open_checkpoint(str(path))
    try:
        lines = list(tree_text(tree_of(checkpoint), View(), "text"))
    finally:
        checkpoint.close()
    return sorted(re.sub(r"\s*#.*", "", line).strip() for line in lines)


def joined(folder: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in TENSORS.items()}, folder / "one.safetensors", {"format": "pt"})
    return folder / "one.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("ends", [(3, 13), (8, 14, 22), (1,), (29,)])
def test_blocks_that_shards_cut_are_one_line(tmp_path: Path, suffix: str, ends: tuple[int, ...]) -> None:
    names = list(TENSORS)
    groups = [names[begin:end] for begin, end in zip((0, *ends), (*ends, len(names)), strict=True)]
    lines = folded(shards(tmp_path / "set", groups, suffix))
    assert lines == folded(joined(tmp_path))
    assert any(f"{BLOCKS} x" in line for line in lines)


@settings(deadline=None, max_examples=30)
@given(st.permutations(list(TENSORS)), st.integers(1, 5))
def test_the_order_of_names_does_not_matter(names: list[str], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        groups = [group for group in (names[number::count] for number in range(count)) if group]
        assert folded(shards(Path(folder) / "set", groups, "bin")) == folded(joined(Path(folder)))


def test_blocks_that_differ_are_not_one_line(tmp_path: Path) -> None:
    names = [name for name in TENSORS if name != "model.layers.3.mlp.up.bias"]
    lines = folded(shards(tmp_path / "set", [names[:7], names[7:]], "safetensors"))
    assert not any(f"{BLOCKS} x" in line for line in lines)
