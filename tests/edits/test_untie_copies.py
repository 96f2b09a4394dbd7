"""`untie` and `compact` leave the bytes of tensors to the kernel, as `convert` does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from conftest import Ckpt
from run_edit import edited
from safetensors.torch import load_file
from shard_sets import read_shard, save

from ckpt_cli.model.checkpoint import Storage

NBYTES = 4 << 20
"""Bytes of the large tensor."""


@pytest.fixture
def through_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count bytes that are viewed of storages, and those that are written from memory."""
    count = 0
    view = Storage.view

    def count_view(storage: Storage, begin: int, nbytes: int) -> memoryview:
        nonlocal count
        count += nbytes
        return view(storage, begin, nbytes)

    def counting(write_all: Callable[..., Any]) -> Callable[..., Any]:
        def write(fd: int, data: bytes | memoryview, *rest: int) -> Any:
            nonlocal count
            count += len(data)
            return write_all(fd, data, *rest)

        return write

    monkeypatch.setattr(Storage, "view", count_view)
    for name, module in list(sys.modules.items()):
        if name.startswith("ckpt_cli.") and "write_all" in vars(module):
            monkeypatch.setattr(module, "write_all", counting(vars(module)["write_all"]))
    return lambda: count


def large() -> torch.Tensor:
    return torch.arange(NBYTES // 4, dtype=torch.float32)


def test_the_counter_sees_what_goes_through_python(
    tmp_path: Path, ckpt: Ckpt, through_python: Callable[[], int]
) -> None:
    torch.save({"a": large()}, tmp_path / "a.pt")
    edited(ckpt, "cast", tmp_path / "a.pt", "bfloat16", "--lossy")
    assert through_python() >= NBYTES // 2


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_the_bytes_of_an_untied_tensor_do_not_go_through_python(
    tmp_path: Path, ckpt: Ckpt, through_python: Callable[[], int], is_zip: bool
) -> None:
    both = large()
    path = tmp_path / "a.pt"
    torch.save({"a": both, "b": both}, path, _use_new_zipfile_serialization=is_zip)
    edited(ckpt, "untie", path, "b")
    assert through_python() < NBYTES / 100
    found = torch.load(path)
    assert torch.equal(found["a"], both)
    assert torch.equal(found["b"], both)
    assert found["a"].untyped_storage().data_ptr() != found["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_the_bytes_that_compact_keeps_do_not_go_through_python(
    tmp_path: Path, ckpt: Ckpt, through_python: Callable[[], int], is_zip: bool
) -> None:
    whole = large()
    path = tmp_path / "a.pt"
    slices = {
        "a": whole[7 : NBYTES // 16],
        "b": whole[NBYTES // 8 : NBYTES // 8 + 5],
        "c": whole[NBYTES // 8 + 2 :][:4],
    }
    torch.save(slices, path, _use_new_zipfile_serialization=is_zip)
    edited(ckpt, "compact", path)
    assert through_python() < NBYTES / 100
    found = torch.load(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in slices.items())
    assert found["a"].untyped_storage().nbytes() < slices["a"].nbytes + 100


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_untied_tensor_of_a_later_shard_has_that_shards_bytes(tmp_path: Path, ckpt: Ckpt, kind: str) -> None:
    torch.manual_seed(1)
    folder = save({name: torch.randn(30) for name in "abcdef"}, tmp_path / "set", kind)
    *_, last = sorted(folder.glob("*00*.*"))
    tied = read_shard(last, last.suffix)
    name = next(iter(tied))
    alias = f"{name}.again"
    if kind == "bin":
        torch.save({**tied, alias: tied[name]}, last)
    else:
        from safetensors.torch import save_file

        save_file(tied, last, metadata={"format": "pt", alias: name})
    edited(ckpt, "untie", folder, alias)
    found = torch.load(last) if kind == "bin" else load_file(last)
    assert torch.equal(found[alias], tied[name])
    assert torch.equal(found[name], tied[name])


def test_a_compressed_tensor_is_untied_all_the_same(tmp_path: Path, ckpt: Ckpt) -> None:
    both = torch.zeros(1000)
    torch.save({"a": both, "b": both}, tmp_path / "plain.pt")
    with ZipFile(tmp_path / "plain.pt") as plain, ZipFile(tmp_path / "a.pt", "w", ZIP_DEFLATED) as packed:
        for record in plain.namelist():
            packed.writestr(record, plain.read(record))
    edited(ckpt, "untie", tmp_path / "a.pt", "b")
    found = torch.load(tmp_path / "a.pt")
    assert torch.equal(found["a"], both)
    assert torch.equal(found["b"], both)


def test_many_untied_tensors_are_written_as_torch_writes_tensors_of_their_own(tmp_path: Path, ckpt: Ckpt) -> None:
    """The old calls are taken over whole, with their new storages, and read at once like any others."""
    shared = [torch.arange(6.0) + n for n in range(30)]
    root = {f"layers.{n}.{kind}": shared[n].view(6) for n in range(30) for kind in ("weight", "tied")}
    torch.save(root, tmp_path / "a.pt")
    torch.save({name: tensor.clone() for name, tensor in root.items()}, tmp_path / "wanted.pt")
    ckpt("untie", tmp_path / "a.pt", "*", "-o", tmp_path / "b.pt")
    loaded = torch.load(tmp_path / "b.pt")
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 60
    assert all(torch.equal(tensor, root[name]) for name, tensor in loaded.items())
    pickles = [ZipFile(tmp_path / name).read(f"{folder}/data.pkl") for name, folder in
               (("b.pt", "a"), ("wanted.pt", "wanted"))]  # fmt: skip
    assert pickles[0] == pickles[1]
