"""A pickle is found however it is compressed or encoded: in a string, a record or a file, and one in another."""

from __future__ import annotations

import base64
import binascii
import bz2
import gzip
import io
import lzma
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from builders.pickles import pickled
from builders.pt import Record, archive, torch_records
from scanning import HARMFUL, HARMLESS, codes, scanned

from ckpt_cli import limits
from ckpt_cli.budget import ScanBudget
from ckpt_cli.scanner.packed import GZIP, PACKINGS, decodings, unpack

OLD = b"cos\nsystem\n(S'id'\ntR."
"""A harmful pickle of protocol 0."""


def _zfile(data: bytes) -> bytes:
    return b"ZF" + hex(len(data)).ljust(19).encode() + zlib.compress(data)


def _tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        member = tarfile.TarInfo("a")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _in_lines(data: bytes) -> bytes:
    return b"begin\n" + base64.encodebytes(data * 8)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "a small window of zlib": lambda data: (z := zlib.compressobj(wbits=9)).compress(data) + z.flush(),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "joblib before 0.9.3": _zfile,
    "base64": base64.b64encode,
    "base64 for URLs": base64.urlsafe_b64encode,
    "base64 in lines": base64.encodebytes,
    "base64 with other characters in it": lambda data: base64.b64encode(data).replace(b"A", b"!A."),
    "hex": binascii.hexlify,
    "hex in upper case": lambda data: binascii.hexlify(data).upper(),
    "hex with colons": lambda data: binascii.hexlify(data, ":"),
    "base64 within a text": lambda data: b"exec(loads(b64decode('" + base64.b64encode(data) + b"')))",
    "hex within a text": lambda data: b"loads(bytes.fromhex('" + binascii.hexlify(data) + b"'))",
    "base64 of zlib": lambda data: base64.b64encode(zlib.compress(data)),
    "base64 of base64": lambda data: base64.b64encode(base64.b64encode(data)),
    "hex of bzip2": lambda data: binascii.hexlify(bz2.compress(data)),
    "zlib of base64": lambda data: zlib.compress(base64.b64encode(data)),
    "zlib of zlib": lambda data: zlib.compress(zlib.compress(data)),
    "a zip file": lambda data: archive([Record("a/data.pkl", data)]),
    "a tar file": lambda data: _tar(data),
    "base64 of a tar file": lambda data: base64.b64encode(_tar(data)),
    "an array of objects": lambda data: _npy(data),
    "base64 of an array of objects": lambda data: base64.b64encode(_npy(data)),
}  # fmt: skip


def _names_the_command(path: Path, content: bytes) -> bool:
    found = scanned(path, content)
    return not found.ok and any("os.system" in finding.message for finding in found.findings)


@pytest.mark.parametrize("payload", [HARMFUL, OLD], ids=["protocol 2", "protocol 0"])
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_pickle_is_found_in_strings_and_records(tmp_path: Path, name: str, payload: bytes) -> None:
    packed = PACKED[name](payload)
    assert _names_the_command(tmp_path / "bytes.pkl", pickled({"x": packed}))
    if packed.isascii():
        assert _names_the_command(tmp_path / "str.pkl", pickled({"x": packed.decode()}))
    else:
        assert _names_the_command(tmp_path / "latin.pkl", pickled({"x": packed.decode("latin-1")}))
    records = [*torch_records(HARMLESS), Record("archive/readme.txt", packed)]
    assert _names_the_command(tmp_path / "record.pt", archive(records))
    assert _names_the_command(tmp_path / "storage.pt", archive(torch_records(HARMLESS, {"0": packed})))


@pytest.mark.parametrize("name", ["gzip", "zlib", "bzip2", "xz", "lzma", "joblib before 0.9.3"])
@pytest.mark.parametrize("file", ["m.pkl", "m.bin"])
def test_a_file_that_is_compressed_as_a_whole_is_opened(tmp_path: Path, name: str, file: str) -> None:
    assert _names_the_command(tmp_path / file, PACKED[name](HARMFUL))
    assert codes(scanned(tmp_path / file, PACKED[name](HARMLESS))) == set()


@pytest.mark.parametrize("name", ["gzip", "zlib", "bzip2", "xz", "lzma"])
def test_what_stands_before_the_break_of_a_stream_is_found(tmp_path: Path, name: str) -> None:
    packed = PACKED[name](HARMFUL + bytes(range(256)) * 4000)
    assert _names_the_command(tmp_path / "m.pkl", packed[: len(packed) * 3 // 4])


def test_ordinary_text_and_numbers_are_not_taken_for_packed_pickles(tmp_path: Path) -> None:
    texts = {
        "uuid": "123e4567-e89b-12d3-a456-426614174000",
        "sha": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "key": "model.layers.0.self_attn.q_proj.weight_quantizer_enabled",
        "picture": base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(range(256))).decode(),
        "prose": "The quick brown fox jumps over the lazy dog\n" * 40,
        "path": "/data/imagenet/train/n01440764/n01440764_10026.JPEG",
        "numbers": struct.pack("<64f", *[n / 1000 for n in range(64)]),
    }
    found = scanned(tmp_path / "m.pkl", pickled([texts] * 3))
    assert (found.ok, found.findings) == (True, [])


def test_files_of_several_parts_that_do_no_harm_are_no_alarm_in_strings(tmp_path: Path) -> None:
    plain = io.BytesIO()
    np.save(plain, np.ones(3))
    strings = [_tar(HARMLESS), _tar(b"notes"), _npy(HARMLESS), plain.getvalue(), b"\x93NUMPY"]
    found = scanned(tmp_path / "m.pkl", pickled([*strings, base64.b64encode(_tar(HARMLESS))]))
    assert codes(found) == set()


def test_an_encoded_pickle_that_does_no_harm_is_no_alarm(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pkl", pickled({"x": base64.b64encode(HARMLESS * 3).decode()}))
    assert (found.ok, found.findings) == (True, [])


# --- zip files --------------------------------------------------------------------------------------------------------


def _npy(content: bytes, descr: bytes = b"|O") -> bytes:
    header = b"{'descr': '%s', 'fortran_order': False, 'shape': (1,), }" % descr
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


def _npz(members: dict[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("member", ["b.npy", "b.txt", "b", "b.md", "folder/b.py"])
def test_an_array_of_objects_is_found_in_any_member_of_an_npz(tmp_path: Path, method: int, member: str) -> None:
    numbers = _npy(bytes(8), b"<f8")
    assert _names_the_command(tmp_path / "w.npz", _npz({"a.npy": numbers, member: _npy(HARMFUL)}, method))
    clean = scanned(tmp_path / "c.npz", _npz({"a.npy": numbers, member: numbers}, method))
    assert (clean.ok, clean.findings) == (True, [])


@pytest.mark.parametrize("method", [1, 9, 93, 98])
def test_a_record_that_cannot_be_unpacked_is_not_called_harmless(
    tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    found = scanned(tmp_path / "w.npz", archive([Record("a.npy", _npy(HARMFUL), method)]))
    assert codes(found) == {"not-searched"}


def test_large_compressed_arrays_of_numbers_are_not_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SCAN_INFLATED", 300_000)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (131072,), }"
    numbers = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(1 << 20)
    found = scanned(tmp_path / "w.npz", _npz({f"{n}.npy": numbers for n in range(4)}, zipfile.ZIP_DEFLATED))
    assert (found.ok, found.findings) == (True, [])


# --- zstandard --------------------------------------------------------------------------------------------------------


class _Stream(io.BytesIO):
    pass


def _zstandard(content: bytes) -> types.ModuleType:
    """A stand-in for the package: whatever the frame, it decompresses to `content`."""
    module = types.ModuleType("zstandard")

    class Decompressor:
        def __init__(self, **_: int) -> None:
            pass

        def stream_reader(self, _: bytes, **__: bool) -> io.BytesIO:
            return _Stream(content)

    module.ZstdDecompressor = Decompressor  # type: ignore[attr-defined]
    module.ZstdError = type("ZstdError", (Exception,), {})  # type: ignore[attr-defined]
    return module


FRAME = b"\x28\xb5\x2f\xfd" + bytes(30)


def test_zstandard_is_read_where_its_package_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", _zstandard(HARMFUL))
    for content in (FRAME, pickled({"x": FRAME}), archive([Record("a/b", FRAME)]), archive([Record("a", FRAME, 93)])):
        assert _names_the_command(tmp_path / "m.pkl", content)


def test_zstandard_is_not_called_harmless_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    for content in (FRAME, pickled({"x": FRAME}), archive([Record("a/b", FRAME)])):
        assert codes(scanned(tmp_path / "m.pkl", content)) == {"not-searched"}


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gzip", "zlib", "bzip2", "xz", "lzma"])
def test_a_bomb_is_cut_at_the_limit(name: str) -> None:
    bomb = PACKED[name](bytes(3 << 20))
    packing = next(packing for packing in PACKINGS if packing.matches(bomb))
    budget = ScanBudget(inflated=limits.SCAN_INFLATED - (1 << 20))
    found = unpack(packing, memoryview(bomb), budget)
    assert found is not None
    assert (found.cut, len(found.data)) == (True, 1 << 20)
    again = unpack(packing, memoryview(bomb), budget)
    assert again is not None
    assert (again.cut, len(again.data)) == (True, 0)


def test_bombs_within_bombs_share_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_HELD", 100_000)
    inner = gzip.compress(bytes(1 << 20))
    found = scanned(tmp_path / "m.gz", gzip.compress(inner + bytes(99_000 - len(inner))))
    assert codes(found) == {"not-searched"}


def test_encodings_within_encodings_end_at_a_depth(tmp_path: Path) -> None:
    text = HARMFUL
    for _ in range(limits.SCAN_NESTING + 3):
        text = base64.b64encode(text)
    assert codes(scanned(tmp_path / "m.pkl", pickled({"x": text.decode()}))) == {"not-searched"}


def test_a_text_of_many_runs_is_decoded_to_a_number() -> None:
    assert sum(1 for _ in decodings((base64.b64encode(HARMFUL * 2) + b" ") * 5000)) <= 2002


def test_packings_do_not_share_a_beginning_with_pickles_unless_both_are_tried() -> None:
    assert not GZIP.matches(b"\x80\x02N.")
    assert [packing.sure for packing in PACKINGS if packing.matches(b"(S'raise'\n")] == [False]
