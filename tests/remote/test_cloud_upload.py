"""Objects written to a store, all or nothing; against a server of S3 on loopback."""

from __future__ import annotations

import hashlib
import os

import pytest
from buckets import SECRETS, Asked, Buckets, at_request, interrupt

from ckpt_cli.errors import NetworkError
from ckpt_cli.remote import cloud_requests
from ckpt_cli.remote.cloud import store
from ckpt_cli.remote.store import Version

SHORT, LONG = 1000, 17 << 20
"""Bytes of an object of one part, and of one of three."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pauses between tries."""
    monkeypatch.setattr(cloud_requests, "_PAUSES", (0.0,) * len(cloud_requests._PAUSES))


def sent(name: str, data: bytes, *, replace: bool = False, bucket: str = "bucket") -> Version:
    """Upload an object, in pieces of 3 MiB."""
    with store("s3").upload(f"s3://{bucket}/{name}", replace=replace, nbytes=len(data)) as upload:
        for begin in range(0, len(data), 3 << 20):
            upload.write(memoryview(data)[begin : begin + (3 << 20)])
        return upload.done()


@pytest.mark.parametrize("nbytes", [0, SHORT, 8 << 20, (8 << 20) + 1, LONG])
def test_an_object_of_any_size_arrives(buckets: Buckets, nbytes: int) -> None:
    data = os.urandom(nbytes)
    version = sent("run/x", data)
    assert (buckets.bucket() / "run" / "x").read_bytes() == data
    assert (version.size, version.tag) == (nbytes, hashlib.md5(data, usedforsecurity=False).hexdigest())


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
def test_what_is_there_is_replaced_only_on_demand(buckets: Buckets, nbytes: int) -> None:
    (buckets.bucket() / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        sent("x", bytes(nbytes))
    assert (buckets.bucket() / "x").read_bytes() == b"old"
    sent("x", bytes(nbytes), replace=True)
    assert (buckets.bucket() / "x").read_bytes() == bytes(nbytes)


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
def test_what_another_process_wrote_meanwhile_is_not_replaced(buckets: Buckets, nbytes: int) -> None:
    def write(asked: Asked) -> None:
        if asked.method in ("PUT", "POST"):
            (buckets.bucket() / "x").write_bytes(b"theirs")

    buckets.begin(before=write)
    with pytest.raises(FileExistsError):
        sent("x", bytes(nbytes))
    assert (buckets.bucket() / "x").read_bytes() == b"theirs"


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
def test_an_error_of_the_block_leaves_nothing(buckets: Buckets, nbytes: int) -> None:
    def fail() -> None:
        with store("s3").upload("s3://bucket/x", replace=False) as upload:
            upload.write(memoryview(bytes(nbytes)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert buckets.names() == []
    assert not buckets.unfinished()


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
@pytest.mark.parametrize("fault", ["503", "500", "reset"])
def test_a_failure_that_passes_is_no_failure(buckets: Buckets, fault: str, nbytes: int) -> None:
    data = os.urandom(nbytes)
    buckets.begin(fault=fault, times=2, match=lambda asked: asked.method in ("PUT", "POST"))
    sent("x", data)
    assert (buckets.bucket() / "x").read_bytes() == data


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
def test_an_upload_whose_reply_was_lost_is_not_taken_for_somebody_elses(buckets: Buckets, nbytes: int) -> None:
    data = os.urandom(nbytes)
    buckets.begin(fault="deaf", times=1, match=lambda asked: asked.method == "PUT")
    sent("x", data)
    assert (buckets.bucket() / "x").read_bytes() == data


FAILING = {
    "denied": ("403", "PUT", ""),
    "failing parts": ("503", "PUT", ""),
    "failing end": ("503", "POST", "uploadId"),
    "denied end": ("403", "POST", "uploadId"),
    "denied beginning": ("403", "POST", "uploads"),
}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", list(FAILING))
def test_an_upload_that_fails_leaves_nothing_and_says_why(buckets: Buckets, kind: str, *, replace: bool) -> None:
    fault, method, word = FAILING[kind]
    if replace:
        (buckets.bucket() / "x").write_bytes(b"old")
    buckets.begin(fault=fault, match=lambda asked: asked.method == method and word in asked.path)
    for nbytes in (SHORT, LONG) if method == "PUT" else (LONG,):
        with pytest.raises(NetworkError) as error:
            sent("x", bytes(nbytes), replace=replace)
        said = f"{error.value} {error.value.hint}"
        assert ("403" if fault == "403" else "its server answers 503, 6 times") in said
        assert not any(secret in said for secret in (*SECRETS, "127.0.0.1", "\n"))
        assert buckets.names() == (["x"] if replace else [])
        assert not buckets.unfinished()
    if replace:
        assert (buckets.bucket() / "x").read_bytes() == b"old"


def test_what_arrives_as_something_else_is_noticed(buckets: Buckets) -> None:
    path = buckets.bucket() / "x"

    def spoil(asked: Asked) -> None:
        if asked.method == "HEAD" and path.exists():
            path.write_bytes(path.read_bytes()[:-1] + b"!")

    buckets.begin(before=spoil)
    with pytest.raises(NetworkError, match="not what was sent"):
        sent("x", bytes(SHORT))
    assert buckets.names() == []


@pytest.mark.parametrize("nbytes", [SHORT, LONG])
def test_an_interrupt_at_any_request_leaves_nothing_or_all(buckets: Buckets, nbytes: int) -> None:
    for number in range(7):
        name = f"x{number}"
        buckets.begin(before=at_request(number, interrupt))
        try:
            sent(name, bytes(nbytes))
            assert name in buckets.names()
        except KeyboardInterrupt:
            buckets.begin()
            assert name not in buckets.names()
        assert not buckets.unfinished()


@pytest.mark.usefixtures("buckets")
def test_there_is_no_such_bucket() -> None:
    with pytest.raises(FileNotFoundError):
        sent("x", b"x", bucket="nobucket")
