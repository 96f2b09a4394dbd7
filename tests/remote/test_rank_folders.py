"""Folders of rank files elsewhere: they open as the model, and cost about one request a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Ckpt
from servers import SERVERS, Server

SAMPLES = Path(__file__).parents[1] / "samples"
FOLDERS = ("zero2", "zero3", "universal1", "fsdp2", "hsdp", "verl", "megatron")


@pytest.fixture(scope="module", params=["s3", "hf"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind that has lists."""
    with SERVERS[request.param]() as server:
        yield server


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_listed_by_few_requests_as_it_is_on_the_disk(name: str, server: Server, ckpt: Ckpt) -> None:
    address = server.put(SAMPLES / name, name)
    files = sum(path.is_file() for path in (SAMPLES / name).rglob("*"))
    server.forget()
    answer = ckpt("ls", "-a", address)
    assert (answer.code, answer.out) == (0, ckpt("ls", "-a", str(SAMPLES / name)).out)
    assert server.requests() <= (files + 3 if server.kind == "s3" else 2 * files + 3)


@pytest.mark.parametrize("name", FOLDERS[:-1])
def test_the_model_of_one_elsewhere_is_written_as_that_of_the_disk(
    name: str, server: Server, ckpt: Ckpt, tmp_path: Path
) -> None:
    address = server.put(SAMPLES / name, name)
    for source, place in ((address, "far"), (str(SAMPLES / name), "near")):
        (tmp_path / place).mkdir()
        answer = ckpt("convert", source, str(tmp_path / place / "out.pt"))
        assert answer.code == 0, answer.err
    assert (tmp_path / "far" / "out.pt").read_bytes() == (tmp_path / "near" / "out.pt").read_bytes()
    assert ckpt("hash", address, "model").out == ckpt("hash", str(SAMPLES / name), "model").out


def test_what_cannot_be_joined_says_so_there_too(server: Server, ckpt: Ckpt) -> None:
    answer = ckpt("ls", server.put(SAMPLES / "local", "local"))
    assert answer.code == 2
    assert "LOCAL_STATE_DICT" in answer.err


def test_a_server_without_lists_says_what_it_needs(ckpt: Ckpt) -> None:
    with SERVERS["https"]() as server:
        answer = ckpt("ls", server.put(SAMPLES / "zero3", "zero3"))
        assert answer.code == 2
        assert "has no lists" in answer.err
        assert ckpt("ls", server.put(SAMPLES / "megatron", "megatron")).code == 0
