"""Storages: compared by identity, with their bytes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ckpt_cli.errors import CkptError
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.plain import PlainFile
from ckpt_cli.model.checkpoint import Storage

VALUES = np.arange(6, dtype="<f4")


def safetensors(path: Path) -> None:
    save_file({"w": VALUES}, path)


def zipped(path: Path) -> None:
    torch.save({"w": torch.from_numpy(VALUES)}, path)


def legacy(path: Path) -> None:
    torch.save({"w": torch.from_numpy(VALUES)}, path, _use_new_zipfile_serialization=False)


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w=VALUES)


def within_the_pickle(path: Path) -> None:
    torch.save({"w": VALUES}, path, pickle_protocol=4)


@pytest.mark.parametrize("write", [safetensors, zipped, legacy, npz, within_the_pickle])
def test_a_storage_has_its_bytes_also_under_another_key(write: object, tmp_path: Path) -> None:
    assert callable(write)
    path = tmp_path / "file"
    write(path)
    with closing(open_checkpoint(str(path))) as checkpoint:
        (tensor,) = checkpoint.tensors
        assert tensor.storage is not None
        for storage in (tensor.storage, replace(tensor.storage, key="another")):
            assert bytes(storage.view(4, 12)) == VALUES[1:4].tobytes()
            (extent,) = storage.extents(4, 12)
            assert extent.file.read(extent.offset, 12) == VALUES[1:4].tobytes()
            assert not storage.composed


def test_storages_are_equal_only_where_they_are_one() -> None:
    one, other = Storage("0", 8), Storage("0", 8)
    assert one != other
    assert len({one: 1, other: 2}) == 2


def test_two_storages_of_one_key_keep_their_own_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcdef")
    with closing(PlainFile(LocalFile(str(path)))) as container:
        first, second = container.storage("0", 3, 0), container.storage("0", 3, 3)
        assert (bytes(first.view(0, 3)), bytes(second.view(0, 3))) == (b"abc", b"def")


def test_a_storage_that_is_still_to_be_written_says_so() -> None:
    with pytest.raises(CkptError, match="has no bytes yet"):
        Storage("0", 8).view(0, 8)
