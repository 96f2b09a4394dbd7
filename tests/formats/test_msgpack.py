"""Msgpack files of Flax: arrays as ranges of the file, names from nested maps, hostile lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ckpt, refused
from containers import changed, packed, raw, read_msgpack

from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Tensor, Value

STATE = {
    "params": {"Dense_0": {"kernel": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(4, dtype=torch.bfloat16)}},
    "opt_state": {"0": {"count": np.int32(7), "mu": [torch.zeros(2), torch.tensor(3)]}},
    "step": 1200, "scale": 0.5, "name": "run", "none": None, "on": True, "z": 1 + 2j, "raw": b"ab", "low": -3,
    "half": np.float16(0.5),
}  # fmt: skip


def write(folder: Path, content: bytes) -> str:
    path = folder / "m.msgpack"
    path.write_bytes(content)
    return str(path)


def test_arrays_are_tensors_and_other_leaves_values(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, packed(STATE)))
    tensors = {entry.name: entry for entry in checkpoint.entries if isinstance(entry, Tensor)}
    assert {name: (f"{entry.dtype}", entry.shape) for name, entry in tensors.items()} == {
        "params.Dense_0.kernel": ("float32", (3, 4)),
        "params.Dense_0.bias": ("bfloat16", (4,)),
        "opt_state.0.mu.0": ("float32", (2,)),
        "opt_state.0.mu.1": ("int64", ()),
    }
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert values == {
        "opt_state.0.count": 7, "step": 1200, "scale": 0.5, "name": "run", "none": None, "on": True,
        "z": Opaque("(1+2j)"), "raw": Opaque("<2 bytes>"), "low": -3, "half": 0.5,
    }  # fmt: skip
    kernel = tensors["params.Dense_0.kernel"]
    assert kernel.storage is not None
    assert bytes(kernel.storage.view(0, kernel.nbytes)) == raw(STATE["params"]["Dense_0"]["kernel"])  # type: ignore[index]


@pytest.mark.parametrize("chunk", [4, 12, 40, 100])
def test_an_array_in_chunks_is_one_tensor_whose_elements_are_set_where_they_are(
    tmp_path: Path, ckpt: Ckpt, chunk: int
) -> None:
    whole = torch.arange(60.0).reshape(3, 4, 5)
    path = write(tmp_path, packed({"a": {"w": whole}, "b": torch.ones(1)}, chunk=chunk))
    assert [line.split("\t")[:3] for line in ckpt("ls", path).lines] == [
        ["a.w", "float32", "[3,4,5]"],
        ["b", "float32", "[1]"],
    ]
    out = tmp_path / "out.pt"
    assert ckpt("convert", path, out).code == 0
    assert torch.equal(torch.load(out)["a.w"], whole)
    assert ckpt("set", path, "a.w[1,:,2]=[1,2,3,4]").code == 0
    whole[1, :, 2] = torch.arange(1.0, 5)
    assert torch.equal(read_msgpack(Path(path))["a.w"], whole)


FAULTS = {
    "an array behind the end": b"\x81\xa1a\xc9\x7f\xff\xff\xff\x01\x93\x90\xa7float32\xc6\x7f\xff\xff\xff",
    "bytes unlike the shape": b"\x81\xa1a\xc7\x0f\x01\x93\x91\x05\xa7float32\xc4\x02ab",
    "a shape below zero": b"\x81\xa1a\xc7\x0f\x01\x93\x91\xff\xa7float32\xc4\x02ab",
    "a huge shape": b"\x81\xa1a\xc7\x19\x01\x93\x92\xcf" + b"\x7f" * 8 + b"\x05\xa7float32\xc4\x02ab",
    "an array that is not one": b"\x81\xa1a\xd5\x01ab",
    "a map of 2^32 keys": b"\xdf\xff\xff\xff\xff\xa1a\xc0",
    "a reserved code": b"\x81\xa1a\xc1",
    "a map as a key": b"\x82\xa1a\xc0\x80\xc0",
    "a complex of text": b"\x81\xa1a\xc7\x05\x02\x92\xa1a\xa1b",
    "a cut text": b"\x81\xa1a\xdb\xff\xff\xff\xffabc",
    "deep lists": b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",
    "deep maps": b"\x81\xa1a" * 5000 + b"\xc0",
    "chunks without a shape": packed({"a": {"__msgpack_chunked_array__": True, "chunks": {"0": torch.ones(2)}}}),
    "chunks that lack one": packed(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": torch.ones(2)}}}
    ),
    "chunks of several dtypes": packed({"a": {
        "__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": torch.ones(1), "1": torch.ones(1).int()},
    }}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_sound_is_refused_in_words(tmp_path: Path, name: str) -> None:
    assert refused(write(tmp_path, FAULTS[name])).path


def test_far_too_many_items_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.limits.MSGPACK_ITEMS", 1000)
    assert "more than 1,000 items" in str(refused(write(tmp_path, b"\x81\xa1a\xdd\0\1\0\0" + b"\xc0" * 65536)))


def test_bytes_after_the_last_item_are_a_warning(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path, packed({"a": torch.ones(2)}) + b"rest")).unread == [
        f"4 bytes after the last item (byte {len(packed({'a': torch.ones(2)}))})"
    ]


SOUND = packed({**STATE, "c": torch.ones(9)}, chunk=8)
CHANGES = [b"", b"\xff", b"\x80", b"\1", b"\xdf", b"\xc7"]


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    for content in changed(SOUND, CHANGES, seed):
        _read_or_refuse(write(tmp_path, content))


def _read_or_refuse(path: str) -> None:
    try:
        checkpoint = open_checkpoint(path)
    except CkptError:
        return
    for entry in checkpoint.entries:
        if isinstance(entry, Tensor) and entry.storage is not None:
            assert len(entry.storage.view(0, entry.nbytes)) == entry.nbytes
    checkpoint.close()


def test_a_folder_stands_for_the_only_checkpoint_in_it_whatever_wrote_that(tmp_path: Path, ckpt: Ckpt) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(packed({"a": torch.ones(2)}))
    (tmp_path / "config.json").write_text("{}")
    assert ckpt("ls", tmp_path).lines == ["a\tfloat32\t[2]\t8"]
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "a folder without a checkpoint" in ckpt("ls", tmp_path).err
    torch.save({"b": torch.ones(3)}, tmp_path / "model.pt")
    assert ckpt("ls", tmp_path).lines == ["b\tfloat32\t[3]\t12"]
