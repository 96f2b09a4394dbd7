"""Zip files as torch writes them, held to files that torch wrote."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_cli.errors import TruncatedError, UnsupportedError
from ckpt_cli.files.source import LocalFile
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.formats.zip.write import ZipWriter


def rewritten(source: Path, target: Path) -> Path:
    """Every record of a file, written anew in its order."""
    target.touch()
    with LocalFile(str(source)) as file, LocalFile(str(target), write=True) as out:
        records, writer = ZipRecords(file), ZipWriter(out)
        for record in records.by_name.values():
            if record.nbytes < 100:
                writer.add(record.name, bytes(records.read(record.name, 100)))
            else:
                writer.copy(record.name, file, records.data_offset(record), record.nbytes, record.crc)
        writer.close()
        assert out.size == os.path.getsize(target)
    return target


STATES: dict[str, Any] = {
    "a net": torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.ReLU(), torch.nn.Linear(9, 100)).state_dict(),
    "nothing": {},
    "empty tensors": {"a": torch.empty(0), "b": torch.empty(3, 0)},
    "many": {str(number): torch.full((number % 70,), float(number)) for number in range(300)},
    "bytes": {"a": torch.arange(251, dtype=torch.uint8), "é": torch.ones(1)},
}


@pytest.mark.parametrize("name", STATES)
def test_records_written_again_are_torchs_file_byte_for_byte(tmp_path: Path, name: str) -> None:
    torch.save(STATES[name], tmp_path / "a.pt")
    assert rewritten(tmp_path / "a.pt", tmp_path / "b.pt").read_bytes() == (tmp_path / "a.pt").read_bytes()


def test_records_and_offsets_beyond_4_gib_are_written_as_torch_does(tmp_path: Path) -> None:
    """A sparse file: its storages are holes, whose CRC torch leaves 0."""
    big = {
        "a": torch.empty(2**32 + 8, dtype=torch.uint8),
        "b": torch.ones(300),
        "c": torch.empty(0),
        "d": torch.ones(2),
    }
    with torch.serialization.skip_data():
        torch.save(big, tmp_path / "a.pt")
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    with LocalFile(str(source)) as file:
        holes = [record.crc == 0 for record in ZipRecords(file).by_name.values() if "/data/" in record.name]
    assert all(holes)
    target.touch()
    with LocalFile(str(source)) as file, LocalFile(str(target), write=True) as out:
        records, writer = ZipRecords(file), ZipWriter(out)
        for record in records.by_name.values():
            writer.copy(record.name, file, records.data_offset(record), record.nbytes, record.crc)
        writer.close()
        assert out.size == file.size
        for begin in (0, 2**32 - 5000):
            size = min(10_000, file.size - begin)
            assert out.read(begin, size) == file.read(begin, size)
    assert os.stat(target).st_blocks * 512 < 1 << 20


def test_what_is_written_is_a_sound_zip_with_sound_checksums(tmp_path: Path) -> None:
    target = tmp_path / "a.zip"
    target.touch()
    with LocalFile(str(target), write=True) as out:
        writer = ZipWriter(out)
        writer.add("p/empty", b"")
        writer.stream("p/streamed", 6, lambda write: (write(b"abc"), write(memoryview(b"def"))))
        writer.close()
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert archive.read("p/streamed") == b"abcdef"
        assert archive.namelist() == ["p/empty", "p/streamed"]


def test_a_range_that_is_not_there_and_a_record_that_outgrows_its_kind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"abc")
    with LocalFile(str(tmp_path / "a")) as file, LocalFile(str(tmp_path / "b"), write=True) as out:
        with pytest.raises(TruncatedError):
            ZipWriter(out).copy("p/a", file, 1, 3, 0)
        monkeypatch.setattr("ckpt_cli.formats.zip.write.FULL", 10)
        with pytest.raises(UnsupportedError, match="grew beyond"):
            ZipWriter(out).stream("p/a", 5, lambda write: write(b"x" * 11))


def test_checksums_that_are_computed_beside_the_copy_are_those_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_cli.formats.zip.write._BESIDE", 5000)
    monkeypatch.setattr("ckpt_cli.formats.zip.write._PIECE", 7000)
    content = bytes(range(251)) * 100
    (tmp_path / "a").write_bytes(content)
    target = tmp_path / "a.zip"
    target.touch()
    with LocalFile(str(tmp_path / "a")) as file, LocalFile(str(target), write=True) as out:
        writer = ZipWriter(out)
        for begin, end in ((0, 25_000), (3, 7_003), (3, 7_004), (9, 4_000)):
            with writer.record(f"p/{begin}-{end}", end - begin + 2):
                writer.append(b"<")
                writer.append_range(file, begin, end - begin)
                writer.append(b">")
        writer.close()
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        assert archive.read("p/3-7004") == b"<" + content[3:7004] + b">"


def test_a_file_that_cannot_be_read_for_its_checksum_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(5, "it cannot be read")

    monkeypatch.setattr("ckpt_cli.formats.zip.write._BESIDE", 5000)
    monkeypatch.setattr("ckpt_cli.formats.zip.write.crc_of_range", fails)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"abc" * 3000)
    with LocalFile(str(tmp_path / "a")) as file, LocalFile(str(tmp_path / "b"), write=True) as out:
        writer = ZipWriter(out)
        with pytest.raises(OSError, match="it cannot be read"), writer.record("p/a", 9000):
            writer.append_range(file, 0, 9000)
