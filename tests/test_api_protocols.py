"""The Python side as other libraries use it: numpy's and DLPack's protocols, and a checkpoint that was closed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcp_formats
import ml_dtypes
import numpy as np
import pytest
import torch
from contract import FORMATS, Format
from safetensors.torch import save_file

import ckpt_cli

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of several dtypes, strides and sizes, one of them large enough to be mapped."""
    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "i": torch.tensor([1, -2]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "param": torch.nn.Parameter(torch.ones(2)),
        "large": torch.arange(70_000.0),
        "sparse": torch.eye(2).to_sparse(),
        "epoch": 3,
    }
    state |= {str(dtype).removeprefix("torch."): torch.tensor([1, 2, 0.5]).to(dtype) for dtype in NARROW}
    torch.save(state, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_numpy_asarray_gives_the_values_of_every_tensor_that_is_one_array(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint:
        for name, expected in torch.load(path).items():
            if not isinstance(expected, torch.Tensor) or name == "sparse":
                continue
            if expected.dtype in NARROW:  # as numpy() gives them
                expected = expected.to(torch.float32)
            oracle = expected.detach().resolve_conj().resolve_neg().numpy()
            found = np.asarray(checkpoint[name])
            kind = ml_dtypes.bfloat16 if name == "bfloat16" else oracle.dtype
            assert (found.dtype, found.shape) == (kind, oracle.shape), name
            assert np.array_equal(found, oracle), name


def test_functions_of_numpy_take_a_tensor(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint:
        assert np.add(checkpoint["w"], 1).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert np.stack([checkpoint["w"], checkpoint["w"]]).shape == (2, 2, 3)
        assert np.array_equal(np.array(checkpoint["bfloat16"]), np.float32([1, 2, 0.5]))


def test_numpy_asarray_converts_to_the_dtype_that_is_asked_for(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint:
        assert np.asarray(checkpoint["w"], dtype="float64").dtype == np.float64
        assert np.asarray(checkpoint["i"], np.int8).tolist() == [1, -2]


def test_numpy_array_of_a_tensor_is_a_copy_that_can_be_written(path: Path) -> None:
    before = path.read_bytes()
    with ckpt_cli.open(path) as checkpoint:
        for name in ("w", "large"):
            copied = np.array(checkpoint[name])
            copied.reshape(-1)[0] = 9
            assert np.asarray(checkpoint[name]).reshape(-1)[0] == 0
    assert path.read_bytes() == before


def test_numpy_asarray_without_a_copy_is_refused_where_it_needs_one(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint["large"].__array__(copy=False).base is not None
        with pytest.raises(ValueError, match="copy"):
            checkpoint["large"].__array__("float64", copy=False)


def test_numpy_asarray_of_a_tensor_that_is_made_of_others_says_so(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint, pytest.raises(ckpt_cli.CkptError, match="sparse"):
        np.asarray(checkpoint["sparse"])


@pytest.mark.parametrize("take", [torch.as_tensor, torch.asarray, torch.tensor, torch.from_dlpack])
def test_torch_takes_a_tensor_with_its_dtype_and_values(path: Path, take: Callable[[Any], torch.Tensor]) -> None:
    with ckpt_cli.open(path) as checkpoint:
        for name, expected in torch.load(path).items():
            if not isinstance(expected, torch.Tensor) or name == "sparse":
                continue
            found = take(checkpoint[name])
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(found.to(expected.dtype), expected.detach()), name
            assert checkpoint[name].__dlpack_device__() == (1, 0)


def test_numpy_asarray_imports_no_torch(path: Path) -> None:
    code = (
        "import sys, numpy, ckpt_cli\n"
        f"with ckpt_cli.open({str(path)!r}) as checkpoint:\n"
        "    assert numpy.asarray(checkpoint['w']).sum() == 15\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


READS: dict[str, Callable[[ckpt_cli.Tensor], object]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "torch": lambda tensor: tensor.torch(),
    "asarray": lambda tensor: np.asarray(tensor),
    "as_tensor": lambda tensor: torch.as_tensor(tensor),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.label)
def test_a_tensor_of_a_closed_checkpoint_says_that_it_is_closed(tmp_path: Path, kind: Format, read: str) -> None:
    path = tmp_path / f"sample{kind.suffix}"
    kind.put(path)
    with ckpt_cli.open(path) as checkpoint:
        tensors = checkpoint.tensors
    for tensor in [*tensors, *checkpoint.tensors]:
        with pytest.raises(ckpt_cli.CkptError, match="closed") as caught:
            READS[read](tensor)
        assert str(caught.value).startswith(f"{checkpoint.path}: ")


@pytest.mark.parametrize("name", ["w", "large", "sparse", "scalar"])
def test_what_was_read_before_says_the_same_once_closed_and_stays_valid(path: Path, name: str) -> None:
    checkpoint = ckpt_cli.open(path)
    tensor = checkpoint[name]
    made = tensor.torch().to_dense().tolist()
    values = None if name == "sparse" else tensor.numpy()
    checkpoint.close()
    checkpoint.close()
    for part in (tensor, *tensor.parts.values()):
        for read in READS.values():
            with pytest.raises(ckpt_cli.CkptError, match="closed"):
                read(part)
    assert made == torch.load(path)[name].to_dense().tolist()
    assert values is None or values.tolist() == made


def test_names_facts_and_values_are_still_there_once_closed(path: Path) -> None:
    with ckpt_cli.open(path) as checkpoint:
        names = list(checkpoint)
    assert list(checkpoint) == names
    assert len(checkpoint) == len(names)
    assert "w" in checkpoint
    assert (checkpoint["w"].shape, checkpoint["epoch"], checkpoint.format) == ((2, 3), 3, "zip")


def test_a_value_that_is_read_when_it_is_asked_for_says_that_the_checkpoint_is_closed(tmp_path: Path) -> None:
    dcp_formats.save({"w": torch.ones(2), "args": {"lr": 0.5}, "tag": "x"}, tmp_path / "d")
    with ckpt_cli.open(tmp_path / "d") as checkpoint:
        assert checkpoint["tag"] == "x"
    assert checkpoint["tag"] == "x"
    with pytest.raises(ckpt_cli.CkptError, match="closed"):
        checkpoint["args.lr"]


def test_a_closed_checkpoint_cannot_be_entered_again(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    checkpoint = ckpt_cli.open(tmp_path / "a.safetensors")
    checkpoint.close()
    with pytest.raises(ckpt_cli.CkptError, match="closed"):
        checkpoint.__enter__()
