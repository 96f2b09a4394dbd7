"""The tar file that torch.save wrote up to 0.1.10; torch 2.13 still loads it."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch
from builders import old
from builders.old import TarStorage, TarTensor
from builders.pickles import pickled
from conftest import Ckpt, refused

import ckpt_cli
from ckpt_cli import limits
from ckpt_cli.errors import LimitError, MalformedError, TruncatedError
from ckpt_cli.formats import open_checkpoint

ROW = struct.pack("<4f", 1, 2, 3, 4)
STORAGE = TarStorage(5, "Float", ROW)
WHOLE = TarTensor(9, 5, "Float", (2, 2), (2, 1))


def write(folder: Path, content: bytes) -> str:
    """A file of that content."""
    path = folder / "model.pt"
    path.write_bytes(content)
    return str(path)


def test_tensors_views_and_parts_of_storages_are_what_torch_loads(tmp_path: Path) -> None:
    tensors = [WHOLE, TarTensor(10, 5, "Float", (2,), (2,), 1), TarTensor(11, 6, "Float", (2,), (1,)),
               TarTensor(12, 7, "Float", (), ()), TarTensor(13, 8, "Long", (0,), (1,))]  # fmt: skip
    views = [(6, 5, 1, 3), (7, 6, 2, 1)]
    storages = [STORAGE, TarStorage(8, "Long", b"", 8, "cuda:0")]
    root = {"whole": old.numbered(9), "tied": old.numbered(9), "strided": old.numbered(10), "part": old.numbered(11),
            "part_of_part": old.numbered(12), "epoch": 3}  # fmt: skip
    path = write(tmp_path, old.tar(root, storages, tensors, views))
    oracle = torch.load(path, weights_only=False, map_location="cpu")
    with ckpt_cli.open(path) as checkpoint:
        assert checkpoint.format == "tar"
        assert checkpoint["epoch"] == 3
        for tensor in checkpoint.tensors:
            assert tensor.numpy().tolist() == oracle[tensor.name].tolist()


def test_set_changes_every_view(tmp_path: Path, ckpt: Ckpt) -> None:
    root = {"whole": old.numbered(9), "part": old.numbered(11)}
    path = write(tmp_path, old.tar(root, [STORAGE], [WHOLE, TarTensor(11, 6, "Float", (2,), (1,))], [(6, 5, 2, 2)]))
    assert "whole also changed" in ckpt("set", path, "part[0]=9").err
    assert torch.load(path, weights_only=False)["whole"].tolist() == [[1, 2], [9, 4]]


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_that_pythons_tarfile_writes_is_read(style: int, tmp_path: Path) -> None:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(old.tar({"a": old.numbered(9)}, [STORAGE], [WHOLE]))) as made:
        for member in made:
            file = made.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as written:
        for name, content in found.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1.5  # type: ignore[assignment]  # a pax header says so
            written.addfile(member, io.BytesIO(content))
    assert ckpt_cli.load(write(tmp_path, buffer.getvalue()))["a"].tolist() == [[1, 2], [3, 4]]


def test_a_module_of_a_class_that_nobody_has_opens_up(tmp_path: Path) -> None:
    from builders.pickles import built, named, new, persistent

    kind = persistent((named("lab.Net"), "lab.py", "class Net: ..."))
    state = {"_parameters": {"w": old.numbered(9)}, "_buffers": {}, "_modules": {}}
    (tensor,) = open_checkpoint(write(tmp_path, old.tar(built(new(kind), state), [STORAGE], [WHOLE]))).tensors
    assert (tensor.name, tensor.kind) == ("w", "parameter")


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (TarTensor(9, 6, "Float", (1,), (1,)), "which is not there"),
        (TarTensor(9, 5, "Float", (5,), (1,)), "needs byte 20"),
        (TarTensor(9, 5, "Float", (2,), (1,), 3), "needs byte 20"),
        (TarTensor(9, 5, "Float", (2,), (-1,)), "below 0"),
        (TarTensor(9, 5, "Float", (-2,), (1,)), "shape or stride holds -2"),
        (TarTensor(9, 5, "Float", (1,) * 65, (1,) * 65), "65 dimensions"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tensor: TarTensor, problem: str, tmp_path: Path) -> None:
    assert problem in str(refused(write(tmp_path, old.tar({"a": old.numbered(9)}, [STORAGE], [tensor]))))


@pytest.mark.parametrize("view", [(6, 4, 0, 1), (6, 5, 3, 2), (6, 5, -1, 1)])
def test_a_view_of_what_is_not_there_is_refused(view: tuple[int, int, int, int], tmp_path: Path) -> None:
    assert isinstance(refused(write(tmp_path, old.tar({}, [STORAGE], [], [view]))), MalformedError)


def test_counts_meet_the_size_of_their_list(tmp_path: Path) -> None:
    lists = [("pickle", pickled({})), ("tensors", pickled(1 << 40)), ("storages", pickled(0) + pickled([]))]
    assert isinstance(refused(write(tmp_path, old.archive(lists))), TruncatedError)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    content = bytearray(old.tar({"a": old.numbered(9)}, [STORAGE], [WHOLE]))
    content[10] ^= 1
    assert "checksum" in str(refused(write(tmp_path, bytes(content))))
    huge = old.member("storages", b"", size=b"77777777777\0")
    assert isinstance(refused(write(tmp_path, huge)), TruncatedError)
    odd = old.member("storages", b"", size=b"zzzzzzzzzzz\0")
    assert "in the place of a number" in str(refused(write(tmp_path, odd)))
    wide = old.member("storages", b"", size=b"\x80" + b"\xff" * 11)
    assert isinstance(refused(write(tmp_path, wide)), TruncatedError)


def test_members_without_end_meet_a_limit(tmp_path: Path) -> None:
    assert isinstance(refused(write(tmp_path, old.member("a", b"") * 1001)), LimitError)


def test_lists_meet_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TAR_ITEMS", 0)
    assert isinstance(refused(write(tmp_path, old.tar({}, [STORAGE], []))), LimitError)
