"""A cut folder of torch.distributed.checkpoint: the entries whose items are all there, and what is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from dcp_files import Writer

STATE = {f"w{number}": torch.full((100,), float(number)) for number in range(6)}
HALVES = [((0,), (50,)), ((50,), (50,))]


@pytest.fixture
def folder(here: Path) -> Path:
    writer = Writer(here / "run")
    for name, value in STATE.items():
        writer.tensor(name, value, HALVES if name == "w2" else [((0,), (100,))])
    return writer.write()


def _ends(folder: Path) -> list[int]:
    """The bytes after each item, in the order of the file."""
    data = (folder / "__0_0.distcp").read_bytes()
    ends = [at for at in range(1, len(data)) if data.startswith(b"PK\3\4", at) and data[at - 22 : at - 18] == b"PK\5\6"]
    return [*ends, len(data)]


def test_a_cut_file_leaves_the_entries_before_the_cut(folder: Path, ckpt: Ckpt) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    owners = ["w0", "w1", "w2", "w2", "w3", "w4", "w5"]
    for number, end in enumerate(_ends(folder)[:-1], 1):
        (folder / "__0_0.distcp").write_bytes(data[: end + 7])
        whole = [name for name in STATE if name not in owners[number:]]
        answer = ckpt("ls", "--salvage", "run")
        assert answer.code == (1 if whole else 2)
        assert [line.split("\t")[0] for line in answer.out.splitlines()] == whole
        written = ckpt("convert", "--salvage", "run", f"out{number}.pt")
        assert written.code == 1
        found = torch.load(f"out{number}.pt", weights_only=True)
        assert {name: value.tolist() for name, value in found.items()} == {name: STATE[name].tolist() for name in whole}
        assert all(f"{name}: an item of it, at bytes" in written.err for name in set(owners[number:]))


@pytest.mark.parametrize("path", ["run", "run/.metadata"])
def test_a_cut_folder_names_what_can_be_had_of_it(folder: Path, ckpt: Ckpt, path: str) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    answer = ckpt("ls", path)
    assert (answer.code, "ckpt ls --salvage run lists" in answer.err) == (2, True)
    assert ckpt("ls", "--salvage", path).out.count("\n") == 5


def test_a_folder_that_is_whole_is_salvaged_as_it_is(folder: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ls", "--salvage", "run")
    assert (answer.code, answer.out.count("\n")) == (0, 6)


def test_a_folder_without_a_whole_metadata_is_refused(folder: Path, ckpt: Ckpt) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
    answer = ckpt("ls", "--salvage", "run")
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
