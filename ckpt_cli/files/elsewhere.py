"""Files elsewhere, as one command or one open checkpoint sees them: what is remembered of servers, and for how long."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_cli.remote.folder import Servers


class Elsewhere:
    """What one command, or one open checkpoint, knows of files elsewhere.

    That is: the secrets of the addresses that the user gave, lists of folders, the versions of files that were seen,
    open connections, and bytes that were fetched. It lasts as long as the command or the checkpoint, so that what was
    seen by one request is not asked for again by the next, and all of them see one version of each file. It costs
    nothing, and imports nothing, before the first URL.
    """

    def __init__(self, known: Elsewhere | None = None) -> None:
        """Begin with the secrets of another, and with nothing that it has seen of servers."""
        self._known = known
        self._servers: Servers | None = None

    @property
    def servers(self) -> Servers:
        """The servers that are asked."""
        if self._servers is None:
            from ckpt_cli.remote.folder import Servers

            self._servers = Servers(self._known.servers if self._known else None)
            self._known = None
        return self._servers

    @property
    def nbytes(self) -> int:
        """Bytes of files that came over the network."""
        return self._servers.nbytes if self._servers is not None else 0

    def clear(self) -> None:
        """Give back the memory of what was fetched; what was seen is remembered."""
        if self._servers is not None:
            self._servers.clear()


class _Current(threading.local):
    """What the request that a thread works for knows of files elsewhere."""

    elsewhere: Elsewhere | None = None


_current = _Current()


@contextmanager
def elsewhere(known: Elsewhere | None = None, *, again: bool = False) -> Iterator[Elsewhere]:
    """Context manager: what servers say is kept from one question in the block to the next, in this thread.

    It is kept with what is `known`, such as that of an open checkpoint, or with that of the block around this one;
    `again` begins with nothing but the secrets of the block around.
    """
    before = _current.elsewhere
    _current.elsewhere = Elsewhere(before) if again else known or before or Elsewhere()
    try:
        yield _current.elsewhere
    finally:
        _current.elsewhere = before


def names_server(path: str) -> bool:
    """True if a path begins with a scheme; one letter is a drive of Windows, and `./` before it makes it a file's."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def current() -> Elsewhere:
    """Return what this thread's request knows of files elsewhere; outside of every block, a new one each time."""
    return _current.elsewhere or Elsewhere()


def admitted(address: str) -> str:
    """Return the path of what a user gave: that of a URL shows no password and no query, which are remembered.

    They are remembered until the end of the block of `elsewhere` around.
    """
    if not address[:8].lower().startswith(("http://", "https://")):
        return address
    return current().servers.addresses.admitted(address)
