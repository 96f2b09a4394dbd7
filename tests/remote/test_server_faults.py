"""Faults of servers, each at each of the first requests: the right answer or one line, and never a mix of two files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Answer, Ckpt
from examples import most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web_server import FAULTS, WebServer, serving

import ckpt_cli
from ckpt_cli.cli.main import run
from ckpt_cli.errors import CkptError
from ckpt_cli.remote import client

TRIES = 6

GIVEN_UP = {
    "429": "its server answers 429, 6 times",
    "500": "its server answers 500, 6 times",
    "503": "its server answers 503, 6 times",
    "reset": "cannot be reached: Connection reset by peer, 6 times",
    "reset within": "cannot be reached: Connection reset by peer, 6 times",
    "short": "its server sends less than it promises, 6 times",
    "no reply": "cannot be reached: the connection was closed, 6 times",
    "garbage": "cannot be reached: the connection was closed, 6 times",
    "to nowhere": "cannot be reached: Connection refused, 6 times",
}
"""Faults that may pass, and the line that is printed of each that does not."""

REFUSED = {
    "401": "access is denied (401)",
    "403": "access is denied (403)",
    "404": "No such file or directory",
    "other range": "its server gives another part of the file than it is asked for",
    "no size": "its server does not say how long it is",
    "no range": "its server does not give parts of a file, only all of it",
    "range of 2⁶³": "its server says that it has 9,223,372,036,854,775,808 bytes, which cannot be",
    "range of 10²⁴": "its server says that it has 1,000,000,000,000,000,000,000,000 bytes, which cannot be",
    "whole": "its server does not give parts of a file, only all of it",
    "endless": "its server does not give parts of a file, only all of it",
    "endless 100": "its server sends more than 256 KiB before its answer",
    "endless headers": "its server sends more than 256 KiB before its answer",
    "endless part": "its server sends another number of bytes than it promises",
    "gzip": "its server sends it compressed (gzip), so it has no parts",
    "html": "this looks like a web page: the download got an error page",
    "redirect loop": "its server redirects more than 5 times",
    "to file": "its server redirects to file:, which is not followed",
    "to nonsense": "its server redirects to what is not a URL",
}
"""Faults that are not waited for, and the line of each where it is met by the first request."""

HARMLESS = ("slow", "no tag", "empty tag", "weak tag", "other time")
"""Faults that, where every reply has them, are none."""

CHANGED = "became another file while it was read; run it again"

LATER = {
    **dict.fromkeys(("404", "other tag", "other size", "range of 2⁶³", "range of 10²⁴"), CHANGED),
    **dict.fromkeys(("html",), CHANGED),
    **dict.fromkeys(("endless part", "redirect loop")),
    "no size": REFUSED["other range"],
}
"""The lines of faults that are met once the file is open, where they are others; None where nothing is wrong."""


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would be waited."""
    waited: list[float] = []
    monkeypatch.setattr(client, "sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of more than its beginning and its end."""
    folder = tmp_path_factory.mktemp("served")
    torch.save({"big": torch.arange(200_000.0), "small": torch.arange(8), "last": torch.ones(5)}, folder / "x.pt")
    return folder


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[WebServer]:
    """The server of the folder."""
    with serving(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def _sound(web: WebServer) -> None:
    web.clear()


def stats(ckpt: Ckpt, web: WebServer) -> Answer:
    """A command that reads all of the file."""
    return ckpt("stats", web.url("x.pt"))


@pytest.mark.parametrize("fault", GIVEN_UP)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_fault_that_passes_is_waited_for(
    ckpt: Ckpt, web: WebServer, folder: Path, pauses: list[float], fault: str, after: int
) -> None:
    right = ckpt("stats", folder / "x.pt").out
    web.fault(fault, after=after, times=TRIES - 1)
    answer = stats(ckpt, web)
    assert (answer.code, answer.out, answer.err) == (0, right, "")
    assert pauses


@pytest.mark.parametrize("fault", GIVEN_UP)
@pytest.mark.parametrize("after", [0, 1])
def test_a_fault_that_does_not_pass_is_one_line(ckpt: Ckpt, web: WebServer, fault: str, after: int) -> None:
    web.fault(fault, after=after)
    answer = ckpt("ls", web.url("x.pt"))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"ckpt: {web.url('x.pt')}: {GIVEN_UP[fault]}\n"


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_pass_is_refused_at_once(ckpt: Ckpt, web: WebServer, pauses: list[float], fault: str) -> None:
    web.fault(fault)
    answer = ckpt("ls", web.url("x.pt"))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.splitlines()[0] == f"ckpt: {web.url('x.pt')}: {REFUSED[fault]}"
    assert not pauses
    assert len(web.seen) <= 6  # the file and five names in a folder, or five redirects
    assert web.bytes_sent < 8 << 20


@pytest.mark.parametrize("fault", [*REFUSED, "other tag", "other size"])
def test_what_is_met_once_the_file_is_open_ends_in_one_line(ckpt: Ckpt, web: WebServer, fault: str) -> None:
    web.fault(fault, after=1, times=1)
    line = LATER.get(fault, REFUSED.get(fault))
    if line is None:
        assert ckpt("ls", web.url("x.pt")).code == 0
        return
    with pytest.raises(CkptError) as error:
        ckpt_cli.open(web.url("x.pt"))
    assert str(error.value) == f"{web.url('x.pt')}: {line}"
    web.fault(fault, after=1, times=1)
    answer = ckpt("ls", web.url("x.pt"))  # a command that has printed nothing looks again at what became another file
    assert answer.code == (0 if line == CHANGED else 2)


@pytest.mark.parametrize("fault", HARMLESS)
def test_servers_without_tags_are_read_all_the_same(ckpt: Ckpt, web: WebServer, folder: Path, fault: str) -> None:
    web.fault(fault)
    assert stats(ckpt, web).out == ckpt("stats", folder / "x.pt").out


def test_the_pause_that_a_server_asks_for_is_kept_and_not_without_end(
    ckpt: Ckpt, web: WebServer, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    past = "Thu, 01 Jan 1970 00:00:00 GMT"
    for asked, waited in (("2", 2.0), ("86400", 30.0), ("soon", 0.2), ("-1", 0.2), (past, 0)):
        monkeypatch.setitem(FAULTS, "busy", lambda handler, asked=asked: handler.empty(429, Retry_After=asked))
        pauses.clear()
        web.fault("busy", times=1)
        assert ckpt("ls", web.url("x.pt")).code == 0
        assert pauses == [waited]


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"RateLimit": '"api";r=0;t=7'}, 7.0),
        ({"RateLimit": '"api";r=0;t=86400'}, 30.0),
        ({"RateLimit": "limit=10, remaining=0, t=3"}, 3.0),
        ({"RateLimit_Reset": "5"}, 5.0),
        ({"RateLimit": '"api";r=0;t=7', "Retry_After": "2"}, 2.0),
        ({"RateLimit": '"api";r=0;t=soon'}, 0.2),
    ],
)
def test_a_limit_that_says_when_it_ends_is_waited_for_and_not_without_end(
    headers: dict[str, str], waited: float, ckpt: Ckpt, web: WebServer, pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(FAULTS, "busy", lambda handler: handler.empty(429, **headers))
    web.fault("busy", times=1)
    assert ckpt("ls", web.url("x.pt")).code == 0
    assert pauses == [waited]


def test_headers_that_come_too_slowly_are_given_up(ckpt: Ckpt, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_cli.remote.connections._HEAD_SECONDS", 0.0)
    answer = ckpt("ls", web.url("x.pt"))
    assert (answer.code, answer.err.partition("x.pt: ")[2]) == (2, "its server sends no answer in 0 s, only headers\n")


def test_a_file_that_is_replaced_while_it_is_read_is_never_mixed_with_the_new_one(
    ckpt: Ckpt, web: WebServer, folder: Path
) -> None:
    old, new = folder / "y.pt", folder / "z.pt"
    for fault in ("slow", "no tag"):  # with tags by the condition of a request, without by the time of the change
        torch.save({"a": torch.zeros(200_000)}, old)
        torch.save({"a": torch.ones(200_000)}, new)

        def replace(handler: object, fault: str = fault, done: list[int] = []) -> bool:  # noqa: B006
            done.append(1)
            if len(done) == 2:
                new.replace(old)
                os.utime(old, (1, 1))
            FAULTS[fault](handler)  # type: ignore[arg-type]
            return True

        web.clear()
        web.gate = replace
        answer = ckpt("stats", web.url("y.pt"))
        # the command is run again where nothing was printed, and then sees the new file only
        assert (answer.code, answer.out.split("\t")[4:6]) == (0, ["1.0", "1.0"])


ANSWERS: dict[str, tuple[int, str]] = {}


@settings(max_examples=most(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fault=st.sampled_from(sorted(FAULTS)),
    after=st.integers(0, 6),
    times=st.integers(1, 8),
    command=st.sampled_from(["ls", "ties", "stats", "hash", "show", "check"]),
)
def test_any_fault_at_any_request_gives_the_right_answer_or_one_line(
    capsys_each: pytest.CaptureFixture[str],
    web: WebServer, folder: Path, fault: str, after: int, times: int, command: str,
) -> None:  # fmt: skip
    def said(path: str) -> tuple[int, str, str]:
        code = run([command, path])
        out, err = capsys_each.readouterr()
        return code, out, err

    if command not in ANSWERS:
        code, out, _ = said(str(folder / "x.pt"))
        ANSWERS[command] = code, out
    web.clear()
    web.fault(fault, after=after, times=times)
    code, out, err = said(web.url("x.pt"))
    if code == 2 and ANSWERS[command][0] != 2:
        lines = err.splitlines()
        assert lines[0].startswith(f"ckpt: {web.url('x.pt')}: ")
        assert all(line.startswith("hint: ") for line in lines[1:])
        assert len(lines) <= 2
        assert "bug" not in err
        assert out == ""
    else:
        assert (code, out) == ANSWERS[command]


@pytest.fixture
def capsys_each(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What is printed, read after each example."""
    return capsys
