"""Connections to servers: proxies, certificates, time-outs, and what goes wrong with them in words."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        return urllib3.PoolManager(**settings)
    if not proxy.lower().startswith(("http://", "https://")):
        scheme, _, rest = proxy.partition("://")
        place = f"{scheme}://{rest.rpartition('@')[2]}"
        raise NetworkError(f"the proxy {place} is not one for http", path=path, hint="unset ALL_PROXY")
    user = user_of(proxy)
    headers = urllib3.make_headers(proxy_basic_auth=":".join(user)) if user else None
    return urllib3.ProxyManager(without_user(proxy), proxy_headers=headers, **settings)


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
    pieces, done = [], 0
    wanted = most if into is None else len(into)
    while done < wanted:
        piece = response.read1(min(wanted - done, _PIECE), decode_content=False)
        if not piece:
            break
        if into is None:
            pieces.append(piece)
        else:
            into[done : done + len(piece)] = piece
        done += len(piece)
        if time.monotonic() - begin > _PATIENCE + done / _SLOWEST:
            raise PassingError(f"its server sends less than {_SLOWEST >> 10} KiB a second", cost=TRIES)
    if into is not None and done < wanted:
        raise PassingError("its server sends less than it promises")
    return b"".join(pieces)


_PIECE = 1 << 20
"""Bytes of a body that are read at a time, at most."""


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
