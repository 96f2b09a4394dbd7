"""Long records of zip files elsewhere: local headers come with their bytes, and are checked before these are read."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from elsewhere import HERE, elsewhere
from test_source import BYTES, SIZE, Counted

from ckpt_cli.errors import MalformedError
from ckpt_cli.formats import open_checkpoint
from ckpt_cli.formats.zip.layout import likely_offset
from ckpt_cli.formats.zip.read import ZipRecords
from ckpt_cli.remote.fetched import PART, Fetched
from ckpt_cli.remote.source import RemoteFile

COMMANDS = ("stats", "hash", "diff", "convert", "cast")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Tensors of a megabyte and less."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{number}": torch.randn(250_000 + number, generator=generator) for number in range(24)}
    return {**state, "short": torch.arange(8)}


def run(ckpt: Ckpt, command: str, path: str | Path, near: Path, out: Path) -> tuple[int, str, str]:
    """Run a command, on a file that is compared with one of the disk or written to `out`."""
    more = {"diff": [near], "convert": [out, "--force"], "cast": ["bfloat16", "-o", out]}.get(command, [])
    answer = ckpt(command, path, *more)
    return answer.code, answer.out, answer.err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_local_header_of_a_long_record_costs_no_request(
    command: str, state: dict[str, torch.Tensor], tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "x.pt"
    torch.save(state, path)
    here = run(ckpt, command, path, path, tmp_path / "here.pt")
    with elsewhere(tmp_path) as ledger:
        there = run(ckpt, command, f"{HERE}x.pt", path, tmp_path / "there.pt")
    assert there[:2] == here[:2]
    assert ledger.count <= path.stat().st_size / PART + 8
    assert ledger.nbytes <= 1.05 * path.stat().st_size
    if command in ("convert", "cast"):
        assert (tmp_path / "here.pt").read_bytes() == (tmp_path / "there.pt").read_bytes()


def test_where_a_record_of_torch_begins_is_known_by_the_directory(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "x.pt")
    with closing(open_checkpoint(str(tmp_path / "x.pt"))) as checkpoint:
        records = ZipRecords(checkpoint.container.files[0])
        found = {record.name: likely_offset(record) for record in records.in_order}
        assert {name for name, at in found.items() if at is not None} == {f"x/data/{n}" for n in range(24)}
        assert all(at in (None, records.data_offset(records.by_name[name])) for name, at in found.items())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("at", "new"), [(0, b"PK\5\6"), (8, b"\x08\x00"), (28, b"\x00\x00"), (30, b"y")])
def test_a_local_header_that_says_other_than_the_directory_ends_in_one_line(
    command: str, at: int, new: bytes, state: dict[str, torch.Tensor], tmp_path: Path, ckpt: Ckpt
) -> None:
    path, near, out = (tmp_path / name for name in ("x.pt", "near.pt", "out.pt"))
    torch.save(state, path)
    torch.save(state, near)
    with closing(open_checkpoint(str(path))) as checkpoint:
        header = ZipRecords(checkpoint.container.files[0]).by_name["x/data/11"].header
    with path.open("r+b") as file:
        file.seek(header + at)
        file.write(new)
    with elsewhere(tmp_path):
        code, said, err = run(ckpt, command, f"{HERE}x.pt", near, out)
    assert (code, said, out.exists(), len(err.splitlines())) == (2, "", False, 1)
    assert err.startswith(f"ckpt: {HERE}x.pt: not a sound zip file: record 'x/data/11' ")


def test_what_stands_before_a_range_is_checked_once_and_before_any_of_it_is_read() -> None:
    file, met = RemoteFile("x", Counted(), Fetched()), []
    file.guard(100_000, 100_050, 1_000_000, met.append)
    file.guard(1_200_000, 1_200_064, 1_000_000, met.append)
    file.read(0, 100_050)
    assert met == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: file.view(at, 20_000), range(100_050, 1_000_000, 30_000)))
    assert met == [BYTES[100_000:100_050]]
    assert file.read(1_150_000, 700_000) == BYTES[1_150_000:1_850_000]
    assert met == [BYTES[100_000:100_050], BYTES[1_200_000:1_200_064]]


def test_no_byte_of_a_range_is_given_out_where_the_check_fails() -> None:
    def refuse(_: bytes) -> None:
        raise MalformedError("no")

    file = RemoteFile("x", Counted(), Fetched())
    file.guard(200_000, 200_050, 1_000_000, refuse)
    file.will_read([(200_050, 1_000_000)])
    file.expect(200_050, 1_000_000)
    for read in (lambda: file.read(300_000, 8), lambda: file.view(200_050, 900_000),
                 lambda: file.read_into(memoryview(bytearray(SIZE - 100)), 100), lambda: file.in_place(300_000, 9),
                 lambda: pickle.dumps(file)):  # fmt: skip
        for _ in range(2):
            with pytest.raises(MalformedError):
                read()
