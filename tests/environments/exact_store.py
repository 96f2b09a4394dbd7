"""Hold ckpt against moto's S3, which knows If-Match, create-only writes and unfinished uploads as Amazon's does.

`make environments` runs this in the development environment, with moto's server from an environment of its own, as it
has 40 packages: `exact_store.py .venv-moto/bin/moto_server`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ckpt_cli.cli.main import run
from ckpt_cli.errors import ChangedError
from ckpt_cli.remote.cloud import store

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
}
LONG = 20 << 20
"""Bytes of an object of three parts."""


@contextmanager
def serving(program: str) -> Iterator[str]:
    """Context manager: moto's server on a free port, with the bucket `bucket`; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            time.sleep(0.1)
            with suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
                break
        yield url
    finally:
        process.terminate()
        process.wait()


def sent(name: str, data: bytes, *, replace: bool = False) -> None:
    """Upload an object."""
    with store("s3").upload(f"s3://bucket/{name}", replace=replace, nbytes=len(data)) as upload:
        upload.write(memoryview(data))
        upload.done()


def raises(kind: type[BaseException], call: Callable[[], object]) -> bool:
    """True if a call raises an error of a kind."""
    try:
        call()
    except kind:
        return True
    return False


def unfinished(url: str) -> int:
    """Count uploads that were begun and neither completed nor aborted."""
    with urllib.request.urlopen(f"{url}/bucket?uploads") as reply:
        return int(reply.read().count(b"<Upload>"))


def check(what: str, *, holds: bool) -> None:
    """Print what was tried, and end with an error where it does not hold."""
    print(f"{'yes' if holds else 'NO'}: {what}", flush=True)
    if not holds:
        sys.exit(f"moto's S3: {what}: does not hold")


def objects(url: str) -> None:
    """Try single objects."""
    s3 = store("s3")
    for name, data in (("short", bytes(1000)), ("long", bytes(LONG))):
        sent(name, data)
        found, head = s3.begin(f"s3://bucket/{name}", LONG)
        check(f"a {name} object arrives", holds=head == data)
        listed = s3.entries_in("s3://bucket")[name].version
        check(f"a list has the version of a {name} object", holds=listed == found.version)
        check(f"a {name} object is not replaced", holds=raises(FileExistsError, lambda name=name: sent(name, b"x")))
        sent(name, b"other", replace=True)
        read = memoryview(bytearray(3))
        check(
            f"If-Match notices another {name} object",
            holds=raises(ChangedError, lambda found=found, read=read: found.read_into(read, 0)),
        )

    def fail() -> None:
        with s3.upload("s3://bucket/never", replace=False) as upload:
            upload.write(memoryview(bytes(LONG)))
            raise KeyError

    check("an upload that fails is raised", holds=raises(KeyError, fail))
    check("an upload that fails leaves nothing", holds="never" not in s3.entries_in("s3://bucket"))
    check("an upload that fails leaves no parts", holds=unfinished(url) == 0)


def commands() -> None:
    """Try commands."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torch.save({f"w{number}": torch.full((1000,), float(number)) for number in range(20)}, "m.pt")
        for line in (
            "convert m.pt s3://bucket/m.safetensors",
            "diff m.pt s3://bucket/m.safetensors",
            "convert m.pt s3://bucket/set/ --max-shard 30KB",
            "diff m.pt s3://bucket/set",
            "check --deep s3://bucket/set",
            "rename s3://bucket/set w1 v1 -o s3://bucket/renamed",
            "stats s3://bucket/renamed v1",
            "convert s3://bucket/renamed s3://bucket/dcp/ --to dcp",
            "diff s3://bucket/renamed s3://bucket/dcp",
        ):
            check(f"ckpt {line}", holds=run(line.split()) == 0)
        os.chdir(Path(__file__).parent)


def main() -> None:
    """Run all of it."""
    os.environ.update(ENVIRONMENT)
    with serving(sys.argv[1]) as url:
        os.environ["AWS_ENDPOINT_URL"] = url
        objects(url)
        commands()


if __name__ == "__main__":
    main()
