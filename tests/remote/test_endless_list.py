"""A server of S3 whose list does not end: obstore keeps all of a reply, so the memory that it takes is bounded."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from buckets import ENVIRONMENT
from conftest import Ckpt

PAGE = (
    b"<Contents><Key>run/x</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    b'<ETag>"x"</ETag><Size>1</Size></Contents>'
) * 5000


class _Endless(socketserver.StreamRequestHandler):
    sent = 0

    def handle(self) -> None:
        """Answer 404 to a request for an object, and send a list for ever."""
        asked = self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        if b"list-type" not in asked:
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nConnection: close\r\n\r\n")
        self.wfile.write(b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name>')
        with suppress(OSError):
            while True:
                self.wfile.write(PAGE)
                type(self).sent += len(PAGE)


@pytest.fixture
def server() -> Iterator[str]:
    """The address of the server."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Endless) as server:
        server.daemon_threads = True
        _Endless.sent = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_list_without_an_end_is_left_before_it_fills_the_memory(server: str, shell: Ckpt) -> None:
    answer = shell("ls", "s3://bucket/run", **ENVIRONMENT, AWS_ENDPOINT_URL=server)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "ckpt: s3://bucket/run: the list of its server does not end\n"
    assert _Endless.sent < 1 << 30
