"""What `ckpt check` says of damaged files, with torch and zipfile as witnesses, and of files it cannot read."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from check_cases.case import codes, deep_check, faulty, hub, saved, two
from check_cases.sets import SECOND
from conftest import Ckpt

from ckpt_cli.errors import FormatError
from ckpt_cli.ops.check.run import check


@pytest.mark.parametrize("code", ["truncated", "leading-bytes", "no-version", "outside-prefix", "short-storage"])
def test_torch_refuses_what_is_said_to_be_refused(code: str, tmp_path: Path) -> None:
    path = faulty(code, tmp_path)
    with pytest.raises((RuntimeError, OSError, EOFError, ValueError, UnpicklingError)):
        torch.load(path)


def test_torch_misreads_a_compressed_storage_when_mapped(tmp_path: Path) -> None:
    path = faulty("compressed", tmp_path)
    assert torch.equal(torch.load(path)["b"], two()["b"])
    assert not torch.equal(torch.load(path, mmap=True)["b"], two()["b"])


def test_torch_computes_wrong_offsets_for_another_layout(tmp_path: Path) -> None:
    path = faulty("layout", tmp_path)
    where = torch.load(path, map_location="meta")["b"].untyped_storage()._checkpoint_offset
    wanted = struct.pack("<40f", *range(40))
    assert path.read_bytes()[where : where + len(wanted)] != wanted


def test_zipfile_finds_the_same_record_damaged(tmp_path: Path) -> None:
    path = faulty("crc", tmp_path)
    with zipfile.ZipFile(path) as archive_:
        bad = archive_.testzip()
    (finding,) = deep_check(path).findings
    assert finding.where == f"m.pt/{bad}"
    assert check(str(path)).findings == []


def test_a_damaged_byte_anywhere_in_a_record_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.arange(500_000), "y": torch.arange(3)})
    data = path.read_bytes()
    begin = data.index(struct.pack("<3q", 1, 2, 3))
    for at in (0, 1 << 19, (1 << 19) - 1, 3_999_000):
        damaged = bytearray(data)
        damaged[begin + at] ^= 1
        path.write_bytes(damaged)
        assert codes(deep_check(path)) == {"crc"}


@pytest.mark.parametrize("content", [b"", b"remember the milk\n", bytes(1000), b"<!DOCTYPE html><html>"])
def test_what_is_no_checkpoint_is_trouble(content: bytes, ckpt: Ckpt, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    answer = ckpt("check", "--deep", tmp_path / "m.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"ckpt: {tmp_path}/m.pt: ")


def test_what_is_not_there_and_folders_of_several_are_trouble(ckpt: Ckpt, tmp_path: Path) -> None:
    assert ckpt("check", tmp_path / "none.pt").code == 2
    assert ckpt("check", tmp_path).code == 2
    saved(tmp_path, name="a.pt")
    saved(tmp_path, name="b.pt")
    assert "name one of them" in ckpt("check", tmp_path).err


def test_a_cut_file_is_told_how_much_is_missing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.randn(10_000)})
    whole = path.stat().st_size
    os.truncate(path, 20_000)
    (finding,) = check(str(path)).findings
    missing = int(finding.message.split("; ")[1].split()[0])
    assert whole - 20_000 - 2000 < missing <= whole - 20_000


def test_the_rest_of_a_broken_set_is_checked(tmp_path: Path) -> None:
    hub(tmp_path, {f"l{n}.weight": torch.full((8, 8), float("nan")) for n in range(4)})
    (tmp_path / SECOND).unlink()
    assert codes(deep_check(tmp_path)) == {"missing-shard", "nan"}


def _crashes() -> Iterator[Path]:
    yield from sorted((Path(__file__).parents[2] / "crashes").iterdir())[::7]


def test_what_once_broke_a_reader_breaks_no_check(tmp_path: Path) -> None:
    for path in _crashes():
        with suppress(FormatError, OSError):
            deep_check(path)


def test_mutations_of_a_file_break_no_check(tmp_path: Path) -> None:
    import random

    chance = random.Random(5)
    whole = saved(tmp_path, {"x": torch.randn(30), "y": torch.randn(2, 3)}).read_bytes()
    path = tmp_path / "mutant.pt"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: len(data) - chance.randrange(100) * chance.randrange(2)])
        with suppress(FormatError):
            deep_check(path)
