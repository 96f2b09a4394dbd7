"""No container hides a pickle from `ckpt scan`, and files within files are opened to a limit."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.pickles import call, named, pickled
from builders.pt import DEFLATED, Record, archive, torch_records, write
from conftest import Ckpt
from scanning import HARMFUL, HARMLESS, codes, scan_or_refuse, scanned

from ckpt_cli import limits
from ckpt_cli.ops.scan import scan


def plain(**changes: Any) -> list[Record]:
    return torch_records(HARMLESS, {"0": bytes(64)}, **changes)


def pt(records: list[Record]) -> bytes:
    return archive(records)


def _renamed_in_directory() -> bytes:
    return pt([Record("archive/datap.kl", HARMFUL, local_name="archive/data.pkl"), *plain()[1:]])


def _unlisted() -> bytes:
    whole = bytearray(pt([*plain()[:-1], Record("archive/evil.pkl", HARMFUL), plain()[-1]]))
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        start = file.start_dir
    at = whole.index(b"PK\1\2", whole.index(b"evil.pkl", start) - 60)
    end = whole.index(b"PK\1\2", at + 4)
    entry = bytes(whole[at:end])
    del whole[at:end]
    tail = whole.index(b"PK\6\6", start)
    count, size = struct.unpack_from("<Q", whole, tail + 32)[0], struct.unpack_from("<Q", whole, tail + 40)[0]
    struct.pack_into("<3Q", whole, tail + 24, count - 1, count - 1, size - len(entry))
    place = whole.index(b"PK\6\7", tail)
    struct.pack_into("<Q", whole, place + 8, tail)
    return bytes(whole)


def _npy(content: bytes, descr: bytes = b"|O") -> bytes:
    header = b"{'descr': '%s', 'fortran_order': False, 'shape': (1,), }" % descr
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


_NUMBERS = _npy(b"\7", b"|u1")
"""An array of one number."""


CONTAINERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "data.pkl": (lambda: pt(torch_records(HARMFUL)), "dangerous-global"),
    "second data.pkl": (lambda: pt([*plain(), Record("archive/data.pkl", HARMFUL)]), "duplicate-record"),
    "data.pkl elsewhere": (lambda: pt([*plain(), Record("archive/x/data.pkl", HARMFUL)]), "misplaced-pickle"),
    "data.pkl of another prefix": (lambda: pt([*plain(), Record("other/data.pkl", HARMFUL)]), "outside-prefix"),
    "another pickle": (lambda: pt([*plain(), Record("archive/evil.pkl", HARMFUL)]), "extra-pickle"),
    "a storage that is a pickle": (lambda: pt([*plain(), Record("archive/data/1", HARMFUL)]), "dangerous-global"),
    "wrong crc": (lambda: pt([Record("archive/data.pkl", HARMFUL, crc=7), *plain()[1:]]), "wrong-crc"),
    "wrong flags": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x809), *plain()[1:]]), "header-mismatch"),
    "flag 0x20": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x828), *plain()[1:]]), "header-mismatch"),
    "flag 0x40": (lambda: pt([Record("archive/data.pkl", HARMFUL, flags=0x848), *plain()[1:]]), "header-mismatch"),
    "other name": (_renamed_in_directory, "header-mismatch"),
    "other method": (
        lambda: pt([Record("archive/data.pkl", HARMFUL, local_method=8), *plain()[1:]]),
        "header-mismatch",
    ),
    "unlisted": (_unlisted, "unlisted-record"),
    "deflated": (lambda: pt([Record("archive/data.pkl", HARMFUL, DEFLATED), *plain()[1:]]), "dangerous-global"),
    "junk before": (lambda: HARMFUL + pt(plain()), "trailing-data"),
    "a pickle, then a deflated zip": (
        lambda: HARMLESS + pt([Record("archive/data.pkl", HARMFUL, DEFLATED), *plain()[1:]]),
        "two-formats",
    ),
    "junk after": (lambda: pt(plain()) + HARMFUL, "trailing-data"),
    "zip in a zip": (lambda: pt([Record("a/b", pt(torch_records(HARMFUL)))]), "dangerous-global"),
    "two zips": (lambda: pt(torch_records(HARMFUL)) + pt(plain()), "several-zips"),
    "no end record": (lambda: pt(torch_records(HARMFUL))[:300], "broken-zip"),
    "objects of numpy": (lambda: _npy(HARMFUL), "dangerous-global"),
    "objects of numpy after numbers": (lambda: _NUMBERS * 2 + _npy(HARMFUL), "dangerous-global"),
    "objects of numpy after JSON": (lambda: b'{"a": 1}\n' + _NUMBERS + _npy(HARMFUL), "dangerous-global"),
    "after an array": (lambda: _NUMBERS + HARMFUL, "hidden-pickle"),
    "objects in npz": (lambda: pt([Record("a.npy", _npy(HARMFUL))]), "dangerous-global"),
    "keras": (lambda: pt([Record("config.json", b'{"class_name": "Lambda"}')]), "keras-lambda"),
    "a zip behind another kind of file": (lambda: b"\x7fELF" + bytes(99) + pt(torch_records(HARMFUL)), "two-formats"),
    "a zip behind HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99) + pt(torch_records(HARMFUL)), "two-formats"),
    "strings of numpy": (lambda: _npy(HARMFUL, b"|S%d" % len(HARMFUL)), "dangerous-global"),
    "a function of keras": (
        lambda: pt([Record("config.json", b'{"class_name": "function", "module": "builtins", "config": "exec"}')]),
        "keras-import",
    ),
    "a schema of skops": (
        lambda: pt(
            [Record("schema.json", b'{"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"}')]
        ),
        "skops-import",
    ),
    "a configuration of hydra": (lambda: _tar({"c.yaml": b"model:\n  _target_: os.system\n"}), "config-call"),
    "broken and deflated": (lambda: pt([Record("a/data.pkl", HARMFUL, DEFLATED, data=b"\xff\xff")]), "not-searched"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_no_container_hides_a_pickle(tmp_path: Path, name: str) -> None:
    make, code = CONTAINERS[name]
    found = scanned(tmp_path / "m.pt", make())
    assert code in codes(found)
    if b"os\nsystem" in make() and name not in ("no end record",):
        assert any("os.system" in finding.message for finding in found.findings)


def test_a_deflated_zip_behind_a_pickle_is_opened(tmp_path: Path) -> None:
    found = scanned(tmp_path / "m.pt", CONTAINERS["a pickle, then a deflated zip"][0]())
    assert any("os.system" in finding.message for finding in found.findings)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _storages(last: bytes = pickled([])) -> bytes:
    entry = pickled(("0", "cpu", named("torch.FloatStorage"))) + struct.pack("<q", 2) + bytes(8)
    return pickled(1) + entry + last


def test_a_tar_of_torch_is_followed_through_its_storages(tmp_path: Path) -> None:
    tensor = pickled(("1", "0", named("torch.FloatTensor"))) + struct.pack("<ii3q", 1, 0, 2, 1, 0)
    members = {"storages": _storages(), "tensors": pickled(1) + tensor, "pickle": HARMLESS}
    found = scanned(tmp_path / "m.pt", _tar(members))
    assert (found.ok, found.pickles) == (True, 6)
    for name in members:
        bad = members | {name: _storages(HARMFUL) if name == "storages" else members[name] + HARMFUL}
        assert "dangerous-global" in codes(scanned(tmp_path / "m.pt", _tar(bad)))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_of_a_tar_has_the_name_that_its_extended_header_says(tmp_path: Path, kind: int) -> None:
    name = f"{'a' * 150}/evil.pkl"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
        for each, content in ((name, HARMFUL), ("b", b"text")):
            info = tarfile.TarInfo(each)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    found = scanned(tmp_path / "m.tar", buffer.getvalue())
    assert codes(found) == {"dangerous-global"}
    assert found.findings[0].where.endswith(name)


def test_a_member_of_a_tar_is_as_long_as_its_extended_header_says_and_hides_nothing(tmp_path: Path) -> None:
    content = HARMFUL.ljust(2048, b"\0")
    info = tarfile.TarInfo("evil.pkl")
    info.pax_headers = {"size": str(len(content))}
    whole = info.tobuf(tarfile.PAX_FORMAT) + content + bytes(1024)  # the header itself says 0 bytes
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        assert [member.size for member in file] == [len(content)]
    found = scanned(tmp_path / "m.tar", whole)
    assert "dangerous-global" in codes(found)
    assert "broken-tar" not in codes(found)


def test_a_legacy_stream_is_followed_beyond_its_storages(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(
        {"w": torch.arange(1000.0), "i": torch.ones(3, dtype=torch.int64)}, path, _use_new_zipfile_serialization=False
    )
    whole = path.read_bytes()
    assert (scan(str(path)).ok, scan(str(path)).pickles) == (True, 5)
    assert "extra-stream" in codes(scanned(path, whole + HARMFUL))
    assert "extra-stream" in codes(scanned(path, whole + whole))
    assert "trailing-data" in codes(scanned(path, whole + b"junk"))
    assert "odd-storages" in codes(scanned(path, whole[:-4]))
    assert "dangerous-global" in codes(scanned(path, whole + b"junk" + HARMFUL))


def test_a_directory_and_an_index_are_scanned_file_by_file(tmp_path: Path, ckpt: Ckpt) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "vocab.txt").write_text("cat\ndog\nmouse\n")
    (folder / "README.md").write_text("N.B. this is no pickle\n")
    write(folder / "a.bin", HARMLESS)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin"}}))
    assert codes(scan(str(index))) == {"missing-shard"}
    assert scan(str(folder)).ok
    write(folder / "b.bin", HARMFUL)
    for path in (index, folder):
        answer = ckpt("scan", "--json", path)
        assert answer.code == 1
        assert json.loads(answer.out)["findings"][0]["where"] == "b.bin/archive/data.pkl"
    index.write_text(json.dumps({"weight_map": {"x": "../b.bin"}}))
    assert codes(scan(str(index))) == {"outside-folder"}


def test_files_within_files_are_opened_to_a_depth(tmp_path: Path) -> None:
    content = HARMFUL
    for _ in range(limits.SCAN_NESTING + 3):
        content = gzip.compress(content)
    assert codes(scanned(tmp_path / "m.gz", content)) == {"not-searched"}


def test_what_is_beyond_the_bytes_to_search_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_BYTES", 1000)
    found = scanned(tmp_path / "m.pkl", pickled({"x": "y" * 100_000}))
    assert found.ok
    assert codes(found, "note") == {"not-searched"}


def test_a_gzip_that_inflates_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SCAN_INFLATED", 10_000)
    assert codes(scanned(tmp_path / "m.gz", gzip.compress(b"\x80\x02" + b"N0" * 10_000 + b"N."))) >= {"not-searched"}


@pytest.mark.parametrize("size", range(1, 30))
def test_a_pickle_too_short_for_a_zip_is_no_zip(tmp_path: Path, size: int) -> None:
    scan_or_refuse(tmp_path / "m.pkl", (b"\x80\x02N." + b"PK\5\6" * 7)[:size])


@pytest.mark.parametrize("command", ["ls", "scan"])
def test_a_zip_too_short_for_its_end_record_is_trouble(tmp_path: Path, ckpt: Ckpt, command: str) -> None:
    (tmp_path / "m.pt").write_bytes(b"PK\5\6" + b"x" * 8)
    answer = ckpt(command, tmp_path / "m.pt")
    assert answer.code == 2
    assert "end record" in answer.err


def test_damage_of_every_byte_is_survived(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.pt", {"a": [call("lab.f", 1), b"x" * 20]}).read_bytes()
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        scan_or_refuse(tmp_path / "d.pt", bytes(damaged))
        scan_or_refuse(tmp_path / "d.pt", whole[:at])
