"""Faults of servers while `scan` and `check` read: the answer about the sound file, or one line and exit 2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import Ckpt
from web_server import FAULTS, WebServer, serving

from ckpt_cli.remote import client


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "sleep", lambda _: None)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """A server of one file."""
    folder = tmp_path_factory.mktemp("served")
    torch.save({"big": torch.arange(200_000.0), "small": torch.arange(8)}, folder / "x.pt")
    with serving(folder) as found:
        yield found


@pytest.mark.parametrize("command", ["scan", "check", "check --deep"])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_is_one_line_or_does_not_matter(
    ckpt: Ckpt, web: WebServer, fault: str, after: int, command: str
) -> None:
    web.clear()
    words = (*command.split(), web.url("x.pt"))
    right = ckpt(*words)
    assert right.code == 0
    web.fault(fault, after=after)
    answer = ckpt(*words)
    if answer.code == 2:
        first, *hint = answer.err.splitlines()
        assert first.startswith(f"ckpt: {web.url('x.pt')}: "), answer.err
        assert all(line.startswith("hint: ") for line in hint), answer.err
        assert answer.out == ""
    else:
        assert (answer.code, answer.out, answer.err) == (0, right.out, right.err)
    assert web.bytes_sent < 16 << 20
