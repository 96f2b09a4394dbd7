"""Files at http and https addresses, read by ranges of one version; what the hub's files are made of, too."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from ckpt_cli import limits
from ckpt_cli.errors import ChangedError, NetworkError, UnsupportedError, quoted
from ckpt_cli.facts import dataclass
from ckpt_cli.remote.client import Client, Reply
from ckpt_cli.remote.store import Listed, Upload, Version
from ckpt_cli.remote.url import origin_of, shown

BECAME_ANOTHER = "became another file while it was read; run it again"


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for: an address, and what is said of it."""

    address: str
    """Where the first request goes, with user and password if any."""
    path: str
    """Its name in messages."""
    headers: tuple[tuple[str, str], ...] = ()
    """Headers for the origin of the address only, such as Authorization."""
    hint: str = "a user and password are taken from ~/.netrc, or from the URL: https://USER:PASSWORD@HOST/..."
    """Helps where access is denied."""
    revision: str = ""
    """What the server calls the state of all files that this one is read in: the commit of a hub."""


def store(scheme: str) -> HttpStore:  # noqa: ARG001 - http and https are one
    """Return the store of files at http and https addresses."""
    return HttpStore()


class HttpStore:
    """Files at http and https addresses; such servers have no lists."""

    def __init__(self) -> None:
        self._client = Client()

    def begin(self, path: str, nbytes: int) -> tuple[HttpObject, bytes]:
        """Return a file and its first `nbytes` bytes by one request.

        Raises IsADirectoryError where the server redirects to the same address with a slash at its end.
        """
        found, data, reply = begin(self._client, Target(path, shown(path)), nbytes)
        bare, came = (address.partition("?")[0] for address in (path, reply.address))
        if came.endswith("/") and not bare.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown(path))
        return found, data

    def object_at(self, path: str, version: Version) -> HttpObject:
        """Return a file of a known version, without a request."""
        return HttpObject(self._client, Target(path, shown(path)), version)

    def entries_in(self, path: str, most: int | None = None) -> dict[str, Listed] | None:  # noqa: ARG002
        """Return None: there are no lists."""
        return None

    def entries_below(self, path: str) -> Iterator[tuple[str, Version]]:  # noqa: ARG002
        """Yield nothing: there are no lists."""
        return iter(())

    def upload(self, path: str, *, replace: bool, nbytes: int = 0) -> AbstractContextManager[Upload]:  # noqa: ARG002
        """Raise UnsupportedError: such servers are not written to."""
        raise _unwritten(path)

    def remove(self, path: str) -> None:
        """Raise UnsupportedError: such servers are not written to."""
        raise _unwritten(path)


def _unwritten(path: str) -> UnsupportedError:
    return UnsupportedError("nothing is written to https and http", path=shown(path), hint="write a file and upload it")


def begin(client: Client, target: Target, nbytes: int) -> tuple[HttpObject, bytes, Reply]:
    """Return a file, its first `nbytes` bytes, and the reply that gave them, by one request and its redirects.

    Raises FileNotFoundError, and NetworkError where the server gives a long file only as a whole.
    """
    headers = {"Range": f"bytes=0-{max(nbytes, 1) - 1}", **_identified(client, target)}
    total: int | None = 0

    def accept(reply: Reply) -> None:
        nonlocal total
        _require_file(reply, target)
        total = _total(reply, target, nbytes)

    reply = client.get(
        target.address,
        path=target.path,
        headers=headers,
        most=nbytes + 1,
        hint=target.hint,
        accept=accept,
        authorize=False,
    )
    data = b"" if reply.status == _UNSATISFIABLE else reply.body
    if total is None and len(data) > nbytes:
        raise _unranged(target)
    total = len(data) if total is None else total
    if len(data) != min(total, nbytes):
        raise NetworkError("its server sends another number of bytes than it promises", path=target.path)
    version = version_of(reply, total)
    return HttpObject(client, target, version, (reply.address, version) if reply.hops else None), data, reply


def _identified(client: Client, target: Target) -> dict[str, str]:
    """Return the headers of a request to the origin of an address, with the one that says who the user is."""
    headers = dict(target.headers)
    return headers if "Authorization" in headers else headers | client.authorization(target.address)


class HttpObject:
    """One version of one file at an address, read by ranges."""

    def __init__(
        self, client: Client, target: Target, version: Version, where: tuple[str, Version] | None = None
    ) -> None:
        self._client = client
        self._target = target
        self.version = version
        """The version that is read."""
        self.where = where
        """The address that the first one redirects to, and the version of the replies that come straight from there.

        None where that is not known.
        """

    @property
    def path(self) -> str:
        """Its URL without anything secret."""
        return self._target.path

    @property
    def revision(self) -> str:
        """The commit that it is read at; empty where its server has none."""
        return self._target.revision

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`; raises ChangedError where the file is of another version."""
        where = self.where
        if where is not None:
            try:
                self._read(*where, buffer, offset)
                return
            except (NetworkError, _GoneError) as error:
                if isinstance(error, NetworkError) and error.status not in _EXPIRED:
                    raise
            self.where = None  # what it redirects to was only for a time
        try:
            reply = self._read(self._target.address, self._first_version(), buffer, offset)
        except _GoneError:
            raise ChangedError(self.path, BECAME_ANOTHER) from None
        if reply.hops:
            self.where = reply.address, self._version_of(reply)

    def _first_version(self) -> Version:
        """Return the version of replies that come by way of the first address, as far as they show it."""
        return self.version

    def _version_of(self, reply: Reply) -> Version:  # noqa: ARG002
        """Return the version of replies that come straight from where this one did."""
        return self.version

    def _read(self, address: str, version: Version, buffer: memoryview, offset: int) -> Reply:
        """Fill a buffer by a request to an address, and return the reply, which must be of a version."""
        end = offset + len(buffer)
        headers = {"Range": f"bytes={offset}-{end - 1}"}
        if origin_of(address) == origin_of(self._target.address):
            headers |= _identified(self._client, self._target)
        if version.tag and not version.tag.startswith("W/"):
            headers["If-Match"] = version.tag
        return self._client.get(
            address,
            path=self.path,
            headers=headers,
            into=buffer,
            hint=self._target.hint,
            accept=lambda reply: self._require_range(reply, version, offset, end),
            authorize=False,
        )

    def _require_range(self, reply: Reply, version: Version, offset: int, end: int) -> None:
        """Raise the error of a reply that is not the range that was asked for, of the version that is read."""
        if reply.status in (404, 410):
            raise _GoneError
        if reply.status == _CHANGED:
            raise ChangedError(self.path, BECAME_ANOTHER)
        if reply.status == 200:
            size = _length(reply.headers)
            if size is not None and not _is_same(version, version_of(reply, size)):
                raise ChangedError(self.path, BECAME_ANOTHER)
            if (size, offset, end) == (self.version.size, 0, self.version.size):
                return
            raise _unranged(self._target)
        if reply.status == _UNSATISFIABLE:
            raise ChangedError(self.path, BECAME_ANOTHER)
        _require_plain(reply, self._target)
        found = _content_range(reply.headers)
        if found is None or reply.status != _PARTIAL:
            raise _unranged(self._target)
        begin, last, size = found
        if size is not None and not _is_same(version, version_of(reply, size)):
            raise ChangedError(self.path, BECAME_ANOTHER)
        if (begin, last + 1) != (offset, end) or size is None:
            raise NetworkError("its server gives another part of the file than it is asked for", path=self.path)

    def __reduce__(self) -> tuple[Callable[..., HttpObject], tuple[object, ...]]:
        return HttpObject, (self._client, self._target, self.version, self.where)


_EXPIRED = (400, 401, 403)
"""Statuses of a server whose signed addresses are only for a time, once that is over."""


class _GoneError(Exception):
    """There is no file at an address any more."""


_PARTIAL, _CHANGED, _UNSATISFIABLE = 206, 412, 416
"""The statuses of a part, of another version than If-Match names, and of a range behind the end."""


def _require_file(reply: Reply, target: Target) -> None:
    """Raise FileNotFoundError where there is nothing."""
    if reply.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), target.path)


def _total(reply: Reply, target: Target, nbytes: int) -> int | None:
    """Return the bytes of the whole file by the reply to a request for its first `nbytes`.

    None where the reply is all of it, of unknown length. Raises NetworkError where the server would send all of a
    longer file.
    """
    found = _content_range(reply.headers)
    if reply.status == _UNSATISFIABLE:
        if found is not None and found[2]:
            raise NetworkError("its server refuses to give its beginning", path=target.path)
        return 0
    _require_plain(reply, target)
    if reply.status == 200:
        size = _length(reply.headers)
        if size is not None and size > nbytes:
            raise _unranged(target)
        return size
    if reply.status != _PARTIAL or found is None:
        raise _unranged(target)
    begin, last, size = found
    if size is None:
        raise NetworkError("its server does not say how long it is", path=target.path)
    if (begin, last + 1) != (0, min(nbytes, size)):
        raise NetworkError("its server gives another part of the file than it is asked for", path=target.path)
    if size > limits.REMOTE_BYTES:
        raise NetworkError(f"its server says that it has {size:,} bytes, which cannot be", path=target.path)
    return size


def _require_plain(reply: Reply, target: Target) -> None:
    """Raise NetworkError for a reply that is compressed, so that its bytes are not those of the file."""
    coding = reply.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise NetworkError(f"its server sends it compressed ({coding[:20]}), so it has no parts", path=target.path)


def _unranged(target: Target) -> NetworkError:
    return NetworkError(
        "its server does not give parts of a file, only all of it",
        path=target.path,
        hint=f"download it first: curl -LO {quoted(target.path)}",
    )


def _length(headers: Mapping[str, str]) -> int | None:
    """Return the Content-Length; None where there is none."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch("[0-9]{1,25}", text) else None


def _content_range(headers: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    """Return the first and the last byte and the size of the file of a Content-Range; None where there is none."""
    text = headers.get("Content-Range", "").strip()
    found = re.fullmatch(r"bytes\s+(?:([0-9]{1,25})-([0-9]{1,25})|\*)\s*/\s*([0-9]{1,25}|\*)", text)
    if found is None:
        return None
    begin, last = (int(found[1]), int(found[2])) if found[1] else (0, -1)
    return begin, last, None if found[3] == "*" else int(found[3])


def _is_same(version: Version, other: Version) -> bool:
    """True if a reply is of a version, as far as it shows."""
    if other.size != version.size:
        return False
    if other.tag and version.tag:
        return other.tag == version.tag
    return not (other.changed and version.changed) or other.changed == version.changed


def version_of(reply: Reply, size: int) -> Version:
    """Return the version that a reply shows."""
    tag = reply.headers.get("ETag", "").strip()
    return Version(size, "" if tag in ('""', 'W/""') else tag, reply.headers.get("Last-Modified", "").strip())
