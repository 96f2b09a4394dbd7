"""Numbers that look like a pickle by chance are numbers: no storage and no array alarms unless it does something."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.pickles import pickled, tensor
from builders.pt import torch_records, write
from conftest import Ckpt
from numbers_scanned import KINDS, alarms
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli.ops.scan import scan


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_never_alarm(kind: str) -> None:
    assert alarms(kind, seed=1, count=20_000) == []


@pytest.mark.parametrize(
    "start",
    [
        b"\x88\x32\x93\x3c",
        b"\x8f\x5d\x93\xbc",
        b"\x80\x35\x2e\x3c",
        b"\x80\x02N.",
        b"\x80\x04\x95\xff",
        b"]\0\0\0",
        b"x\x9c\1\2",
        b"\x1f\x8b\x08\0",
        b"BZh9",
        b"(S'\n",
        b"\x82\1)R.",
        b"cab\n",
        b"N.N.",
        b"\x28\xb5\x2f\0",
    ],
)
def test_a_storage_that_begins_as_a_pickle_does_is_numbers(tmp_path: Path, start: bytes) -> None:
    storage = start + bytes(range(200))
    for content in (storage, storage * 50):
        root = {"w": tensor("0", (len(content),), kind="Byte")}
        found = scanned(tmp_path / "m.pt", write(tmp_path / "w.pt", root, {"0": content}).read_bytes())
        assert (found.ok, found.findings) == (True, [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_storages_of_every_dtype_are_numbers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for n in range(300):
        values = torch.randn(65, generator=generator) * 0.02
        state[f"{n}.f32"], state[f"{n}.bf16"], state[f"{n}.f16"] = values, values.bfloat16(), values.half()
        state[f"{n}.i8"] = torch.randint(-128, 128, (64,), generator=generator, dtype=torch.int8)
        state[f"{n}.text"] = torch.frombuffer(bytearray(f"c{n}\nposix\nsystem\n".encode()), dtype=torch.uint8)
        state[f"{n}.ids"] = torch.randint(0, 60_000, (9,), generator=generator)
    torch.save(state, tmp_path / "m.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), tmp_path / "s.pt")
    np.savez_compressed(tmp_path / "c.npz", **{f"a{n}": np.random.default_rng(n).bytes(50) for n in range(300)})
    for name in ("m.pt", "s.pt", "c.npz"):
        found = scan(str(tmp_path / name))
        assert (found.ok, found.findings) == (True, []), name


def test_a_payload_in_a_storage_is_found_all_the_same(tmp_path: Path) -> None:
    for payload in (HARMFUL, HARMFUL + bytes(100), b"cos\nsystem\n(S'id'\ntR."):
        found = scanned(tmp_path / "m.pt", write(tmp_path / "w.pt", {"a": 1}, {"0": payload}).read_bytes())
        assert any("os.system" in finding.message for finding in found.findings)


@pytest.mark.parametrize("size", [128, 384, 640, 896, 1152, 1408])
def test_the_length_of_a_safetensors_header_is_not_a_protocol(tmp_path: Path, size: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(size)
    content = struct.pack("<Q", size) + header + bytes(4)
    assert content[0] == 0x80
    found = scanned(tmp_path / "m.safetensors", content)
    assert (found.ok, found.findings) == (True, [])


def test_a_safetensors_file_that_is_a_pickle_as_well_is_found(tmp_path: Path) -> None:
    content = b"\x80\4\x8c\5\0\0\0\0{0cos\nsystem\n(S'id'\ntR."
    assert "dangerous-global" in codes(scanned(tmp_path / "m.safetensors", content))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("first", [b"O", b"object", b"\\"])
def test_the_data_of_an_array_are_not_read_as_its_header(tmp_path: Path, version: int, first: bytes) -> None:
    data = first + b"\x80\2N.junk\x93"
    header = b"{'descr': '|V1', 'fortran_order': False, 'shape': (%d,), }" % len(data)
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    found = scanned(tmp_path / "a.npy", b"\x93NUMPY" + bytes([version, 0]) + length + header + data)
    assert (found.ok, found.findings) == (True, [])


def test_an_array_of_a_dtype_that_does_not_say_its_size_is_numbers(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(b"O\x80\2N.", dtype=np.uint8))
    assert scanned(tmp_path / "a.npy", buffer.getvalue().replace(b"'|u1'", b"'|q1'")).ok


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_mobile_model_is_ordinary_unless_its_bytecode_writes(tmp_path: Path) -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.save(x, "out.pt")
            return x

    torch.jit.script(torch.nn.Linear(2, 2))._save_for_lite_interpreter(str(tmp_path / "m.ptl"))
    found = scan(str(tmp_path / "m.ptl"))
    assert (found.ok, found.findings) == (True, [])
    torch.jit.script(Writes())._save_for_lite_interpreter(str(tmp_path / "w.ptl"))
    found = scan(str(tmp_path / "w.ptl"))
    assert codes(found, "error") == {"script-effect"}
    assert any("aten::save" in finding.message for finding in found.findings)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.mark.parametrize("name", ["p.pt", "p.pkl", "p.joblib", "p.npz", "p.json"])
def test_a_git_lfs_pointer_is_called_that(tmp_path: Path, ckpt: Ckpt, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    alone = ckpt("scan", tmp_path / name)
    assert alone.code == 2
    assert "git LFS pointer" in alone.err
    (tmp_path / "m.pkl").write_bytes(HARMLESS)
    found = scan(str(tmp_path))
    assert [(item.code, item.where) for item in found.findings] == [("not-searched", name)]
    assert "git LFS pointer" in found.findings[0].message


def test_a_plain_pickle_without_a_protocol_is_still_read(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.bin", pickled({"a": 1}, None))
    assert (found.ok, found.pickles) == (True, 1)
    assert torch_records(HARMLESS)


def test_the_run_over_many_blocks_says_what_alarmed() -> None:
    script = Path(__file__).parent.parent / "support" / "numbers_scanned.py"
    done = subprocess.run([sys.executable, script, "--blocks", "200"], capture_output=True, text=True, check=True)
    assert done.stdout.count("0 alarms") == len(KINDS)
