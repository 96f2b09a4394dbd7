"""The Python side: `ckpt_cli.open` and `ckpt_cli.load`, with torch as the oracle."""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from benchmarks.files import write_sparse_pt
from contract import bits
from safetensors.torch import save_file, save_model
from torch import nn

import ckpt_cli

FLOATS = ["float64", "float32", "float16", "bfloat16"]
FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
INTS = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"]
COMPLEX = ["complex128", "complex64"]
DTYPES = FLOATS + FLOAT8 + INTS + COMPLEX


def filled(dtype: str) -> torch.Tensor:
    """Six elements of a dtype, in two rows."""
    return torch.tensor([[0, 1, 2], [1, 0, 1]], dtype=torch.float32).to(getattr(torch, dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape, stride and bytes."""
    return (a.dtype, a.shape, a.stride(), bits(a)) == (b.dtype, b.shape, b.stride(), bits(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_gives_what_torch_load_gives_for_every_dtype_and_layout(tmp_path: Path, dtype: str) -> None:
    whole = filled(dtype)
    state = {
        "whole": whole,
        "transposed": whole.t(),
        "strided": whole[:, ::2],
        "row": whole[1],
        "scalar": whole[0, 1],
        "expanded": whole[0, :1].expand(4),
        "empty": whole[:0].clone(),
    }
    torch.save(state, tmp_path / "a.pt")
    loaded = ckpt_cli.load(tmp_path / "a.pt")
    oracle = torch.load(tmp_path / "a.pt")
    assert list(loaded) == list(oracle)
    assert all(same(loaded[name], oracle[name]) for name in oracle)
    storages = {tensor.untyped_storage().data_ptr() for name, tensor in loaded.items() if name != "empty"}
    assert len(storages) == 1


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "complex128"])
def test_load_gives_what_safetensors_gives_for_every_dtype(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    state = {"whole": filled(dtype), "scalar": filled(dtype)[0, 1].clone(), "empty": filled(dtype)[:0].clone()}
    save_file(state, tmp_path / "a.safetensors")
    loaded, oracle = ckpt_cli.load(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == oracle.keys()
    assert all(same(loaded[name], oracle[name]) for name in oracle)


@pytest.mark.parametrize("dtype", FLOATS + FLOAT8 + INTS + COMPLEX)
def test_numpy_gives_the_values(tmp_path: Path, dtype: str) -> None:
    torch.save({"a": filled(dtype), "b": filled(dtype).t()}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        for name, expected in (("a", filled(dtype)), ("b", filled(dtype).t())):
            values = checkpoint[name].numpy()
            if dtype in FLOAT8 or dtype == "bfloat16":
                assert values.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
                expected = expected.to(torch.float32)
            assert values.shape == tuple(expected.shape)
            assert np.array_equal(values, expected.numpy())


def test_a_checkpoint_is_a_mapping_of_all_its_entries(tmp_path: Path) -> None:
    torch.save(
        {"w": torch.ones(2), "epoch": 3, "args": argparse.Namespace(lr=0.1), "tags": ["a", "b"]}, tmp_path / "a.pt"
    )
    with ckpt_cli.open(str(tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint) == ["w", "epoch", "args.lr", "tags"]
        assert len(checkpoint) == 4
        assert (checkpoint["epoch"], checkpoint["args.lr"], checkpoint["tags"]) == (3, 0.1, ["a", "b"])
        assert isinstance(checkpoint["w"], ckpt_cli.Tensor)
        assert (checkpoint.format, checkpoint.path) == ("zip", str(tmp_path / "a.pt"))
        assert "w" in checkpoint
        assert "v" not in checkpoint
        assert [tensor.name for tensor in checkpoint.tensors] == ["w"]
        with pytest.raises(KeyError):
            checkpoint["v"]


def test_a_tensor_tells_its_facts_before_anything_is_read(tmp_path: Path) -> None:
    torch.save(nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)), tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        (tensor,) = checkpoint.tensors
    assert (tensor.name, tensor.dtype, tensor.shape, tensor.stride) == ("", "bfloat16", (2, 3), (3, 1))
    assert (tensor.numel, tensor.nbytes, tensor.kind, tensor.requires_grad) == (6, 12, "parameter", True)
    assert repr(tensor) == "<ckpt_cli.Tensor '' bfloat16 [2, 3]>"


def test_metadata_of_safetensors_is_there(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "first"})
    with ckpt_cli.open(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "note": "first"}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tied_names_are_one_object_and_views_share_their_storage(tmp_path: Path, suffix: str) -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, shared, nn.Linear(3, 3))
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save(net.state_dict(), path)
    else:
        save_model(net, str(path))
    state = ckpt_cli.load(path)
    assert state["0.weight"] is state["1.weight"]
    assert state["0.weight"].data_ptr() != state["2.weight"].data_ptr()
    state["0.weight"][0, 0] = 100
    assert state["1.weight"][0, 0] == 100


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    ckpt_cli.load(tmp_path / "a.pt")["w"].zero_()
    assert (tmp_path / "a.pt").read_bytes() == before


def test_tensors_stay_valid_after_the_checkpoint_is_closed(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1_000_000)}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        array, tensor = checkpoint["w"].numpy(), checkpoint["w"].torch()
    assert array[-1] == tensor[-1] == 999_999


def test_parameters_keep_their_kind_and_requires_grad(tmp_path: Path) -> None:
    torch.save({"p": nn.Parameter(torch.ones(2)), "f": nn.Parameter(torch.ones(2), False)}, tmp_path / "a.pt")
    state = ckpt_cli.load(tmp_path / "a.pt")
    assert [type(value) for value in state.values()] == [nn.Parameter, nn.Parameter]
    assert [value.requires_grad for value in state.values()] == [True, False]


def test_conjugated_negated_and_meta_tensors_are_what_they_were(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    torch.save(
        {"c": values.conj(), "n": values.clone().conj().imag, "m": torch.empty(2, 3, device="meta")}, tmp_path / "a.pt"
    )
    loaded, oracle = ckpt_cli.load(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt")
    assert loaded["c"].is_conj()
    assert loaded["n"].is_neg()
    assert torch.equal(loaded["c"].resolve_conj(), oracle["c"].resolve_conj())
    assert torch.equal(loaded["n"].resolve_neg(), oracle["n"].resolve_neg())
    assert (loaded["m"].device.type, loaded["m"].shape) == ("meta", (2, 3))


def test_bytes_that_are_deflated_or_misaligned_are_copied(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(6.0)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert torch.equal(ckpt_cli.load(tmp_path / "b.pt")["w"], torch.arange(6.0))
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert (8 + len(header)) % 4
    (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + np.float32([5, 6]).tobytes())
    assert ckpt_cli.load(tmp_path / "c.safetensors")["w"].tolist() == [5, 6]


def test_loading_a_large_file_takes_no_memory_until_it_is_used(tmp_path: Path) -> None:
    write_sparse_pt(tmp_path / "a.pt", 4 * 10**9)
    code = (
        "import ckpt_cli, sys, torch\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "state = ckpt_cli.load(sys.argv[1])\n"
        "assert len(state) == 200 and state['layers.7.part1.weight'][0, 0] == 0\n"
        "print(peak() - before)"
    )
    grown = subprocess.check_output([sys.executable, "-c", code, str(tmp_path / "a.pt")], text=True)
    assert int(grown) < 50_000


def test_what_has_no_one_array_is_refused_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    torch.save({"s": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        with pytest.raises(ckpt_cli.CkptError, match=r"a\.pt: tensor 's' is sparse_coo") as refused:
            checkpoint["s"].numpy()
        assert refused.value.hint == "name a part: s.values"
        assert checkpoint["s"].parts["values"].numpy().tolist() == [1, 1, 1]
        assert checkpoint["s"].parts["indices"].torch().shape == (2, 3)


def test_a_bad_file_raises_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\3\4 and nothing more")
    with pytest.raises(ckpt_cli.CkptError, match=r"a\.pt: "):
        ckpt_cli.open(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        ckpt_cli.open(tmp_path / "b.pt")


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "typer", "ckpt_cli.api", "ckpt_cli.model"}
    code = f"import sys, ckpt_cli; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
    assert set(ckpt_cli.__all__) <= set(dir(ckpt_cli))
    for name in ckpt_cli.__all__:
        assert getattr(ckpt_cli, name).__doc__
    with pytest.raises(AttributeError):
        ckpt_cli.nothing  # noqa: B018


def test_bfloat16_keeps_its_bits_as_an_array_over_the_file(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -0.0, float("nan")], [float("inf"), 3e38, 1e-40]], dtype=torch.bfloat16)
    values.view(torch.int16)[0, 2] = 0x7FC1  # NaN with a payload
    torch.save({"a": values, "t": values.t(), "s": values[1, 1]}, tmp_path / "a.pt")
    with ckpt_cli.open(tmp_path / "a.pt") as checkpoint:
        for name, expected in (("a", values), ("t", values.t()), ("s", values[1, 1])):
            array = checkpoint[name].numpy()
            assert array.dtype == ml_dtypes.bfloat16
            assert np.array_equal(array.view(np.int16), expected.view(torch.int16).numpy())
        assert checkpoint["a"][1, :2].tolist() == values[1, :2].tolist()
        assert np.asarray(checkpoint["a"], np.float32).dtype == np.float32
