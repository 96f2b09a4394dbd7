"""Commands and the Python API on object stores, with a fault at each of their requests."""

from __future__ import annotations

from pathlib import Path

import contract
import pytest
from buckets import SECRETS, Asked, Buckets
from conftest import Ckpt

import ckpt_cli
from ckpt_cli.remote import cloud_requests

PASSING = ("503", "429", "reset", "short")
METADATA_REQUESTS = 2
"""Of a zip file: its size and end, then its directory and pickle."""
OTHERS = ("403", "404", "etag", "wrongrange", "whole", "endless", "400")


@pytest.fixture(autouse=True)
def _checkpoints(buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a set and a distributed checkpoint in the bucket, and no pauses between tries."""
    monkeypatch.setattr(cloud_requests, "_PAUSES", (0.0,) * len(cloud_requests._PAUSES))
    for label, name in (("zip", "m.pt"), ("shards-safetensors", "set"), ("dcp", "dcp")):
        form = next(form for form in contract.FORMATS if form.label == label)
        form.put(buckets.bucket() / name)


@pytest.mark.parametrize("fault", [*PASSING, *OTHERS])
@pytest.mark.parametrize("command", ["stats m.pt", "hash set", "ls dcp"])
def test_a_fault_at_any_request_gives_the_right_answer_or_one_line(
    buckets: Buckets, command: str, fault: str, ckpt: Ckpt
) -> None:
    def can_happen(asked: Asked) -> bool:
        return fault != "endless" or asked.range is not None  # obstore keeps what it gets of a list, for 30 s

    word, *names = command.split()
    urls = [f"s3://bucket/{name}" for name in names]
    right = ckpt(word, *urls)
    requests = len(buckets.asked)
    for after in range(requests):
        buckets.begin(fault=fault, after=after, times=2, match=can_happen)
        answer = ckpt(word, *urls)
        assert not any(secret in answer.err for secret in (*SECRETS, "127.0.0.1", "Traceback", "this is a bug"))
        if (answer.code, answer.out) != (right.code, right.out):
            assert fault not in PASSING
            assert (answer.code, answer.err.startswith("ckpt: ")) == (2, True)
            assert len(answer.err.splitlines()) <= 2


@pytest.mark.parametrize("command", ["ls m.pt", "stats m.pt", "hash set", "check --deep set", "ls dcp", "info m.pt"])
def test_commands_say_the_same_of_google(
    buckets: Buckets, command: str, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", buckets.url)
    *words, name = command.split()
    right = ckpt(*words, buckets.bucket() / name)
    answer = ckpt(*words, f"gs://bucket/{name}")
    found = answer.out.replace("gs://bucket", str(buckets.bucket()))
    assert (answer.code, found, answer.err) == (right.code, right.out, right.err)
    for fault in ("503", "403", "404", "etag", "wrongrange", "whole", "short"):
        buckets.begin(fault=fault, after=1, times=2, match=lambda asked: asked.range is not None)
        answer = ckpt(*words, f"gs://bucket/{name}")
        if answer.code == 2:
            assert (fault in PASSING, answer.out, answer.err.startswith("ckpt: ")) == (False, "", True)
            assert len(answer.err.splitlines()) <= 2
        else:
            assert answer.out.replace("gs://bucket", str(buckets.bucket())) == right.out


def test_checkpoints_are_written_to_google(
    buckets: Buckets, ckpt: Ckpt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", buckets.url)
    source = buckets.bucket() / "m.pt"
    assert ckpt("convert", source, "gs://bucket/new.safetensors").code == 0
    assert ckpt("hash", "gs://bucket/new.safetensors").out == ckpt("hash", "s3://bucket/new.safetensors").out
    assert ckpt("convert", source, "gs://bucket/new.safetensors").code == 2
    assert ckpt("rename", "gs://bucket/set", "--add", "x", "-o", "gs://bucket/renamed").code == 0
    assert ckpt("ls", "gs://bucket/renamed").out == ckpt("ls", buckets.bucket() / "renamed").out


@pytest.mark.parametrize("is_replaced_again", [False, True])
def test_what_is_replaced_between_two_requests_is_read_again_once(
    buckets: Buckets, ckpt: Ckpt, is_replaced_again: bool
) -> None:
    path = buckets.bucket() / "big.pt"
    contract.torch.save({"w": contract.torch.zeros(2_000_000)}, path)
    replies = 0

    def replace(_: Asked) -> None:
        """Replace the file before the first reply that has values, while all other replies wait for it."""
        nonlocal replies
        with buckets.lock:
            replies += 1
            if replies == METADATA_REQUESTS + 1 or (is_replaced_again and replies > METADATA_REQUESTS):
                contract.torch.save({"w": contract.torch.full((2_000_000,), float(replies))}, path.with_name("new"))
                path.with_name("new").replace(path)

    buckets.begin(before=replace)
    answer = ckpt("stats", "s3://bucket/big.pt")
    if is_replaced_again:
        assert (answer.code, answer.out) == (2, "")
        assert "became another file while it was read" in answer.err
    else:
        assert answer.code == 0
        assert answer.out.split("\t")[3:7] == ["3.0", "3.0", "3.0", "0.0"]


def test_the_python_api_reads_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ckpt_cli.convert("s3://bucket/m.pt", "s3://bucket/new/", max_shard=100)
    ckpt_cli.rm("s3://bucket/new", "4.columns", output="s3://bucket/less")
    with ckpt_cli.open("s3://bucket/less") as found:
        assert "4.columns" not in found
        assert found["3.steps"].numpy() == 7
