"""Files on the real nginx: ranges, redirects to another server, passwords, certificates, and replaced files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Ckpt
from nginx import Nginx, nginx

import ckpt_cli
from ckpt_cli.errors import ChangedError
from ckpt_cli.remote import client


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """It serves one file of 1.6 MB."""
    root, run = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("nginx")
    torch.save({"big": torch.arange(400_000.0), "small": torch.arange(8)}, root / "x.pt")
    with nginx(root, run) as found:
        yield found


@pytest.fixture(autouse=True)
def _at_once(server: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.run / "access.log").write_bytes(b"")
    monkeypatch.setattr(client, "sleep", lambda _: None)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.mark.parametrize("command", ["ls", "show", "stats", "hash", "check", "scan", "ties", "tree"])
def test_a_command_says_what_it_says_of_the_file_on_the_disk(ckpt: Ckpt, server: Nginx, command: str) -> None:
    here = ckpt(command, server.root / "x.pt")
    there = ckpt(command, server.url("x.pt"))
    assert (there.code, there.out) == (here.code, here.out)
    assert {status for _, status, *_ in server.log} == {"206"}


def test_ls_takes_two_requests_and_half_a_megabyte(ckpt: Ckpt, server: Nginx) -> None:
    assert ckpt("ls", server.url("x.pt")).code == 0
    assert len(server.log) == 2
    assert sum(int(line[3]) for line in server.log) <= 600_000


def test_a_server_without_ranges_is_not_asked_for_the_whole_file(ckpt: Ckpt, server: Nginx) -> None:
    answer = ckpt("ls", server.url("norange/x.pt"))
    assert (answer.code, answer.err.splitlines()) == (
        2,
        [
            f"ckpt: {server.url('norange/x.pt')}: its server does not give parts of a file, only all of it",
            f"hint: download it first: curl -LO {server.url('norange/x.pt')}",
        ],
    )


def test_compression_is_not_asked_for(ckpt: Ckpt, server: Nginx) -> None:
    assert ckpt("ls", server.url("gzip/x.pt")).code == 0


def test_a_redirect_is_followed_once_and_a_password_goes_no_further(ckpt: Ckpt, server: Nginx) -> None:
    address = server.url("private-redirect/x.pt").replace("//", "//user:pass%20word@")
    answer = ckpt("stats", address)
    assert (answer.code, answer.out) == (0, ckpt("stats", server.root / "x.pt").out)
    first = [line for line in server.log if line[0] == str(server.port)]
    others = [line for line in server.log if line[0] == str(server.other)]
    assert (len(first), first[0][1], len(others) > 1) == (1, "302", True)
    assert all("Basic" in " ".join(line[4:]) for line in first)
    assert all(line[4] == '"-"' for line in others)


def test_a_password_comes_from_the_address_or_from_netrc(
    ckpt: Ckpt, server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = server.url("private/x.pt")
    refused = ckpt("ls", address)
    assert (refused.code, refused.err.splitlines()[0]) == (2, f"ckpt: {address}: access is denied (401)")
    assert "~/.netrc" in refused.err
    assert ckpt("ls", address.replace("//", "//user:pass%20word@")).code == 0
    wrong = ckpt("ls", address.replace("//", "//user:secret@"))
    assert (wrong.code, "secret" in wrong.err) == (2, False)
    netrc = tmp_path / "netrc"
    netrc.write_text('machine 127.0.0.1 login user password "pass word"\n')
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert ckpt("ls", address).code == 0


def test_a_certificate_that_nobody_signed_is_refused_unless_it_is_named(
    ckpt: Ckpt, server: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"https://127.0.0.1:{server.tls}/x.pt"
    answer = ckpt("ls", address)
    assert answer.code == 2
    assert answer.err.startswith(f"ckpt: {address}: its certificate is not accepted: self-signed certificate\nhint: ")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, str(server.run / "c.pem"))
            assert ckpt("ls", address).code == 0
            down = ckpt("ls", f"https://127.0.0.1:{server.tls}/down/x.pt")
            assert "redirects from https to http, which is not followed" in down.err
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    assert "REQUESTS_CA_BUNDLE" in ckpt("ls", address).err


def test_a_file_that_is_replaced_while_it_is_open_is_noticed(server: Nginx, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(400_000)}, server.root / "y.pt")
    with ckpt_cli.open(server.url("y.pt")) as checkpoint:
        torch.save({"a": torch.ones(400_000)}, tmp_path / "new.pt")
        os.replace(tmp_path / "new.pt", server.root / "y.pt")
        with pytest.raises(ChangedError, match="became another file while it was read"):
            checkpoint["a"].numpy()
    with ckpt_cli.open(server.url("y.pt")) as checkpoint:
        assert checkpoint["a"].numpy().min() == 1
    (server.root / "y.pt").unlink()


def test_a_missing_file_is_one_line(ckpt: Ckpt, server: Nginx) -> None:
    answer = ckpt("ls", server.url("none.pt"))
    assert (answer.code, answer.err) == (2, f"ckpt: {server.url('none.pt')}: No such file or directory\n")


def test_a_folder_is_found_without_a_slash_at_its_end(ckpt: Ckpt, server: Nginx) -> None:
    (server.root / "run").mkdir()
    torch.save({"w": torch.ones(2)}, server.root / "run" / "pytorch_model.bin")
    for address in (server.url("run"), server.url("run/")):
        assert ckpt("ls", address).lines == ["w\tfloat32\t[2]\t8"]
