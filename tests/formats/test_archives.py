"""Tar files with a checkpoint in them, as NeMo and AllenNLP make them: read and set where it lies."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt, refused
from safetensors.torch import load, save

from ckpt_cli.formats import open_checkpoint

STATE = {"encoder.weight": torch.arange(12.0).reshape(3, 4), "encoder.bias": torch.ones(4)}


def saved(state: object, *, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def archive(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return str(path)


def member(path: str, name: str) -> bytes:
    with tarfile.open(path) as made:
        found = made.extractfile(name)
        assert found is not None
        return found.read()


def _arrays(data: bytes) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in pickle.loads(data).items()}


Load = Callable[[bytes], dict[str, torch.Tensor]]

KINDS: dict[str, tuple[str, bytes, Load]] = {
    "nemo": ("./model_weights.ckpt", saved(STATE), lambda data: torch.load(io.BytesIO(data))),
    "allennlp": ("weights.th", saved(STATE, old=True), lambda data: torch.load(io.BytesIO(data))),
    "safetensors": ("a/model.safetensors", save(STATE), load),
    "arrays": ("a/all.bin", pickle.dumps({name: each.numpy() for name, each in STATE.items()}, 4), _arrays),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_in_an_archive_is_read_and_set_where_it_lies(tmp_path: Path, ckpt: Ckpt, kind: str) -> None:
    name, content, read = KINDS[kind]
    path = archive(tmp_path / "m.tar", {"model_config.yaml": b"a: 1" * 200, name: content, "vocab/x.txt": b"x"})
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, sorted(tensor.name for tensor in checkpoint.tensors)) == ("tar", sorted(STATE))
    assert "model_config.yaml" in checkpoint.version
    checkpoint.close()
    assert ckpt("set", path, "encoder.weight[1]=[9,8,7,6]").code == 0
    expected = {**STATE, "encoder.weight": STATE["encoder.weight"].clone()}
    expected["encoder.weight"][1] = torch.tensor([9.0, 8, 7, 6])
    found = read(member(path, name))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert member(path, "model_config.yaml") == b"a: 1" * 200
    assert ckpt("check", "--deep", path).code == 0
    assert ckpt("convert", path, tmp_path / "out.pt").code == 0
    assert torch.equal(torch.load(tmp_path / "out.pt")["encoder.weight"], expected["encoder.weight"])
    refusal = ckpt("rename", path, "--strip", "encoder")
    assert (refusal.code, refusal.err.splitlines()[0]) == (
        2,
        f"ckpt: {path}: of a checkpoint of format tar only the elements of tensors can be changed",
    )


def test_an_archive_that_is_compressed_is_one_line_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    path = archive(tmp_path / "model.tar.gz", {"weights.th": saved(STATE)}, "w:gz")
    error = refused(path)
    assert str(error) == f"{path}: a gzip file with a tar file inside: unpack it first"
    assert error.hint == f"gzip -dc {path} > {tmp_path / 'model.tar'}"


@pytest.mark.parametrize(
    ("files", "problem", "hint"),
    [
        ({"model_weights/.metadata": b"x", "model_weights/__0_0.distcp": b"x"}, "torch.distributed.checkpoint", "-C O"),
        ({"a.pt": saved(STATE), "b.pt": saved(STATE)}, "a tar file with 2 checkpoints in it: a.pt, b.pt", "tar -xf"),
        ({"weights.th": b"hello" * 9}, "whose weights.th is not a checkpoint", ""),
        ({"weights.th": saved(STATE)[:300]}, "weights.th in it: ", ""),
        ({"readme": b"x"}, "a tar file, but not one of torch.save's", "tar -xf unpacks it"),
    ],
)  # fmt: skip
def test_other_archives_are_refused_in_words(tmp_path: Path, files: dict[str, bytes], problem: str, hint: str) -> None:
    error = refused(archive(tmp_path / "m.tar", files))
    assert problem in str(error)
    assert hint in str(error.hint)


def test_a_size_that_reaches_into_the_next_file_reads_no_more_than_the_archive_says(tmp_path: Path) -> None:
    path = Path(archive(tmp_path / "m.tar", {"weights.th": saved(STATE), "b": np.random.default_rng(0).bytes(3000)}))
    path.write_bytes(path.read_bytes()[:1500])
    assert "needs bytes" in str(refused(str(path)))
