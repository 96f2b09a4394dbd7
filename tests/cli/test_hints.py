"""Hints: commands that can be run as they stand, and that help."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt
from safetensors.torch import load_file, save_file

AWKWARD = "it's my $file.pt"


def hint_of(error: str) -> str:
    """The hint of a refusal."""
    (line,) = [line for line in error.splitlines() if line.startswith("hint: ")]
    return line.removeprefix("hint: ")


@pytest.fixture
def awkward(here: Path) -> str:
    """A training checkpoint whose name a shell would take apart."""
    torch.save({"model": {"layer": {"w": torch.ones(2)}}, "ema": {"w": torch.ones(2)}, "epoch": 3}, here / AWKWARD)
    return AWKWARD


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nope"),
        ("ls", "nope"),
        ("stats", "nope"),
        ("rm", "nope"),
        ("keep", "nope"),
        ("tie", "nope", "ema.w"),
        ("untie", "nope"),
        ("cast", "float16", "nope"),
        ("rename", "model.layer.w"),
        ("rename", "--sub", "nope", "x"),
        ("rename", "model.layer.w", "layer.w"),
        ("ties", "model.layer.w"),
        ("set", "ema=None"),
        ("set", "model=1", "ema=None"),
        ("show", "-o", "out.npy"),
        ("convert", "out.gguf"),
        ("convert", "out.npz", "--select", "nope"),
    ],
    ids=" ".join,
)
def test_a_command_in_a_hint_names_the_file_as_a_shell_takes_it(
    awkward: str, ckpt: Ckpt, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    answer = ckpt(command, awkward, *rest)
    assert answer.code == 2
    hint = hint_of(answer.err)
    assert "FILE " not in hint
    assert "ckpt " not in hint or awkward in shlex.split(hint)


def test_an_entry_that_is_called_file_stays_what_it_is_in_a_hint(here: Path, ckpt: Ckpt) -> None:
    torch.save({"FILE": torch.ones(2)}, here / "m.pt")
    hint = hint_of(ckpt("set", "m.pt", "FILE=None").err)
    assert hint == "ckpt rm m.pt FILE, then ckpt set m.pt FILE=None --new"


@pytest.mark.parametrize("target", ["ema", "ema.w", "epoch_weights"])
def test_the_commands_of_a_hint_put_none_in_the_place_of_tensors(here: Path, ckpt: Ckpt, target: str) -> None:
    state = {"ema": {"w": torch.ones(2), "b": torch.ones(1)}, "epoch_weights": torch.ones(2), "w": torch.ones(2)}
    torch.save(state, here / "m.pt")
    answer = ckpt("set", "m.pt", f"{target}=None")
    assert answer.code == 2
    assert "cannot be None" in answer.err
    first, second = hint_of(answer.err).split(", then ")
    for command in (first, second):
        assert ckpt(*shlex.split(command)[1:]).code == 0
    loaded = torch.load(here / "m.pt")
    for key in target.split("."):
        loaded = loaded[key]
    assert loaded is None


def test_none_in_the_place_of_a_tensor_of_safetensors_can_only_be_its_removal(here: Path, ckpt: Ckpt) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, here / "m.safetensors")
    command = hint_of(ckpt("set", "m.safetensors", "a=None").err).removesuffix(" takes it out")
    assert ckpt(*shlex.split(command)[1:]).code == 0
    assert list(load_file(here / "m.safetensors")) == ["b"]


def test_none_for_some_elements_is_a_bad_value(here: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.ones(2)}, here / "m.pt")
    assert "'None' is not a value for a tensor" in ckpt("set", "m.pt", "a[0]=None").err


def test_the_command_of_a_hint_unpacks_a_compressed_npz(here: Path, ckpt: Ckpt) -> None:
    np.savez_compressed(here / "c.npz", a=np.arange(6.0))
    command = hint_of(ckpt("set", "c.npz", "a[0]=5").err).removesuffix(" writes a copy that is not compressed")
    assert ckpt(*shlex.split(command)[1:]).code == 0
    assert ckpt("set", "OUT.npz", "a[0]=5").code == 0
    assert np.load(here / "OUT.npz")["a"].tolist() == [5, 1, 2, 3, 4, 5]


def test_the_command_of_a_hint_unpacks_a_compressed_torch_file(here: Path, ckpt: Ckpt) -> None:
    torch.save({"a": torch.arange(6.0), "n": 1}, here / "m.pt")
    with zipfile.ZipFile(here / "m.pt") as plain, zipfile.ZipFile(here / "d.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info))
    command = hint_of(ckpt("set", "d.pt", "a[0]=5").err).removesuffix(" writes a copy that is not compressed")
    assert ckpt(*shlex.split(command)[1:]).code == 0
    assert ckpt("set", "OUT.pt", "a[0]=5").code == 0
    assert torch.load(here / "OUT.pt")["a"].tolist() == [5, 1, 2, 3, 4, 5]


def test_the_command_of_a_hint_makes_the_names_of_an_archive_of_arrays_changeable(here: Path, ckpt: Ckpt) -> None:
    np.savez(here / "d.npz", w=np.ones(3))
    command = hint_of(ckpt("rename", "d.npz", "w", "v").err).removesuffix(" makes one that can be changed freely")
    assert ckpt(*shlex.split(command)[1:]).code == 0
    assert ckpt("rename", "OUT.pt", "w", "v").code == 0
    assert ckpt("convert", "OUT.pt", "e.npz").code == 0
    assert np.load(here / "e.npz")["v"].tolist() == [1, 1, 1]


def test_the_part_that_a_hint_names_is_the_one_with_the_values_of_a_wrapper(here: Path, ckpt: Ckpt) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    inner = TwoTensor(torch.ones(2), torch.ones(2))
    torch.save({"w": TwoTensor(inner, inner)}, here / "m.pt")
    for command in (("set", "m.pt", "w=3"), ("show", "m.pt", "w[0]")):
        part = hint_of(ckpt(*command).err).removeprefix("name a part: ")
        assert ckpt("set", "m.pt", f"{part}[0]=3").code == 0


def test_a_hint_for_entries_that_a_format_cannot_hold_names_one_that_can(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2), "s": torch.eye(2).to_sparse()}, here / "m.pt")
    answer = ckpt("convert", "m.pt", "out.safetensors")
    assert hint_of(answer.err) == "a name that ends in .pt keeps them; --tensors-only leaves them out"
    assert ckpt("convert", "m.pt", "out.pt").code == 0
    assert torch.equal(torch.load(here / "out.pt")["s"].to_dense(), torch.eye(2))


SUFFIXES = {
    "gguf": "GGUF", "onnx": "ONNX", "h5": "HDF5", "hdf5": "HDF5", "mlmodel": "Core ML", "msgpack": "msgpack",
    "tflite": "TensorFlow Lite", "pkl": "pickle", "npy": "npy", "PT2": "torch.export", "GGUF": "GGUF",
}  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_format_that_is_not_written_is_called_by_its_name(awkward: str, ckpt: Ckpt, suffix: str) -> None:
    for arguments in ((f"out.{suffix}",), ("out", "--to", suffix)):
        answer = ckpt("convert", awkward, *arguments)
        assert answer.code == 2
        assert f"ckpt does not write {SUFFIXES[suffix]}" in answer.err.splitlines()[0]
        assert "does not say" not in answer.err
        assert hint_of(answer.err)
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "m.pt", "-", "--to", "safetensors"),
        ("convert", "m.pt", "-"),
        ("convert", "m.pt", "-", "--to", "hf"),
        ("convert", "m.pt", "-", "--to", "dcp", "-n"),
        ("show", "m.pt", "w", "-o", "-"),
        ("set", "m.pt", "w=1", "-o", "-"),
        ("set", "m.pt", "w=1", "-o", "-", "-n"),
        ("rename", "m.pt", "w", "v", "-o", "-"),
        ("rm", "m.pt", "w", "-o", "-"),
        ("keep", "m.pt", "w", "-o", "-"),
        ("cast", "m.pt", "float16", "-o", "-"),
        ("tie", "m.pt", "w", "v", "-o", "-"),
        ("untie", "m.pt", "w", "-o", "-"),
        ("compact", "m.pt", "-o", "-"),
        ("meta", "m.safetensors", "a=b", "-o", "-"),
    ],
    ids=" ".join,
)
def test_a_dash_is_refused_as_the_name_of_an_output(here: Path, ckpt: Ckpt, arguments: tuple[str, ...]) -> None:
    torch.save({"w": torch.ones(2), "v": torch.ones(2)}, here / "m.pt")
    save_file({"w": torch.ones(2)}, here / "m.safetensors")
    before = sorted(path.name for path in here.iterdir())
    answer = ckpt(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "'-' is not the name of a file" in answer.err
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_file_that_is_called_a_dash_is_written_by_its_path(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.ones(2)}, here / "m.pt")
    assert ckpt("convert", "m.pt", "./-", "--to", "safetensors").code == 0
    assert load_file(here / "-")["w"].tolist() == [1, 1]
