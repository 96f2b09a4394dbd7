"""Addresses and their paths: what is secret in a URL is sent to its server, and stands nowhere else."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from safetensors.torch import save_file
from web_server import FAULTS, Handler, WebServer, serving

import ckpt_cli
from ckpt_cli.errors import CkptError
from ckpt_cli.files import places
from ckpt_cli.remote import client, url

SECRETS = ("hunter2", "s3cr3t", "sig-abc")


@pytest.fixture
def web(here: Path) -> Iterator[WebServer]:
    """A server that lets in only who has the password and the signature."""
    torch.save({"w": torch.arange(70_000.0), "b": torch.ones(2)}, here / "x.pt")
    with serving(here) as found:

        def gate(handler: Handler) -> bool:
            user = base64.b64decode(handler.headers.get("Authorization", "").removeprefix("Basic ")).decode()
            if user == "me:hunter2 s3cr3t" and handler.path.partition("?")[2] == "token=sig-abc&x=1":
                return False
            handler.empty(403)
            return True

        found.gate = gate
        yield found


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "sleep", lambda _: None)


def secret(web: WebServer, name: str = "x.pt") -> str:
    """The address of a file with all that lets one in."""
    return web.url(name).replace("//", "//me:hunter2%20s3cr3t@") + "?token=sig-abc&x=1"


@pytest.mark.parametrize("command", ["ls", "info", "check", "scan", "hash", "stats", "ties", "show", "tree"])
@pytest.mark.parametrize("style", [(), ("--json",)])
def test_what_is_secret_in_a_url_lets_one_in_and_is_not_printed(
    web: WebServer, ckpt: Ckpt, command: str, style: tuple[str, ...]
) -> None:
    answer = ckpt(command, *style, secret(web))
    assert answer.code in (0, 1), answer.err
    assert not any(word in answer.out + answer.err for word in SECRETS)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_error_prints_a_secret(web: WebServer, ckpt: Ckpt, fault: str) -> None:
    for after in (0, 1):
        web.fault(fault, after=after)
        answer = ckpt("stats", secret(web))
        assert not any(word in answer.out + answer.err for word in SECRETS)
        with pytest.raises((CkptError, OSError)) if answer.code == 2 and not after else _nothing() as error:
            ckpt_cli.open(secret(web)).close()
        assert not any(word in str(error) for word in SECRETS)


class _nothing:  # noqa: N801
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> bool:
        return isinstance(error[1], (CkptError, OSError))


def test_edits_and_conversions_print_no_secret(web: WebServer, ckpt: Ckpt) -> None:
    for args in (
        ("convert", secret(web), "out.safetensors"),
        ("convert", secret(web), "out2.safetensors", "--json"),
        ("set", secret(web), "w[0]=5", "-o", "set.pt", "--json"),
        ("rename", secret(web), "w", "v", "-o", "renamed.pt"),
        ("diff", secret(web), "set.pt"),
        ("diff", "--json", secret(web), "set.pt"),
        ("ls", secret(web), "set.pt"),
    ):
        answer = ckpt(*args)
        assert answer.code in (0, 1), answer.err
        assert "x.pt?…" in answer.out + answer.err or "--json" in args or args[0] == "diff"
        assert not any(word in answer.out + answer.err for word in SECRETS)
    assert json.loads(ckpt("ls", "--json", "out.safetensors").out)
    assert not any(word.encode() in Path("out.safetensors").read_bytes() for word in SECRETS)


def test_python_shows_the_path_and_no_secret(web: WebServer) -> None:
    with ckpt_cli.open(secret(web)) as checkpoint:
        assert checkpoint.path == web.url("x.pt?…")
        assert checkpoint["b"].numpy().tolist() == [1, 1]
        assert not any(word in repr(checkpoint) for word in SECRETS)
        assert ckpt_cli.check(checkpoint).path == web.url("x.pt?…")  # asks again, and is let in
        assert ckpt_cli.scan(checkpoint).findings == []
        assert not ckpt_cli.diff(checkpoint, secret(web)).changed


def test_two_addresses_that_differ_in_their_queries_are_two_files(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.zeros(2)}, here / "a.pt")
    torch.save({"w": torch.ones(2)}, here / "b.pt")
    with serving(here) as web:

        def by_query(handler: Handler) -> bool:
            handler.path = f"/{handler.path.rpartition('=')[2]}"
            return False

        web.gate = by_query
        one, other = web.url("get?name=a.pt"), web.url("get?name=b.pt")
        assert ckpt("diff", one, other).code == 1
        assert ckpt("diff", one, one).code == 0
        paths = [each["path"] for each in json.loads(ckpt("ls", "--json", one, other).out)]
        assert paths == [web.url("get?…"), web.url("get?…2")]


def test_files_beside_one_with_a_query_are_asked_for_with_it(here: Path, ckpt: Ckpt) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in names.items():
        save_file({name: torch.ones(2)}, here / file)
    (here / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with serving(here) as web:
        assert ckpt("ls", f"{web.url('model.safetensors.index.json')}?sas=1").code == 0
        assert {each.target.partition("?")[2] for each in web.seen} == {"sas=1"}


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("https://host/a/x.pt", "https://host/a/x.pt"),
        ("HTTPS://user:pass@host:8443/a/x.pt?sig=1#part", "https://host:8443/a/x.pt?…"),
        ("https://user@host/x.pt", "https://host/x.pt"),
        ("https://user:p@ss@host/x.pt?", "https://host/x.pt"),
        ("http://host?q", "http://host?…"),
        ("hf://lab/model@v1/x.pt", "hf://lab/model@v1/x.pt"),
        ("s3://bucket/what?.pt", "s3://bucket/what?.pt"),
    ],
)
def test_the_path_of_an_address_shows_nothing_secret(address: str, path: str) -> None:
    assert url.shown(address) == path
    addresses = url.Addresses()
    assert addresses.admitted(address) == path
    assert addresses.admitted(path) == path


def test_a_path_leads_back_to_its_address() -> None:
    addresses = url.Addresses()
    path = addresses.admitted("https://me:pw@host/a/x.pt?sig=1")
    assert addresses.address(path) == "https://me:pw@host/a/x.pt?sig=1"
    assert addresses.address("https://host/a/y.pt") == "https://me:pw@host/a/y.pt?sig=1"
    assert addresses.address("https://host/b/y.pt") == "https://me:pw@host/b/y.pt"
    assert addresses.address("https://other/a/y.pt") == "https://other/a/y.pt"
    assert addresses.address("http://host/a/y.pt") == "http://host/a/y.pt"


def test_names_in_a_url_are_quoted_and_names_of_files_are_not() -> None:
    assert places.join("https://host/a?…", "x #1?.pt") == "https://host/a/x %231%3F.pt"
    assert places.name_of("https://host/a/x%20%231.pt?…") == "x #1.pt"
    assert places.folder_of("https://host/a/x.pt?…") == "https://host/a"
    assert places.folder_of(places.join("https://host/a/", "x.pt")) == "https://host/a"


def test_a_name_with_special_characters_is_read(here: Path, ckpt: Ckpt) -> None:
    torch.save({"w": torch.zeros(2)}, here / "a b#1é.pt")
    with serving(here) as web:
        assert ckpt("ls", web.url("a%20b%231%C3%A9.pt")).code == 0
        assert ckpt("ls", web.url("a b%231é.pt")).code == 0


@pytest.mark.parametrize(
    "address",
    ["http://", "https:///x.pt", "http://[::1/x", "http://a b/x", "http://host:99999/x", "http://host:port/x"],
)
def test_what_is_not_a_url_is_one_line(ckpt: Ckpt, address: str) -> None:
    answer = ckpt("ls", address)
    assert (answer.code, answer.err) == (2, f"ckpt: {address}: this is not a URL that can be asked for\n")


def test_an_unknown_scheme_is_one_line_and_dot_slash_makes_a_path_of_it(here: Path, ckpt: Ckpt) -> None:
    answer = ckpt("ls", "foo://a/b.pt")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith("ckpt: foo://…: nothing is read from such a URL, only from http, https, hf, s3")
    (here / "foo:").mkdir()
    torch.save({"w": torch.zeros(2)}, here / "foo:" / "b.pt")
    assert ckpt("ls", "./foo://b.pt").code == 0


def test_a_name_that_is_not_known_is_not_asked_for_again(ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("no_proxy", "*")
    answer = ckpt("ls", "https://no-such-host.invalid/x.pt")
    assert answer.err == (
        "ckpt: https://no-such-host.invalid/x.pt: cannot be reached: the name of its server is not known\n"
    )


def test_a_server_that_refuses_what_is_not_there_gives_the_file_all_the_same(here: Path, ckpt: Ckpt) -> None:
    name = "model-00001-of-00002.safetensors"  # its index is looked for
    save_file({"w": torch.ones(2)}, here / name)
    with serving(here) as web:
        web.fault("403", match=".json")
        assert ckpt("ls", web.url(name)).lines == ["w\tfloat32\t[2]\t8"]
        assert any(".json" in each.target for each in web.seen)
        refused = ckpt("ls", web.url("model.safetensors.index.json"))
        assert (refused.code, "access is denied (403)" in refused.err) == (2, True)
