"""Requests over http and https: tries, redirects, and who the user is.

Failures that pass are tried again, `TRIES` times in all, or as a server says by Retry-After. Every failure is a
NetworkError of one line in which nothing is secret. Bodies are read only as far as a caller asks.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

from ckpt_cli import limits
from ckpt_cli.errors import NetworkError
from ckpt_cli.facts import dataclass
from ckpt_cli.remote.connections import (
    CONNECT_SECONDS,
    READ_SECONDS,
    TRIES,
    PassingError,
    end,
    failures,
    host_of,
    pool,
    proxy_for,
    read_body,
)
from ckpt_cli.remote.url import origin_of, shown, user_of, without_user

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_PAUSES = (0.2, 0.4, 0.8, 1.6, 3.0)
"""Seconds before each further try."""

_RETRY_AFTER = 30.0
"""Seconds that a server can make us wait before one try."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of failures that may pass."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply, its body as far as it was asked for."""

    status: int
    headers: Mapping[str, str]
    """Names compare without regard to case."""
    address: str
    """The address that gave it, after all redirects."""
    body: bytes
    hops: tuple[Mapping[str, str], ...] = ()
    """The headers of the redirects that led there, in order."""


class Client:
    """Connections to servers, kept between requests; any number of threads may use it. Pickled, it is a new one."""

    def __init__(self) -> None:
        self._process = os.getpid()
        """The process that has the connections; one that was forked makes its own."""
        self._pools: dict[tuple[str | None, bool], PoolManager] = {}
        """By the proxy that leads there, None for none, and whether there is TLS."""
        self._proxies: dict[str, str | None] = {}
        """By origin."""
        self._lock = threading.Lock()
        self._netrc: Any = None

    def __reduce__(self) -> tuple[Callable[[], Client], tuple[()]]:
        return _client_of_process, ()

    def get(
        self,
        address: str,
        *,
        path: str | None = None,
        headers: Mapping[str, str] | None = None,
        most: int = 0,
        hint: str | None = None,
        method: str = "GET",
        into: memoryview | None = None,
        accept: Callable[[Reply], None] | None = None,
        authorize: bool = True,
    ) -> Reply:
        """Make a request, follow its redirects, and return the reply with at most `most` bytes of its body.

        `path` stands in messages for the address, which may have user and password. `headers` are sent to the origin
        of the address only. A body that should fill a buffer is read `into` it; if it ends early, the request is made
        again. `accept` sees a reply with an empty body before that is read, and may raise. Without `authorize`, the
        user's name and password are not sent. Replies of 404, 410, 412, 416 and of statuses below 400 are returned.
        Raises NetworkError for others, with `hint` where access is denied, and where no reply comes.
        """
        headers = dict(headers or {})
        if authorize and "Authorization" not in headers:
            headers |= self.authorization(address)
        request = _Request(self, address, path or shown(address), headers, method, hint)
        return request.tried(lambda: request.once(most, into, accept))

    def send(self, method: str, address: str, headers: Mapping[str, str], path: str) -> BaseHTTPResponse:
        """Make one request without redirects, and return the reply before its body is read."""
        from urllib3.util import Timeout

        return self._pool_for(address, path).request(
            method,
            without_user(address),
            headers={"Accept-Encoding": "identity", "User-Agent": _agent(), **headers},
            timeout=Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            preload_content=False,
            redirect=False,
            retries=False,
        )

    def authorization(self, address: str) -> dict[str, str]:
        """Return the header that says who the user is: by the address itself, else by ~/.netrc."""
        user = user_of(address) or self._user_in_netrc(address)
        if user is None:
            return {}
        word = base64.b64encode(":".join(user).encode()).decode()
        return {"Authorization": f"Basic {word}"}

    def _user_in_netrc(self, address: str) -> tuple[str, str] | None:
        if self._netrc is None:
            import netrc

            try:
                self._netrc = netrc.netrc(os.environ.get("NETRC") or None)
            except (OSError, ValueError, netrc.NetrcParseError):
                self._netrc = False
        if not self._netrc:
            return None
        found = self._netrc.authenticators(host_of(address))
        return (found[0], found[2] or "") if found else None

    def _pool_for(self, address: str, path: str) -> PoolManager:
        origin = origin_of(address)
        if origin not in self._proxies:
            self._proxies[origin] = proxy_for(address)
        proxy = self._proxies[origin]
        if self._process != os.getpid():
            self._pools, self._lock, self._process = {}, threading.Lock(), os.getpid()
        tls = "https:" in (origin[:6], (proxy or "")[:6].lower())
        with self._lock:
            if (proxy, tls) not in self._pools:
                self._pools[proxy, tls] = pool(proxy, path, tls=tls)
            return self._pools[proxy, tls]


class _Request:
    """One request, tried several times."""

    def __init__(
        self, client: Client, address: str, path: str, headers: dict[str, str], method: str, hint: str | None
    ) -> None:
        self._client = client
        self._address = address
        self._path = path
        self._headers = headers
        self._method = method
        self._hint = hint

    def tried(self, once: Callable[[], T]) -> T:
        """Return the result of `once`, called again after failures that may pass; raises NetworkError."""
        count = 0
        while True:
            try:
                return once()
            except PassingError as failed:  # noqa: PERF203 - it is about the network
                count += 1
                if count + failed.cost > TRIES:
                    problem = f"{failed.problem}, {count} times" if count > 1 else failed.problem
                    raise NetworkError(problem, path=self._path, status=failed.status) from None
                sleep(_PAUSES[count - 1] if failed.pause is None else failed.pause)

    def once(self, most: int, into: memoryview | None, accept: Callable[[Reply], None] | None) -> Reply:
        """Make the request once, redirects included."""
        address = self._address
        hops: list[Mapping[str, str]] = []
        while True:
            same = origin_of(address) == origin_of(self._address)
            with failures(self._path):
                response = self._client.send(self._method, address, self._headers if same else self._open(), self._path)
            try:
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location is not None:
                    hops.append(response.headers)
                    address = self._redirected(address, location, len(hops))
                    continue
                self._require_served(response)
                reply = Reply(response.status, response.headers, address, b"", tuple(hops))
                if accept is not None:
                    accept(reply)
                with failures(self._path):
                    body = b"" if self._method == "HEAD" else read_body(response, most, into)
                return Reply(reply.status, reply.headers, address, body, reply.hops)
            finally:
                end(response)

    def _open(self) -> dict[str, str]:
        """Return the headers that another server may see."""
        return {name: value for name, value in self._headers.items() if name.lower() in _FOR_ALL}

    def _redirected(self, address: str, location: str, count: int) -> str:
        """Return the address of a redirect; raises NetworkError for one that is not followed.

        One to the same address with a slash at its end says that it is a folder: IsADirectoryError.
        """
        if count > limits.REDIRECTS:
            raise NetworkError(f"its server redirects more than {limits.REDIRECTS} times", path=self._path)
        try:
            target = urljoin(without_user(address), location)
        except ValueError:
            raise NetworkError("its server redirects to what is not a URL", path=self._path) from None
        scheme = target.partition(":")[0].lower()
        if target.partition("?")[0] == f"{without_user(address).partition('?')[0]}/":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._path)
        if scheme not in ("http", "https"):
            raise NetworkError(f"its server redirects to {scheme[:20]}:, which is not followed", path=self._path)
        if scheme == "http" and address.lower().startswith("https:"):
            raise NetworkError("its server redirects from https to http, which is not followed", path=self._path)
        return without_user(target)

    def _require_served(self, response: BaseHTTPResponse) -> None:
        """Raise NetworkError for a reply that says that the server does not do it, PassingError where that may pass."""
        status = response.status
        if status in _PASSING:
            raise PassingError(f"its server answers {status}", status=status, pause=_asked_pause(response.headers))
        if status in (401, 403, 407):
            problem, code = f"access is denied ({status})", response.headers.get("X-Error-Code", "")
            raise NetworkError(problem, path=self._path, hint=self._hint, status=status, code=code)
        if status >= 400 and status not in (404, 410, 412, 416):
            raise NetworkError(f"its server answers {status}", path=self._path, status=status)


_FOR_ALL = ("range", "if-match", "if-unmodified-since", "accept")
"""Headers that are sent to other servers, to which a redirect leads."""


@cache
def _client_of_process() -> Client:
    """Return the client of what was sent to this process."""
    return Client()


@cache
def _agent() -> str:
    from ckpt_cli import __version__

    return f"ckpt/{__version__}"


def _asked_pause(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait, within bounds; None where it does not.

    It asks by Retry-After, or by RateLimit as the hub does: `"api";r=0;t=55`
    (https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/; older drafts have RateLimit-Reset).
    """
    found = re.search(r"(?:^|[;,\s])t=([0-9]{1,9})", headers.get("RateLimit", ""))
    limited = found[1] if found else headers.get("RateLimit-Reset", "")
    text = headers.get("Retry-After", limited).strip()
    if text.isdecimal() and text.isascii():
        return min(float(text[:9]), _RETRY_AFTER)
    from email.utils import parsedate_to_datetime

    with suppress(ValueError, TypeError, IndexError, OverflowError):
        return min(max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0), _RETRY_AFTER)
    return None
