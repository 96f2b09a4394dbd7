"""Buckets of S3 on loopback, kept in folders by the package localbucket: requests are counted, and fail on demand.

`localbucket` knows neither signatures nor If-Match. With `exact` the server here knows If-Match.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import localbucket  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDNOTASECRET",
    "AWS_SECRET_ACCESS_KEY": "SECRETKEYOFTESTS",
    "AWS_REGION": "us-east-1",
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
"""The environment of every test, apart from the address of the server."""

SECRETS = ("AKIDNOTASECRET", "SECRETKEYOFTESTS")


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    """With its query."""
    range: str | None
    signature: str = ""
    """The beginning of its Authorization: who asks, and for which region; empty where it is not signed."""


@dataclass
class Buckets:
    """A server, and what it is to do."""

    root: Path
    """The folder whose folders are buckets."""
    url: str = ""
    exact: bool = False
    """True if it refuses another version than If-Match names."""
    asked: list[Asked] = field(default_factory=list)
    nbytes: int = 0
    """Bytes of all replies."""
    fault: str = ""
    """What goes wrong: a status, or a name of `_FAULTS`."""
    after: int = 0
    """Requests that are answered well before that."""
    times: int = 1 << 30
    """Requests that it happens to."""
    match: Callable[[Asked], bool] = lambda _: True
    """Says of a request whether it can happen to it."""
    latency: float = 0.0
    """Seconds before each reply."""
    before: Callable[[Asked], None] = lambda _: None
    """Called before each reply, by several threads at once: `at_request` is for what happens at one of them."""
    lock: Any = field(default_factory=threading.Lock)

    def begin(self, **settings: Any) -> None:
        """Forget what was asked, and behave in another way."""
        self.asked, self.nbytes = [], 0
        new: dict[str, Any] = {"fault": "", "after": 0, "times": 1 << 30, "match": lambda _: True, "latency": 0.0}
        new["before"] = lambda _: None
        for name, value in (new | settings).items():
            setattr(self, name, value)

    def environment(self) -> dict[str, str]:
        """Return the variables that lead to it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": self.url}

    def bucket(self, name: str = "bucket") -> Path:
        """Return the folder of a bucket, made where it is not there."""
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return self.root / name

    def names(self, name: str = "bucket") -> list[str]:
        """Return the names of all objects in a bucket."""
        folder = self.bucket(name)
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def unfinished(self) -> list[str]:
        """Return the parts of uploads that were neither completed nor aborted."""
        return [str(path) for path in self.root.glob(".localbucket-uploads/**/*") if path.is_file()]

    def note(self, asked: Asked) -> str:
        """Note a request; returns what goes wrong with it."""
        with self.lock:
            self.asked.append(asked)
            if not self.fault or not self.match(asked):
                return ""
            if self.after:
                self.after -= 1
                return ""
            self.times -= 1
            return self.fault if self.times >= 0 else ""


def at_request(number: int, then: Callable[[], None]) -> Callable[[Asked], None]:
    """Return what `before` may be, for something to be done once: before the reply to a request, counted from 0."""
    counts = count()  # a step of it is never taken twice

    def before(_: Asked) -> None:
        if next(counts) == number:
            then()

    return before


def interrupt() -> None:
    """Interrupt the main thread, and give it time to notice."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


class _Writer:
    """The stream of a reply: counts, and breaks off."""

    def __init__(self, stream: Any, buckets: Buckets) -> None:
        self._stream = stream
        self._buckets = buckets
        self.left: int | None = None
        """Bytes of the body before it breaks off; None for all."""
        self.pause = 0.0
        """Seconds before each piece of a body."""
        self.is_deaf = False
        """True if the connection ends before the reply."""
        self._in_body = False

    def write(self, data: bytes) -> int:
        if self.is_deaf:
            raise ConnectionError
        head, end, body = (b"", b"", data) if self._in_body else bytes(data).partition(b"\r\n\r\n")
        self._stream.write(head + end)
        self._in_body = self._in_body or bool(end)
        if body or self._in_body:
            time.sleep(self.pause)
        if self.left is not None and len(body) > self.left:
            self._stream.write(body[: self.left])
            self._stream.flush()
            raise ConnectionError
        if self.left is not None:
            self.left -= len(body)
        with self._buckets.lock:
            self._buckets.nbytes += len(data)
        self._stream.write(body)
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Handler(localbucket.S3Handler):  # type: ignore[misc]
    """The requests of one connection."""

    buckets: Buckets
    wfile: Any
    fault = ""

    def setup(self) -> None:
        """Keep the stream of the connection, as every reply has a writer of its own."""
        super().setup()
        self._stream = self.wfile

    def _dispatch(self, action: Any) -> None:
        asked = Asked(self.command, self.path, self.headers.get("Range"), self._signature())
        self.fault = self.buckets.note(asked)
        self.buckets.before(asked)
        time.sleep(self.buckets.latency)
        self.wfile = stream = _Writer(self._stream, self.buckets)
        if self.fault in _FAULTS:
            _FAULTS[self.fault](self, stream)
        if self.fault.isdecimal():
            self._read_body()
            self._send(HTTPStatus(int(self.fault)))
        elif self.fault.startswith("to:"):
            self._send(HTTPStatus.FOUND, headers={"Location": self.fault.removeprefix("to:") or self.path})
        elif self.fault == "endless":
            self._send_endless()
        else:
            super()._dispatch(action)

    def _signature(self) -> str:
        words = (self.headers.get("Authorization") or "").partition("Credential=")[2].split("/")
        return f"{words[0]}/{words[2]}" if len(words) > 2 else ""

    def _get(self, bucket: str, key: str, include_body: bool) -> None:
        wanted = self.headers.get("If-Match")
        if self.buckets.exact and wanted is not None:
            path = self._object_path(bucket, key)
            if path.is_file() and not localbucket.etag_matches(wanted, localbucket.object_etag(path)):
                raise self._precondition_failed_error()
        super()._get(bucket, key, include_body)

    def _send_endless(self) -> None:
        """Send a body that goes on for 256 MiB."""
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        begin, _, end = (self.headers.get("Range") or "bytes=0-99").removeprefix("bytes=").partition("-")
        self.send_header("Content-Range", f"bytes {begin}-{end}/{1 << 40}")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"endless"')
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(1 << 8):
            self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        raise ConnectionError

    def send_header(self, keyword: str, value: str) -> None:
        """Send a header, or another one in its place."""
        for name, word, other in _HEADERS.get(self.fault, ()):
            if keyword == name:
                value = value.replace(word, other) if word else other
        if value:
            super().send_header(keyword, value)


def _reset(handler: Any, _: _Writer) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    raise ConnectionError


def _short(handler: Any, stream: _Writer) -> None:
    begin, _, end = (handler.headers.get("Range") or "bytes=0-99").removeprefix("bytes=").partition("-")
    stream.left = (int(end) - int(begin)) // 2


def _deaf(_: Any, stream: _Writer) -> None:
    """Do all, and let nobody know."""
    stream.is_deaf = True


def _slow(_: Any, stream: _Writer) -> None:
    stream.pause = 0.5


def _whole(handler: Any, _: _Writer) -> None:
    del handler.headers["Range"]


_FAULTS: Mapping[str, Callable[[Any, _Writer], None]] = {
    "reset": _reset,
    "short": _short,
    "deaf": _deaf,
    "slow": _slow,
    "whole": _whole,
}

_HEADERS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "etag": (("ETag", "", '"other"'),),
    "noetag": (("ETag", "", ""),),
    "emptytag": (("ETag", "", '""'),),
    "wrongrange": (("Content-Range", "bytes ", "bytes 7"),),
    "huge": (("Content-Range", "/", "/9223372036854775808"),),
    "gzip": (("Content-Type", "", "x\r\nContent-Encoding: gzip"),),
}
"""For each fault the headers that it changes: the name, a part of the value or all of it, and what comes instead."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Say nothing of connections that ended."""


@contextmanager
def buckets_in(root: Path) -> Iterator[Buckets]:
    """Context manager: a server of the buckets in a folder, on a free port of loopback."""
    made = Buckets(root)
    handler = type("Handler", (_Handler,), {"buckets": made, "data_root": root.resolve()})
    server = _Server(("127.0.0.1", 0), handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def one_bucket(server: Buckets, monkeypatch: pytest.MonkeyPatch, staging: Path) -> Iterator[Buckets]:
    """Context manager: a server without any bucket but `bucket`, which is empty, and the environment that leads to it.

    At the end nothing may be left of uploads, neither there nor in the folder in which files are staged.
    """
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    staging.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(staging))
    server.begin()
    server.exact = False
    server.bucket()
    yield server
    assert not server.unfinished()
    assert not list(staging.glob(".ckpt-upload-*"))
    for path in server.root.iterdir():
        shutil.rmtree(path)
