"""The requests and bytes that commands take on checkpoints elsewhere, counted at the servers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from fake_hub import serving
from remote_costs import COSTS, SHARDS, Cost, build
from servers import SERVERS, Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that the costs are of."""
    folder = tmp_path_factory.mktemp("costs")
    build(folder)
    return folder


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind."""
    with SERVERS[request.param]() as server:
        yield server


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: f"{cost.commands[0].split()[0]}-{cost.name}")
def test_a_command_takes_no_more_requests_and_bytes_than_the_documentation_says(
    cost: Cost, server: Server, folder: Path, ckpt: Ckpt
) -> None:
    name, _, rest = cost.name.partition("/")
    address = server.put(folder / name, name) + rest
    for command in cost.commands:
        server.forget()
        args = shlex.split(command.replace("FILE", address.rstrip("/") if not rest and "FILE/" in command else address))
        answer = ckpt(*args)
        assert (answer.code, "Traceback" in answer.err) == (0, False), answer.err
        assert (command, server.requests()) == (command, cost.requests(server.kind))
        assert server.nbytes() <= cost.most_bytes


@pytest.mark.parametrize("command", ["stats", "hash", "check --deep"])
def test_a_command_that_reads_all_fetches_each_byte_once(
    command: str, server: Server, tmp_path: Path, ckpt: Ckpt
) -> None:
    path = tmp_path / "model.pt"
    torch.save({f"w{number}": torch.full((1_500_000,), float(number)) for number in range(6)}, path)
    address = server.put(tmp_path, "heavy")
    server.forget()
    assert ckpt(*command.split(), f"{address}model.pt").code == 0
    size = path.stat().st_size
    assert 0.95 * size <= server.nbytes() <= 1.05 * size + 600_000


def test_the_heads_of_shards_are_fetched_side_by_side(
    folder: Path, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.commit("lab/set", folder / "set")
        hub.latency = 0.25
        assert ckpt("ls", "hf://lab/set").code == 0
        assert hub.most_in_flight >= SHARDS - 2
