"""Indices of variants have the names that transformers and diffusers look for: `model.safetensors.index.fp16.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

VARIANTS = [
    ("model.fp16", ".safetensors", "model.safetensors.index.fp16.json"),
    ("diffusion_pytorch_model.bf16", ".safetensors", "diffusion_pytorch_model.safetensors.index.bf16.json"),
    ("pytorch_model.fp16", ".bin", "pytorch_model.bin.index.fp16.json"),
    ("llama-2.7b", ".safetensors", "llama-2.7b.safetensors.index.json"),
    ("model", ".safetensors", "model.safetensors.index.json"),
]


def shards(folder: Path, stem: str, suffix: str) -> Path:
    """Two shards of one tensor each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        path = folder / f"{stem}-{number:05}-of-00002{suffix}"
        state = {f"t{number}": torch.full((2,), float(number))}
        save_file(state, path, metadata={"format": "pt"}) if suffix == ".safetensors" else torch.save(state, path)
    return folder


@pytest.mark.parametrize(("stem", "suffix", "index"), VARIANTS)
def test_the_index_of_a_variant_is_written_and_read_under_the_name_that_loaders_look_for(
    tmp_path: Path, ckpt: Ckpt, stem: str, suffix: str, index: str
) -> None:
    folder = shards(tmp_path / "m", stem, suffix)
    assert ckpt("index", folder).code == 0
    assert [path.name for path in folder.glob("*.json")] == [index]
    listed = json.loads(ckpt("ls", folder / index, "--json").out)
    assert json.loads(ckpt("ls", folder, "--json").out)["entries"] == listed["entries"]
    assert len(listed["entries"]) == 2
    assert ckpt("check", folder).code == 0
    assert f"one shard of {index}" in ckpt("ls", folder / f"{stem}-00001-of-00002{suffix}").err
    before = (folder / index).read_bytes()
    (folder / index).write_text("{}")
    assert ckpt("index", folder).code == 0
    assert (folder / index).read_bytes() == before
    assert json.loads(ckpt("info", folder, "--json").out)["shards"] == 2


def test_an_index_published_under_the_other_name_stays_where_it_is(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards(tmp_path / "m", "model.fp16", ".safetensors")
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    assert ckpt("index", folder).code == 0
    assert [path.name for path in folder.glob("*.json")] == ["model.fp16.safetensors.index.json"]
    assert ckpt("ls", folder).code == 0


def test_a_variant_beside_the_plain_set_has_an_index_of_its_own(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = shards(shards(tmp_path / "m", "model", ".safetensors"), "model.fp16", ".safetensors")
    assert "name one of them" in ckpt("index", folder).err
    for index in ("model.safetensors.index.json", "model.safetensors.index.fp16.json"):
        assert ckpt("index", folder / index).code == 0
        assert all(
            name.startswith(index.split(".")[0] + (".fp16-" if "fp16" in index else "-"))
            for name in json.loads((folder / index).read_text())["weight_map"].values()
        )
    assert ckpt("ls", folder).code == 0  # the plain one, as loaders take it that are given no variant


def test_a_component_of_a_pipeline_is_indexed_in_its_own_folder(tmp_path: Path, ckpt: Ckpt) -> None:
    shards(tmp_path / "pipe" / "unet", "diffusion_pytorch_model", ".safetensors")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    answer = ckpt("index", tmp_path / "pipe")
    assert answer.code == 2
    assert "without shards" in answer.err
    assert ckpt("index", tmp_path / "pipe" / "unet").code == 0
    assert (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
