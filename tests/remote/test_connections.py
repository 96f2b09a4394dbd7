"""Connections: proxies, time-outs, netrc, and what is sent to whom."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from web_server import Handler, WebServer, serving

from ckpt_cli.remote import client, connections


@pytest.fixture
def web(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A server of one file; nothing of this machine's environment matters."""
    torch.save({"w": torch.arange(200_000.0)}, here / "x.pt")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setattr(client, "sleep", lambda _: None)
    with serving(here) as found:
        yield found


def as_proxy(web: WebServer, user: str | None = None) -> None:
    """Let the server answer what a proxy is asked."""

    def gate(handler: Handler) -> bool:
        if user is not None:
            sent = handler.headers.get("Proxy-Authorization", "").removeprefix("Basic ")
            if base64.b64decode(sent).decode() != user:
                handler.empty(407)
                return True
        handler.path = handler.path.removeprefix("http://example.invalid")
        return False

    web.gate = gate


def test_a_proxy_of_the_environment_is_asked(web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    as_proxy(web)
    monkeypatch.setenv("http_proxy", web.base.removeprefix("http://"))
    assert ckpt("ls", "http://example.invalid/x.pt").lines == ["w\tfloat32\t[200000]\t800000"]
    assert {each.target for each in web.seen} == {"http://example.invalid/x.pt"}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    web.clear()
    assert ckpt("ls", web.url("x.pt")).code == 0
    assert {each.target for each in web.seen} == {"/x.pt"}


def test_a_proxy_that_wants_a_password_gets_it_and_nobody_else(
    web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_proxy(web, "me:hunter2")
    monkeypatch.setenv("ALL_PROXY", web.base.replace("//", "//me:hunter2@"))
    answer = ckpt("stats", "http://example.invalid/x.pt")
    assert (answer.code, "hunter2" in answer.out + answer.err) == (0, False)
    assert all("Authorization" not in each.headers for each in web.seen)
    monkeypatch.setenv("ALL_PROXY", web.base.replace("//", "//me:wrong@"))
    refused = ckpt("ls", "http://example.invalid/x.pt")
    assert (refused.code, "access is denied (407)" in refused.err) == (2, True)


@pytest.mark.parametrize("proxy", ["http://me:hunter2@127.0.0.1:1", "socks5://me:hunter2@127.0.0.1:1"])
def test_a_proxy_that_is_not_there_is_one_line(
    web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    answer = ckpt("ls", "http://example.invalid/x.pt")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("ckpt: http://example.invalid/x.pt: ")
    assert "proxy" in answer.err
    assert "hunter2" not in answer.err


def test_a_server_that_does_not_answer_is_asked_twice(
    web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "READ_SECONDS", 0.2)

    def silent(handler: Handler) -> bool:
        time.sleep(1)
        return True

    web.gate = silent
    answer = ckpt("ls", web.url("x.pt"))
    assert answer.err == f"ckpt: {web.url('x.pt')}: cannot be reached: no answer in 20 s, 2 times\n"


def test_a_body_that_never_ends_coming_is_given_up(web: WebServer, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_PATIENCE", 0.3)

    def dripping(handler: Handler) -> bool:
        handler.head(206, Content_Range=f"bytes 0-{(1 << 18) - 1}/1000000", Content_Length=1 << 18)
        while True:
            handler.body(b"x")
            time.sleep(0.05)

    web.gate = dripping
    answer = ckpt("ls", web.url("x.pt"))
    assert answer.err == f"ckpt: {web.url('x.pt')}: its server sends less than 8 KiB a second\n"


def test_netrc_is_for_its_host_only_and_a_broken_one_is_none(
    web: WebServer, ckpt: Ckpt, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = here / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    for text, sent in (
        ("machine 127.0.0.1 login me password pw", True),
        ("machine other login me password pw", False),
        ("machine 127.0.0.1 nonsense", False),
    ):
        netrc.write_text(f"{text}\n")
        netrc.chmod(0o600)
        web.clear()
        assert ckpt("ls", web.url("x.pt")).code == 0
        assert {"Authorization" in each.headers for each in web.seen} == {sent}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_signed_address_that_has_expired_is_asked_for_again(
    web: WebServer, ckpt: Ckpt, here: Path, status: int
) -> None:
    signed = {"now": 0, "used": 0}

    def gate(handler: Handler) -> bool:
        path, _, number = handler.path.partition("?n=")
        if path == "/signed/x.pt":
            signed["now"] += 1
            signed["used"] = 0
            handler.empty(302, Location=f"/x.pt?n={signed['now']}")
            return True
        signed["used"] += 1
        if number != str(signed["now"]) or signed["used"] > 2:
            handler.empty(status)
            return True
        return False

    web.gate = gate
    answer = ckpt("show", web.url("signed/x.pt"), "w[100000:100010]")
    assert (answer.code, answer.out) == (0, ckpt("show", here / "x.pt", "w[100000:100010]").out)
    assert (signed["now"], len(web.seen)) == (2, 6)  # of three ranges two by one address, and one refused in between


def test_connections_are_used_again(web: WebServer, ckpt: Ckpt) -> None:
    ports: set[int] = set()

    def note(handler: Handler) -> bool:
        ports.add(handler.client_address[1])
        return False

    web.gate = note
    assert ckpt("ls", web.url("x.pt")).code == 0
    assert (len(web.seen), len(ports)) == (2, 1)
    assert all(each.headers["Accept-Encoding"] == "identity" for each in web.seen)
    assert all(each.headers["User-Agent"].startswith("ckpt/") for each in web.seen)
