"""A web server on loopback that counts requests and bytes, and answers some requests with faults.

It serves a folder by ranges, with ETag, Last-Modified and If-Match, as nginx does. A fault is a function of `FAULTS`,
which answers in place of the server; `fault(name, after=2, times=3)` lets two requests pass and spoils three.
"""

from __future__ import annotations

import mmap
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

FOREVER = 10**9


@dataclass
class Seen:
    """One request and its reply."""

    method: str
    target: str
    """The path and the query, as they were asked for."""
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    """Bytes of the body that were sent."""


@dataclass
class WebServer:
    """What a test asks of the server, and what it was asked."""

    root: Path
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    latency: float = 0.0
    gate: Callable[[Handler], bool] | None = None
    """Answers a request in place of the server where it returns True."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def base(self) -> str:
        """The URL of the folder that it serves."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def bytes_sent(self) -> int:
        """Bytes of all bodies."""
        return sum(each.sent for each in self.seen)

    def url(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.base}/{name}"

    def clear(self) -> None:
        """Forget what was asked, and every fault."""
        self.seen.clear()
        self.most_in_flight = 0
        self.gate = None

    def fault(self, name: str, *, after: int = 0, times: int = FOREVER, match: str = "") -> None:
        """Spoil `times` requests that have `match` in their path, after the first `after` of them."""
        counts = {"met": 0}

        def gate(handler: Handler) -> bool:
            if match not in handler.path:
                return False
            with self.lock:
                counts["met"] += 1
                number = counts["met"]
            return after < number <= after + times and FAULTS[name](handler) is not False

        self.gate = gate


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: _Server  # type: ignore[assignment]

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a request, and count it."""
        web = self.server.web
        self.now = Seen(self.command, self.path, dict(self.headers.items()))
        with web.lock:
            web.seen.append(self.now)
            web.in_flight += 1
            web.most_in_flight = max(web.most_in_flight, web.in_flight)
        try:
            if web.latency:
                time.sleep(web.latency)
            if web.gate is None or not web.gate(self):
                self.serve()
        except OSError:
            self.close_connection = True
        finally:
            with web.lock:
                web.in_flight -= 1

    do_HEAD = do_GET  # noqa: N815

    def head(self, status: int, **headers: object) -> None:
        """Send the status and the headers; `_` in their names stands for `-`, and None leaves one out."""
        self.now.status = status
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        """Send a part of the body."""
        if self.command != "HEAD":
            self.wfile.write(data)
            self.now.sent += len(data)

    def empty(self, status: int, **headers: object) -> None:
        """Send a reply without a body."""
        self.head(status, Content_Length=0, **headers)

    def file(self) -> tuple[memoryview, str, str] | None:
        """The file that is asked for, its tag and the time of its last change; None where there is none."""
        path = self.server.web.root / unquote(self.path.partition("?")[0]).lstrip("/")
        try:
            with open(path, "rb") as opened:
                info = os.fstat(opened.fileno())
                data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if info.st_size else b"")
        except OSError:
            return None
        return data, f'"{info.st_mtime_ns:x}-{info.st_size:x}"', formatdate(info.st_mtime, usegmt=True)

    def span(self, size: int) -> tuple[int, int]:
        """The first byte that is asked for, and the one after the last; all of a file without a Range."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        return (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)

    def serve(self, *, change: Callable[[dict[str, object], bytes], bytes] = lambda _, data: data) -> None:
        """Answer as a sound server does; `change` may change the headers and the body of a part."""
        found = self.file()
        if found is None:
            return self.empty(404)
        data, tag, changed = found
        if self.headers.get("If-Match") not in (None, tag):
            return self.empty(412)
        begin, end = self.span(len(data))
        if begin >= len(data) > 0 or (not data and self.headers.get("Range")):
            return self.empty(416, Content_Range=f"bytes */{len(data)}")
        part = bytes(data[begin:end])
        headers: dict[str, object] = {"Content_Length": len(part), "ETag": tag, "Last_Modified": changed}
        headers["Accept_Ranges"] = "bytes"
        is_part = self.headers.get("Range") is not None
        if is_part:
            headers["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        part = change(headers, part)
        self.head(206 if is_part else 200, **headers)
        self.body(part)
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    web: WebServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: faults end connections."""


@contextmanager
def serving(root: Path | str) -> Iterator[WebServer]:
    """Context manager: a server of a folder."""
    server = _Server(("127.0.0.1", 0), Handler)
    server.web = WebServer(Path(root), server.server_address[1])
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield server.web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- faults -----------------------------------------------------------------------------------------------------------


def _reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def _cut(handler: Handler, end: Callable[[Handler], None]) -> None:
    """Send the half of a body that the headers promise whole."""

    def half(_headers: dict[str, object], data: bytes) -> bytes:
        return data[: len(data) // 2]

    handler.serve(change=half)
    handler.wfile.flush()
    end(handler)


def _hang_up(handler: Handler) -> None:
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def _slowly(handler: Handler) -> None:
    def slow(_headers: dict[str, object], data: bytes) -> bytes:
        handler.server.web.latency = 0
        time.sleep(0.3)
        return data

    handler.serve(change=slow)


def _with(**changes: object) -> Callable[[Handler], None]:
    """A fault that changes headers."""

    def change(headers: dict[str, object], data: bytes) -> bytes:
        headers.update({name: value(headers) if callable(value) else value for name, value in changes.items()})
        return data

    return lambda handler: handler.serve(change=change)


def _whole(handler: Handler) -> None:
    """Send all of the file, as servers without ranges do."""
    found = handler.file()
    if found is None:
        handler.empty(404)
        return
    handler.head(200, Content_Length=len(found[0]), ETag=found[1])
    for at in range(0, len(found[0]), 1 << 16):
        handler.body(bytes(found[0][at : at + (1 << 16)]))


def _endless(handler: Handler) -> None:
    """Send a body without an end, of which no header says how long it is."""
    handler.head(200, Content_Type="application/octet-stream", Connection="close")
    handler.close_connection = True
    while True:
        handler.body(bytes(1 << 16))


def _endless_part(handler: Handler) -> None:
    """Send the part that was asked for, and far more."""
    data = (handler.file() or (memoryview(b""), "", ""))[0]
    begin, end = handler.span(len(data))
    handler.head(206, Content_Range=f"bytes {begin}-{end - 1}/{len(data)}", Connection="close")
    handler.close_connection = True
    handler.body(bytes(data[begin:end]))
    while True:
        handler.body(bytes(1 << 16))


def _continue(handler: Handler) -> None:
    """Say for ever that an answer will follow."""
    handler.close_connection = True
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


def _headers(handler: Handler) -> None:
    """Send headers for ever."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-More: " + b"x" * 60_000 + b"\r\n")


def _html(handler: Handler) -> None:
    """Send a page that asks who one is, as some servers do in place of a refusal."""
    page = b"<html><body>Please log in</body></html>"
    handler.head(200, Content_Length=len(page), Content_Type="text/html")
    handler.body(page)


def _to(where: str) -> Callable[[Handler], None]:
    return lambda handler: handler.empty(302, Location=where.replace("HERE", handler.path))


def _no_reply(handler: Handler) -> None:
    _hang_up(handler)


def _garbage(handler: Handler) -> None:
    """Send what is not HTTP."""
    handler.wfile.write(os.urandom(4096))
    handler.wfile.flush()
    _hang_up(handler)


def _status(status: int, **headers: object) -> Callable[[Handler], None]:
    return lambda handler: handler.empty(status, **headers)


def _range(text: str) -> Callable[[Handler], None]:
    """A Content-Range with other numbers: `{begin}`, `{last}` and `{size}` are the right ones."""

    def other(headers: dict[str, object]) -> object:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", str(headers.get("Content_Range")))
        return found and text.format(begin=found[1], last=found[2], size=found[3])

    return _with(Content_Range=other)


FAULTS: dict[str, Callable[[Handler], None]] = {
    "429": _status(429, Retry_After=1),
    "500": _status(500),
    "503": _status(503),
    "401": _status(401, WWW_Authenticate='Basic realm="x"'),
    "403": _status(403),
    "404": _status(404),
    "reset": _reset,
    "reset within": lambda handler: _cut(handler, _reset),
    "short": lambda handler: _cut(handler, _hang_up),
    "no reply": _no_reply,
    "garbage": _garbage,
    "slow": _slowly,
    "other tag": _with(ETag='"other"'),
    "other time": _with(ETag=None, Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT"),
    "no tag": _with(ETag=None),
    "empty tag": _with(ETag='""'),
    "weak tag": _with(ETag=lambda headers: f"W/{headers['ETag']}"),
    "other size": _range("bytes {begin}-{last}/12345678901"),
    "other range": _range("bytes 7-106/{size}"),
    "no size": _range("bytes {begin}-{last}/*"),
    "no range": _with(Content_Range=None),
    "range of 2⁶³": _range("bytes {begin}-{last}/9223372036854775808"),
    "range of 10²⁴": _range("bytes {begin}-{last}/1000000000000000000000000"),
    "whole": _whole,
    "endless": _endless,
    "endless part": _endless_part,
    "endless 100": _continue,
    "endless headers": _headers,
    "gzip": _with(Content_Encoding="gzip"),
    "html": _html,
    "redirect loop": _to("HERE"),
    "to file": _to("file:///etc/passwd"),
    "to nowhere": _to("http://127.0.0.1:1/x"),
    "to nonsense": _to("http://[::1/x"),
}
"""What may be wrong with one reply, by name."""
