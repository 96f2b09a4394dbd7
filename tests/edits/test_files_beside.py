"""Config, tokenizer and other small files beside the weights of a model go along into a new folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file

SMALL = {
    "config.json": b'{"torch_dtype": "float32"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\x0a\x01x",
    "README.md": b"# a model",
    "modeling_x.py": b"x = 1\n",
}
NOT_COPIED = {
    "other.gguf": b"GGUF",
    "pytorch_model.bin": b"\x80\x02}.",
    "disguised.txt": b"PK\x03\x04",
    "rust_model.ot": b"",
    ".gitattributes": b"*.bin",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two shards, with what lies beside such."""
    folder = tmp_path / "m"
    folder.mkdir()
    for number, name in enumerate(("a", "b"), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: torch.ones(2)}, folder / file, metadata={"format": "pt"})
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "onnx").mkdir()
    for name, content in (SMALL | NOT_COPIED).items():
        (folder / name).write_bytes(content)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def beside_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder that are no weights of its own."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(("model", "pytorch_model")) or path.name.endswith(".py")
    }


EDITS = [
    ["convert", "M", "O", "--to", "hf"],
    ["convert", "M", "O", "--to", "hf-bin"],
    ["convert", "M/model.safetensors.index.json", "O/"],
    ["convert", "M/model-00001-of-00002.safetensors", "O", "--to", "hf"],
    ["rename", "M", "a", "c", "-o", "O"],
    ["rm", "M", "a", "-o", "O"],
    ["keep", "M", "a", "-o", "O"],
    ["cast", "M", "float16", "a", "-o", "O"],
    ["meta", "M", "k=v", "-o", "O"],
    ["set", "M", "a[0]=5", "-o", "O"],
]


@pytest.mark.parametrize("arguments", EDITS, ids=" ".join)
def test_the_small_files_of_a_model_go_along(model: Path, tmp_path: Path, ckpt: Ckpt, arguments: list[str]) -> None:
    out = tmp_path / "out"
    given = [text.replace("M", str(model), 1) if text[0] == "M" else text.replace("O", str(out)) for text in arguments]
    before = files_in(model)
    dry = json.loads(ckpt(*given, "-n", "--json").out)
    assert not out.exists()
    done = json.loads(ckpt(*given, "--json").out)
    assert beside_of(out) == SMALL
    assert sorted(done["beside"]["copied"]) == sorted(SMALL)
    left = {item["name"]: item["why"] for item in done["beside"]["left"]}
    assert left["onnx"] == "a folder"
    assert {left[name] for name in NOT_COPIED if not name.startswith(".") and name != "pytorch_model.bin"} == {
        "weights"
    }
    assert dry["beside"] == done["beside"]
    assert files_in(model) == before
    assert ckpt("ls", out).code == 0


@pytest.mark.parametrize("arguments", EDITS, ids=" ".join)
def test_weights_only_leaves_them(model: Path, tmp_path: Path, ckpt: Ckpt, arguments: list[str]) -> None:
    out = tmp_path / "out"
    given = [text.replace("M", str(model), 1) if text[0] == "M" else text.replace("O", str(out)) for text in arguments]
    done = json.loads(ckpt(*given, "--weights-only", "--json").out)
    assert beside_of(out) == {}
    assert done["beside"] is None


def test_the_report_names_files_and_a_dtype_that_the_config_has_wrong(model: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    for command in (("convert", model, tmp_path / "o", "--to", "hf", "--dtype", "bf16"),
                    ("cast", model, "bfloat16", "-o", tmp_path / "p")):  # fmt: skip
        told = ckpt(*command).err
        assert "5 other files copied: README.md, config.json, modeling_x.py, tokenizer.json, tokenizer.model" in told
        assert "other.gguf (weights)" in told
        assert "config.json says torch_dtype float32, which the weights are not any more: they are bfloat16" in told
    assert (tmp_path / "o" / "config.json").read_bytes() == SMALL["config.json"]
    assert "torch_dtype" not in ckpt("convert", model, tmp_path / "q", "--to", "hf").err


def test_what_a_folder_has_already_is_never_overwritten(model: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    done = json.loads(ckpt("convert", model, out, "--to", "hf", "--force", "--json").out)
    assert (out / "config.json").read_text() == "mine"
    assert (out / "tokenizer.json").read_bytes() == b"{}"
    assert {"name": "config.json", "why": "already in the new folder"} in done["beside"]["left"]


def test_links_of_a_cache_are_followed_and_large_or_odd_files_are_left(
    model: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli import limits

    monkeypatch.setattr(limits, "BESIDE_FILE", 1000)
    blob = tmp_path / "blob"
    blob.write_bytes(b"vocabulary")
    (model / "vocab.txt").symlink_to(blob)
    (model / "broken.txt").symlink_to(tmp_path / "nowhere")
    (model / "large.txt").write_bytes(bytes(1001))
    os.mkfifo(model / "pipe.txt")
    done = json.loads(ckpt("convert", model, tmp_path / "o", "--to", "hf", "--json").out)
    assert (tmp_path / "o" / "vocab.txt").read_bytes() == b"vocabulary"
    assert not (tmp_path / "o" / "vocab.txt").is_symlink()
    left = {item["name"]: item["why"] for item in done["beside"]["left"]}
    assert left["large.txt"] == "1,001 bytes"
    assert (left["broken.txt"], left["pipe.txt"]) == ("cannot be read", "not a regular file")


def test_a_file_in_a_folder_that_is_no_models_brings_nothing_along(tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    done = json.loads(ckpt("convert", tmp_path / "a.safetensors", tmp_path / "o", "--to", "hf", "--json").out)
    assert done["beside"] is None
    assert os.listdir(tmp_path / "o") == ["model.safetensors"]


def test_files_beside_are_bounded_in_all(
    model: Path, tmp_path: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_cli import limits

    monkeypatch.setattr(limits, "BESIDE_FILES", 2)
    done = json.loads(ckpt("convert", model, tmp_path / "o", "--to", "hf", "--json").out)
    assert done["beside"]["copied"] == ["README.md", "config.json"]
    assert {"name": "tokenizer.json", "why": "too many files to copy all"} in done["beside"]["left"]


def test_nothing_is_left_behind_when_a_conversion_fails(model: Path, tmp_path: Path, ckpt: Ckpt) -> None:
    save_file({"b": torch.full((2,), 1e30)}, model / "model-00002-of-00002.safetensors")
    assert ckpt("convert", model, tmp_path / "o", "--to", "hf", "--dtype", "float16").code == 2
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_another_format_in_the_same_folder_copies_nothing(model: Path, ckpt: Ckpt) -> None:
    before = files_in(model)
    done = json.loads(ckpt("convert", model, model, "--to", "hf-bin", "--force", "--json").out)
    assert done["beside"] is None
    assert {name: files_in(model)[name] for name in SMALL} == {name: before[name] for name in SMALL}
