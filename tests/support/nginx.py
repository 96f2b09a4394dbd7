"""The real nginx on loopback, where it is installed: ranges, folders without them, redirects, passwords and TLS."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

_CONFIG = """
daemon off; pid {run}/nginx.pid; worker_processes 1; error_log {run}/error.log; {user}
events {{ worker_connections 256; }}
http {{
  log_format seen '$server_port $status "$http_range" $body_bytes_sent "$http_authorization" $request_uri';
  access_log {run}/access.log seen; sendfile on; default_type application/octet-stream;
  client_body_temp_path {run}/b; proxy_temp_path {run}/p; fastcgi_temp_path {run}/f; uwsgi_temp_path {run}/u;
  scgi_temp_path {run}/s;
  server {{ listen 127.0.0.1:{port}; root {root};
    location /norange/ {{ alias {root}/; max_ranges 0; }}
    location /gzip/ {{ alias {root}/; gzip on; gzip_types *; gzip_min_length 1; }}
    location /redirect/ {{ rewrite ^/redirect/(.*)$ http://127.0.0.1:{other}/$1?signature=secret redirect; }}
    location /private/ {{ alias {root}/; auth_basic "x"; auth_basic_user_file {run}/htpasswd; }}
    location /private-redirect/ {{ auth_basic "x"; auth_basic_user_file {run}/htpasswd;
      try_files /nowhere @away; }}
    location @away {{ rewrite ^/private-redirect/(.*)$ http://127.0.0.1:{other}/$1?signature=secret redirect; }}
  }}
  server {{ listen 127.0.0.1:{other}; root {root};
    if ($arg_signature != secret) {{ return 403; }} }}
  server {{ listen 127.0.0.1:{tls} ssl; ssl_certificate {run}/c.pem; ssl_certificate_key {run}/k.pem; root {root};
    location /down/ {{ return 302 http://127.0.0.1:{port}/x.pt; }} }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx."""

    root: Path
    run: Path
    """The folder of its certificate and its log."""
    port: int
    other: int
    """The port of the server that redirects lead to."""
    tls: int

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self.port}/{path}"

    @property
    def log(self) -> list[list[str]]:
        """The requests: port, status, range, bytes, Authorization, and what was asked for.

        nginx notes a request after its reply, so that a last one is made here, behind which all others are noted.
        """
        last = f"/last-{time.monotonic_ns()}"
        with suppress(urllib.error.HTTPError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url(last[1:])).close()
        while last not in (text := (self.run / "access.log").read_text()):
            time.sleep(0.001)
        return [line.split() for line in text.splitlines() if "/last-" not in line]


def _free_ports(count: int) -> list[int]:
    """Return several ports that nobody has, each another one."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@contextmanager
def nginx(root: Path, run: Path) -> Iterator[Nginx]:
    """Context manager: nginx serves a folder; skips where it is not installed, and fails in CI (`EVERY_SERVER`)."""
    if PROGRAM is None:
        if os.environ.get("EVERY_SERVER"):
            pytest.fail("nginx is not there: make system installs it")
        pytest.skip("files on the real nginx were not read, which is not there: make system installs it")
    made = Nginx(root, run, *_free_ports(3))
    (run / "htpasswd").write_text("user:{PLAIN}pass word\n")
    _certificate(run)
    user = "user root;" if os.geteuid() == 0 else ""
    ports = {"port": made.port, "other": made.other, "tls": made.tls}
    (run / "nginx.conf").write_text(_CONFIG.format(run=run, root=root, user=user, **ports))
    with open(run / "said", "wb") as said:
        process = subprocess.Popen([PROGRAM, "-c", str(run / "nginx.conf")], stdout=said, stderr=said)
    try:
        for _ in range(500):
            if (run / "nginx.pid").exists() and (run / "nginx.pid").read_text().strip():
                break
            assert process.poll() is None, (run / "said").read_text()
            time.sleep(0.02)
        yield made
    finally:
        process.terminate()
        process.wait()


def _certificate(run: Path) -> None:
    """Write a certificate for 127.0.0.1 that nobody has signed, and its key."""
    call = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    call += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(run / "k.pem"), "-out", str(run / "c.pem")]
    subprocess.run(call, check=True, capture_output=True)
