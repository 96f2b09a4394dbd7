"""Every dtype in every layout: facts and values are those of torch.load and safe_open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.dtypes import BY_NAME, BY_SAFETENSORS
from ckpt_cli.errors import UnsupportedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Checkpoint, Tensor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*TypedStorage is deprecated", "ignore:.*torch.quantize_per_tensor", "ignore:ComplexHalf support"
)

PLAIN = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
         "bool", "complex128", "complex64"]  # fmt: skip
"""Those that numpy has too."""

SMALL = ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu"]
BITS = ["bits8", "bits1x8", "bits2x4", "bits4x2", "bits16"]
QUANTIZED = ["qint8", "quint8", "qint32"]
OTHERS = ["complex32", "float4_e2m1fn_x2"]
PACKED = ["quint4x2", "quint2x4"]
"""Quantized values of less than a byte: not decoded."""
SHELLS = [f"{sign}int{width}" for sign in ("", "u") for width in range(1, 8)]
"""Those that torch itself cannot save."""

SAVED = [*PLAIN, *SMALL, *BITS, *OTHERS]
IN_SAFETENSORS = [*(name for name in PLAIN if name != "complex128"), *SMALL, "float4_e2m1fn_x2"]

FLOAT4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda flat: flat[:24].reshape(2, 3, 4),
    "strided": lambda flat: flat[:24].reshape(4, 6)[::2, 1::2],
    "transposed": lambda flat: flat[:24].reshape(4, 6).t(),
    "permuted": lambda flat: flat[:24].reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": lambda flat: flat[:3].reshape(3, 1).expand(3, 5),
    "expanded from one": lambda flat: flat[7].expand(2, 2),
    "overlapping": lambda flat: flat.as_strided((4, 3), (2, 1), 5),
    "with an offset": lambda flat: flat[9:15],
    "scalar": lambda flat: flat[5],
    "one element": lambda flat: flat[6:7].reshape(1, 1),
    "empty": lambda flat: flat[:0],
    "empty within": lambda flat: flat[4:4].reshape(0, 3),
    "empty at the end": lambda flat: flat[32:],
    "whole": lambda flat: flat,
}
"""Views of 32 elements."""


def elements(name: str) -> torch.Tensor:
    """Thirty-two elements of random bits, NaNs among them where the dtype has some."""
    dtype: torch.dtype = getattr(torch, name)
    raw = np.random.default_rng(7).integers(0, 2 if name == "bool" else 256, 32 * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def expected(tensor: torch.Tensor) -> Any:
    """A tensor's values as numpy has them, by torch's own conversions."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name in PLAIN:
        return tensor.numpy()
    if name in SMALL:
        return tensor.float().numpy()
    if name == "complex32":
        return tensor.to(torch.complex64).numpy()
    codes = tensor.view({1: torch.uint8, 2: torch.uint16}[tensor.dtype.itemsize]).numpy()
    if name == "float4_e2m1fn_x2":
        return np.array(FLOAT4, np.float32)[np.stack([codes & 15, codes >> 4], axis=-1)]
    return codes


def agree(checkpoint: Checkpoint, mine: Tensor, theirs: torch.Tensor) -> None:
    """Compare facts and values."""
    assert f"torch.{mine.dtype}" == str(theirs.dtype)
    assert mine.shape == tuple(theirs.shape)
    assert mine.stride == theirs.stride()
    assert mine.storage_offset == theirs.storage_offset()
    assert mine.numel == theirs.numel()
    assert mine.nbytes == theirs.numel() * theirs.dtype.itemsize
    assert mine.is_contiguous == theirs.is_contiguous()
    np.testing.assert_array_equal(values_of(checkpoint, mine), expected(theirs))


def test_every_dtype_of_torch_is_in_the_table_and_here() -> None:
    known = {str(item).removeprefix("torch.") for item in vars(torch).values() if isinstance(item, torch.dtype)}
    assert known == {*SAVED, *QUANTIZED, *PACKED, *SHELLS}
    assert known <= BY_NAME.keys()
    for name in known - {*PACKED, *SHELLS}:
        assert BY_NAME[name].itemsize == getattr(torch, name).itemsize


@pytest.mark.parametrize("name", SAVED)
def test_a_torch_file_says_what_torch_loads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "layouts.pt"
    flat = elements(name)
    torch.save({layout: view(flat) for layout, view in LAYOUTS.items()}, path)
    checkpoint, theirs = open_checkpoint(str(path)), torch.load(path)
    assert [mine.name for mine in checkpoint.tensors] == list(LAYOUTS) == list(theirs)
    for mine in checkpoint.tensors:
        agree(checkpoint, mine, theirs[mine.name])
        assert mine.storage is not None
        assert mine.storage.nbytes == theirs[mine.name].untyped_storage().nbytes() == flat.nbytes
        assert mine.storage is checkpoint.tensors[0].storage


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_storage_of_its_own_says_what_torch_loads(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "dtypes.pt"
    torch.save({name: LAYOUTS[layout](elements(name)) for name in SAVED}, path)
    checkpoint, theirs = open_checkpoint(str(path)), torch.load(path)
    for mine in checkpoint.tensors:
        agree(checkpoint, mine, theirs[mine.name])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_dtype_is_stored_as_its_integers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "quantized.pt"
    made = torch.quantize_per_tensor(torch.arange(-3.0, 3.0).reshape(2, 3), 0.5, 1, getattr(torch, name))
    torch.save({"x": made}, path)
    checkpoint = open_checkpoint(str(path))
    (mine,) = checkpoint.tensors
    assert (str(mine.dtype), mine.shape, mine.stride, mine.layout) == (name, (2, 3), (3, 1), "quantized")
    assert mine.storage is not None
    assert bytes(mine.storage.view(0, mine.nbytes)) == made.int_repr().numpy().tobytes()


@pytest.mark.parametrize("name", PACKED)
def test_packed_integers_are_listed_and_not_decoded(name: str, tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    torch.save({"x": torch.arange(8, dtype=torch.uint8).view(getattr(torch, name))}, path)
    checkpoint = open_checkpoint(str(path))
    (mine,) = checkpoint.tensors
    assert (str(mine.dtype), mine.shape) == (name, tuple(torch.load(path)["x"].shape))
    with pytest.raises(UnsupportedError, match=name):
        values_of(checkpoint, mine)


def test_torch_cannot_save_the_other_dtypes(tmp_path: Path) -> None:
    for name in SHELLS:
        with pytest.raises(KeyError):
            torch.save(torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name)), tmp_path / "shell.pt")


@pytest.mark.parametrize("name", IN_SAFETENSORS)
def test_a_safetensors_file_says_what_safe_open_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "layouts.safetensors"
    flat = elements(name).view(torch.uint8)
    dtype: torch.dtype = getattr(torch, name)
    state = {
        layout: flat.clone().view(dtype)[: view(elements(name)).numel()].reshape(view(elements(name)).shape)
        for layout, view in LAYOUTS.items()
        if not (name == "float4_e2m1fn_x2" and view(elements(name)).ndim == 0)  # the library cannot save one
    }
    save_file(state, path)
    checkpoint = open_checkpoint(str(path))
    with safe_open(path, "pt") as file:
        assert {mine.name for mine in checkpoint.tensors} == set(file.keys()) == set(state)
        for mine in checkpoint.tensors:
            theirs = file.get_tensor(mine.name)
            assert theirs.is_contiguous()
            assert f"torch.{mine.dtype}" == str(theirs.dtype)
            assert mine.shape == tuple(theirs.shape)
            assert mine.is_contiguous
            np.testing.assert_array_equal(values_of(checkpoint, mine), expected(theirs))


def test_safetensors_has_no_other_dtype_that_torch_has() -> None:
    mine = {dtype.name for dtype in BY_SAFETENSORS.values()}
    assert mine - set(IN_SAFETENSORS) == {"float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"}
    assert not any(hasattr(torch, name) for name in mine - set(IN_SAFETENSORS))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_six_bit_floats_are_listed_and_not_decoded(dtype: str, tmp_path: Path) -> None:
    from builders import st as files

    path = files.write(tmp_path / "six.safetensors", {"x": files.info(dtype, [2, 4], 0, 6)}, bytes(6))
    checkpoint = open_checkpoint(str(path))
    (mine,) = checkpoint.tensors
    assert (mine.shape, mine.nbytes) == ((2, 4), 6)
    with pytest.raises(UnsupportedError, match=BY_SAFETENSORS[dtype].name):
        values_of(checkpoint, mine)
