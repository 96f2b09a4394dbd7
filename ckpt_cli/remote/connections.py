"""Connections to servers: proxies, certificates, time-outs, and what goes wrong with them in words."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ckpt_cli.errors import NetworkError
from ckpt_cli.remote.url import user_of, without_user

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

TRIES = 6
"""Times that a request is made before it is given up."""

CONNECT_SECONDS, READ_SECONDS = 10.0, 20.0
"""Seconds until a connection must be there, and in which some bytes must come."""

CONNECTIONS = 16
"""Connections to one server at a time."""

_SLOWEST, _PATIENCE = 8 << 10, 60.0
"""Bytes a second: a body that comes more slowly is given up, after these seconds."""

_REST = 64 << 10
"""Bytes of a body that nobody wants and that are read all the same, so that the connection can be used again."""


class PassingError(Exception):
    """A try that failed and may succeed when it is made again."""

    def __init__(self, problem: str, *, status: int | None = None, pause: float | None = None, cost: int = 1) -> None:
        super().__init__(problem)
        self.problem = problem
        self.status = status
        self.pause = pause
        """Seconds to wait, as the server asks; None for ours."""
        self.cost = cost
        """The number of tries that it is counted as, less one for those before."""


def host_of(address: str) -> str:
    """Return the name of the server of an address; empty where it has none."""
    with suppress(ValueError):
        return urlsplit(without_user(address)).hostname or ""
    return ""


def proxy_for(address: str) -> str | None:
    """Return the proxy that the environment names for an address, by the rules of the standard library."""
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    host = host_of(address)
    found = proxies.get(address.partition(":")[0].lower()) or proxies.get("all")
    if not found or (host and proxy_bypass(host)):
        return None
    return found if "://" in found else f"http://{found}"


def pool(proxy: str | None, path: str, *, tls: bool) -> PoolManager:
    """Return a pool of connections, straight or by a proxy; raises NetworkError for one that is not spoken to."""
    import urllib3

    settings: dict[str, Any] = {"num_pools": 32, "maxsize": CONNECTIONS, "block": False}
    if tls:  # reading the certificates of the system takes longer than all else at the start
        settings["ssl_context"] = _tls()
    if proxy is None:
        return _bounded(urllib3.PoolManager(**settings))
    if not proxy.lower().startswith(("http://", "https://")):
        scheme, _, rest = proxy.partition("://")
        place = f"{scheme}://{rest.rpartition('@')[2]}"
        raise NetworkError(f"the proxy {place} is not one for http", path=path, hint="unset ALL_PROXY")
    user = user_of(proxy)
    headers = urllib3.make_headers(proxy_basic_auth=":".join(user)) if user else None
    return _bounded(urllib3.ProxyManager(without_user(proxy), proxy_headers=headers, **settings))


def _bounded(manager: PoolManager) -> PoolManager:
    """Return a pool whose connections read only so much of what stands before a body, and only so long."""
    manager.pool_classes_by_scheme = _pool_classes()
    return manager


@cache
def _pool_classes() -> dict[str, Any]:
    from http.client import HTTPResponse

    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Bounded(HTTPResponse):
        def begin(self) -> None:
            """Read the status and the headers, and replies of `100 Continue` before these."""
            whole, self.fp = self.fp, _Head(self.fp)  # type: ignore[assignment]
            try:
                super().begin()
            finally:
                if self.fp is not None:
                    self.fp = whole

    plain = type("_Connection", (HTTPConnection,), {"response_class": Bounded})
    secure = type("_SecureConnection", (HTTPSConnection,), {"response_class": Bounded})
    return {
        "http": type("_Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("_SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


_HEAD_BYTES, _HEAD_SECONDS = 256 << 10, 60.0
"""Bytes before the body of a reply, and the seconds in which they must have come."""


class _Head:
    """The lines before the body of a reply: raises NetworkError where they are too long, or come too slowly."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = _HEAD_BYTES
        self._until = time.monotonic() + _HEAD_SECONDS

    def readline(self, most: int) -> bytes:
        """Return the next line, or its beginning."""
        line = b""
        while len(line) < most and not line.endswith(b"\n"):
            there = self._stream.peek(1)
            if not there:
                break
            line += self._stream.read(min(there.find(b"\n") + 1 or len(there), most - len(line)))
            if len(line) > self._left:
                raise NetworkError(f"its server sends more than {_HEAD_BYTES >> 10} KiB before its answer")
            if time.monotonic() > self._until:
                raise NetworkError(f"its server sends no answer in {_HEAD_SECONDS:.0f} s, only headers")
        self._left -= len(line)
        return line

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


def _tls() -> Any:
    """Return the settings of TLS: certificates of the system, and those that the environment names.

    OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR in place of the system's; REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, each
    a file or a folder, add to them.
    """
    import ssl

    context = ssl.create_default_context()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle:
        return context
    try:
        is_folder = os.path.isdir(bundle)
        context.load_verify_locations(cafile=None if is_folder else bundle, capath=bundle if is_folder else None)
    except OSError as error:
        problem = f"no certificates can be read from {bundle}, which REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names"
        raise NetworkError(f"{problem}: {error.strerror or error}") from None
    return context


def read_body(response: BaseHTTPResponse, most: int, into: memoryview | None) -> bytes:
    """Return at most the first `most` bytes of a body, or fill a buffer with its beginning and return nothing."""
    begin = time.monotonic()
    left = response.length_remaining
    buffer = memoryview(bytearray(most if left is None else min(most, left))) if into is None else into
    done = 0
    while done < len(buffer):
        came = _read_some(response, buffer[done : done + _PIECE])
        if not came:
            break
        done += came
        if time.monotonic() - begin > _PATIENCE + done / _SLOWEST:
            raise PassingError(f"its server sends less than {_SLOWEST >> 10} KiB a second", cost=TRIES)
    if into is None:
        return bytes(buffer[:done])
    if done < len(buffer):
        raise PassingError("its server sends less than it promises")
    return b""


_PIECE = 1 << 20
"""Bytes of a body that are read at a time, at most."""


def _read_some(response: BaseHTTPResponse, room: memoryview) -> int:
    """Read what has come of a body, at most as much as there is room for; returns the bytes, 0 at its end.

    urllib3 makes new bytes of all that it reads, which takes longer than to receive it. So a body of known length is
    received in its place, apart from its last byte, by which urllib3 notes that all of it was read.
    """
    from http.client import HTTPResponse

    low = getattr(response, "_fp", None)
    left = response.length_remaining
    if isinstance(low, HTTPResponse) and not low.chunked and low.length == left and left is not None and left > 1:
        came: int = low.fp.readinto1(room[: left - 1])
        if came:
            low.length = response.length_remaining = left - came
            return came
    piece = response.read1(len(room), decode_content=False)
    room[: len(piece)] = piece
    return len(piece)


def end(response: BaseHTTPResponse) -> None:
    """Let the connection be used again where little of the body is left, and close it otherwise."""
    with suppress(Exception):  # whatever it is: nobody waits for the rest
        left = response.length_remaining
        if left is not None and left <= _REST:
            response.read(decode_content=False)  # also where nothing is left: the connection waits for its end
        if response.length_remaining == 0:
            response.release_conn()
            return
    response.close()


@contextmanager
def failures(path: str) -> Iterator[None]:
    """Context manager: what goes wrong with a connection is a NetworkError, or a PassingError where that may pass."""
    from urllib3 import exceptions

    try:
        yield
    except NetworkError as error:
        error.path = error.path or path
        raise
    except (exceptions.LocationParseError, exceptions.URLSchemeUnknown, exceptions.InvalidHeader, ValueError):
        raise NetworkError("this is not a URL that can be asked for", path=path) from None
    except (exceptions.HTTPError, OSError) as error:
        raise _failed(error, path) from None


def _failed(error: Exception, path: str) -> NetworkError | PassingError:
    """Return the error of a connection, as it is reported or tried again."""
    from ssl import SSLCertVerificationError

    from urllib3 import exceptions

    where = "cannot be reached"
    if isinstance(error, exceptions.ProxyError):
        where, error = "cannot be reached by its proxy", error.original_error
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, SSLCertVerificationError):
            hint = "SSL_CERT_FILE=FILE names certificates that are to be trusted"
            return NetworkError(f"its certificate is not accepted: {cause.verify_message}", path=path, hint=hint)
        if isinstance(cause, (exceptions.NameResolutionError, socket.gaierror)):
            return NetworkError(f"{where}: the name of its server is not known", path=path)
    timed_out = exceptions.ConnectTimeoutError
    if any(isinstance(cause, timed_out) and not isinstance(cause, exceptions.NewConnectionError) for cause in causes):
        return PassingError(f"{where}: no connection in {CONNECT_SECONDS:.0f} s", cost=_TIMED_OUT)
    if any(isinstance(cause, (exceptions.ReadTimeoutError, TimeoutError)) for cause in causes):
        return PassingError(f"{where}: no answer in {READ_SECONDS:.0f} s", cost=_TIMED_OUT)
    if any(isinstance(cause, exceptions.IncompleteRead) for cause in causes):
        return PassingError("its server sends less than it promises")
    words = (cause.strerror for cause in causes if isinstance(cause, OSError) and cause.errno and cause.strerror)
    return PassingError(f"{where}: {next(words, 'the connection was closed')}")


_TIMED_OUT = 5
"""Tries that one is counted as in which nothing came for many seconds: it is made once more."""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or any(each is known for known in seen):
            continue
        seen.append(each)
        yield each
        waiting += [each.__cause__, each.__context__, getattr(each, "reason", None)]
        waiting += each.args
