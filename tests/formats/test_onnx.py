"""ONNX models: initializers as ranges, decoded numbers, external data within the folder, hostile fields."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import Ckpt, refused
from containers import changed, initializer, onnx_model, packed, part, raw, read_onnx, varint

from ckpt_cli.arrays.quantized import values_of
from ckpt_cli.errors import CkptError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.model.checkpoint import Opaque, Tensor, Value

W = torch.arange(12.0).reshape(3, 4)


def write(folder: Path, content: bytes, name: str = "m.onnx") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def _numbers(values: list[int]) -> bytes:
    return b"".join(map(varint, values))


def _codes(tensor: torch.Tensor) -> list[int]:
    return [code & 0xFFFF for code in tensor.view(torch.int16).tolist()]


TYPED = {
    "float": (torch.tensor([1.0, -2.5]), part(4, struct.pack("<2f", 1, -2.5))),
    "double": (torch.tensor([1.0, -2.5]).double(), part(10, struct.pack("<2d", 1, -2.5))),
    "int64": (torch.tensor([3, -4, 1 << 40]), part(7, _numbers([3, -4, 1 << 40]))),
    "int32": (torch.tensor([3, -4]).int(), part(5, _numbers([3, -4]))),
    "int8": (torch.tensor([3, -4, -128]).to(torch.int8), part(5, _numbers([3, -4, -128]))),
    "one number": (torch.tensor([300]).int(), part(5, 300)),
    "bool": (torch.tensor([True, False]), part(5, _numbers([1, 0]))),
    "half": (torch.tensor([1.5, -2]).half(), part(5, _numbers(_codes(torch.tensor([1.5, -2]).half())))),
    "bfloat16": (torch.tensor([1.5, -2]).bfloat16(), part(5, _numbers(_codes(torch.tensor([1.5, -2]).bfloat16())))),
}


@pytest.mark.parametrize("kind", TYPED)
def test_elements_in_fields_of_their_dtype_are_decoded(tmp_path: Path, ckpt: Ckpt, kind: str) -> None:
    tensor, field = TYPED[kind]
    strings = part(14, part(1, b"k") + part(2, b"v"))
    path = write(tmp_path, onnx_model(initializer("a", tensor, field), initializer("w", W), properties=strings))
    checkpoint = open_checkpoint(path)
    found = torch.from_numpy(values_of(checkpoint, next(iter(checkpoint.tensors))).copy())
    assert torch.equal(found.to(tensor.dtype), tensor)
    assert checkpoint.version == "ONNX, IR version 8, made by pytorch 2.1"
    assert checkpoint.metadata == {"k": "v"}
    checkpoint.close()
    assert ckpt("convert", path, tmp_path / "out.pt").code in (0, 2)
    done = ckpt("set", path, "a[0]=1")
    in_place = kind in ("float", "double")
    assert done.code == (0 if in_place else 2)
    assert in_place or "numbers of different lengths" in done.err


def _external(name: str, tensor: torch.Tensor, **said: str) -> bytes:
    pairs = b"".join(part(13, part(1, key.encode()) + part(2, value.encode())) for key, value in said.items())
    return initializer(name, tensor, pairs, part(14, 1))


def test_external_data_is_read_and_set_in_the_file_beside(tmp_path: Path, ckpt: Ckpt) -> None:
    data = bytes(64) + raw(W) + bytes(8)
    (tmp_path / "w.data").write_bytes(data)
    path = write(
        tmp_path,
        onnx_model(
            _external("w", W, location="w.data", offset="64", length=str(W.nbytes)),
            _external("gone", W, location="no.data"),
            _external("up", W, location="../w.data"),
            _external("root", W, location="/etc/passwd"),
            initializer("b", W[0].clone()),
        ),
    )
    assert ckpt("set", path, "w[2,1]=-7").code == 0
    expected = W.clone()
    expected[2, 1] = -7
    assert (tmp_path / "w.data").read_bytes() == bytes(64) + raw(expected) + bytes(8)
    checkpoint = open_checkpoint(path)
    assert [(tensor.name, tensor.shape) for tensor in checkpoint.tensors] == [("w", (3, 4)), ("b", (4,))]
    values = {entry.name: entry.value for entry in checkpoint.entries if isinstance(entry, Value)}
    assert values == {
        "gone": Opaque("<float32 [3, 4], in 'no.data', which is not there>"),
        "up": Opaque("<float32 [3, 4], in '../w.data', which is not in its folder>"),
        "root": Opaque("<float32 [3, 4], in '/etc/passwd', which is not in its folder>"),
    }
    assert checkpoint.notes == ["external data that is not in its folder: 'no.data', '../w.data', '/etc/passwd'"]
    assert len(checkpoint.container.files) == 2


def test_what_cannot_be_read_is_listed_by_name(tmp_path: Path) -> None:
    four = part(1, varint(3)) + part(2, 22) + part(8, b"int4") + part(9, b"ab")
    sparse = part(15, part(1, initializer("sparse", W)) + part(3, varint(9)))
    checkpoint = open_checkpoint(write(tmp_path, onnx_model(initializer("w", W), four, graph=sparse)))
    assert [entry.name for entry in checkpoint.entries] == ["w", "int4", "sparse"]
    assert checkpoint.notes == ["only listed, for their dtypes or as sparse ones: 'int4', 'sparse'"]


FAULTS = {
    "raw data unlike the shape": onnx_model(initializer("w", W, part(9, b"abc"))),
    "no elements": onnx_model(initializer("w", W, part(12, b"x"))),
    "elements twice": onnx_model(initializer("w", W, part(9, raw(W)), part(4, raw(W)))),
    "elements in another field": onnx_model(initializer("w", W, part(7, raw(W)))),
    "a negative size": onnx_model(part(1, varint(-1)) + part(2, 1) + part(8, b"w") + part(9, b"")),
    "65 dimensions": onnx_model(part(1, b"\1" * 65) + part(2, 1) + part(8, b"w") + part(9, b"abcd")),
    "a field behind the end": onnx_model(initializer("w", W))[:-20],
    "a group": part(1, 8) + part(2, b"pytorch") + b"\x3b\x08",
    "an endless number": part(1, 8) + part(2, b"pytorch") + b"\x38" + b"\xff" * 20,
    "an offset that is no number": onnx_model(_external("w", W, location="m.onnx", offset="-1")),
    "external data that is too short": onnx_model(_external("w", W, location="m.onnx", offset="9999")),
    "a length unlike the shape": onnx_model(_external("w", W, location="m.onnx", length="4")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_sound_is_refused_in_words(tmp_path: Path, name: str) -> None:
    assert refused(write(tmp_path, FAULTS[name])).path


def test_numbers_that_are_too_few_are_an_error_where_they_are_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        write(tmp_path, onnx_model(initializer("w", torch.ones(5, dtype=torch.int64), part(7, b"\1\2"))))
    )
    with pytest.raises(CkptError, match="16 bytes, 40 are needed"):
        values_of(checkpoint, next(iter(checkpoint.tensors)))


@pytest.mark.parametrize("limit", ["ONNX_FIELDS", "ONNX_INITIALIZERS"])
def test_far_too_many_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(f"ckpt_cli.limits.{limit}", 100)
    assert "more than 100 " in str(refused(write(tmp_path, onnx_model(*[b""] * 200))))


SOUND = onnx_model(initializer("a", *TYPED["int64"]), initializer("w", W), _external("x", W, location="m"))
CHANGES = [b"", b"\xff", b"\x80", b"\1", b"\x2a", packed(1)]


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    for content in changed(SOUND, CHANGES, seed, begin=5):
        _read_or_refuse(write(tmp_path, content))


def _read_or_refuse(path: str) -> None:
    try:
        checkpoint = open_checkpoint(path)
    except (CkptError, OSError):
        return
    for entry in checkpoint.entries:
        if isinstance(entry, Tensor) and entry.storage is not None:
            with suppress(CkptError):
                assert len(entry.storage.view(0, entry.nbytes)) == entry.nbytes
    checkpoint.close()


def test_the_reference_reads_what_was_written(tmp_path: Path) -> None:
    path = Path(write(tmp_path, onnx_model(initializer("w", W))))
    assert torch.equal(read_onnx(path)["w"], W)
