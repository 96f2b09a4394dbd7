"""What each kind of server gives: files of one version read by ranges, lists of folders, and uploads.

`http.py`, `hub.py` and `cloud.py` implement `Store`; `source.py` makes a source of bytes of an `Object`, and
`folder.py` answers the questions of `files/places.py` from a `Store`. What a store is given is an address: a whole URL,
over http and https with user, password and query where the user gave them. What it shows in messages, and as the `path`
of an object, is `url.shown(address)`, in which nothing is secret.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from ckpt_cli.facts import dataclass


@dataclass(frozen=True, slots=True)
class Version:
    """What shows that a file elsewhere is still the one that was opened, compared with each reply."""

    size: int
    """Bytes."""
    tag: str = ""
    """Its entity tag (ETag), or the commit and blob of a hub; empty where the server gives none."""
    changed: str = ""
    """The time of its last change as the server writes it; compared only where there is no tag."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a list says of a name in a folder."""

    is_folder: bool
    version: Version | None = None
    """The version of a file, so that opening it costs no request; None for a folder, or where the list says less."""


class Object(Protocol):
    """One version of one file elsewhere; it can be pickled, and read from several threads and processes.

    Every reply is compared with the version: one of another version raises ChangedError. Servers that cannot be
    reached, refuse or do not give ranges raise NetworkError; failures that pass are tried again first.
    """

    @property
    def path(self) -> str:
        """Its URL as `url.shown` gives it, for messages."""

    @property
    def version(self) -> Version:
        """The version that is read."""

    @property
    def revision(self) -> str:
        """The commit that it is read at; empty where its server has none."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset`, in one request where no fault makes it more."""


class Upload(Protocol):
    """A file that is being written; nothing is visible before `done`."""

    def write(self, data: memoryview) -> None:
        """Add bytes at the end."""

    def done(self) -> Version:
        """Make the file visible, and return its version; raises NetworkError and leaves nothing where it fails."""

    def abort(self) -> None:
        """Leave nothing of it."""


class Store(Protocol):
    """The files of one scheme."""

    def begin(self, path: str, nbytes: int) -> tuple[Object, bytes]:
        """Return a file and its first `nbytes` bytes (all of a shorter one) by one request.

        Raises FileNotFoundError where there is no such file, and NetworkError.
        """

    def object_at(self, path: str, version: Version) -> Object:
        """Return a file of a version that a list gave, without a request."""

    def entries_in(self, path: str, most: int | None = None) -> dict[str, Listed] | None:
        """Return the names in a folder, or some `most` of them; None where this kind of server has no lists.

        An empty dictionary says that there is no such folder. Raises LimitError beyond `limits.LISTED` names.
        """

    def entries_below(self, path: str) -> Iterator[tuple[str, Version]]:
        """Yield the name below a folder (`/` between its parts) and the version of every file in it and below it."""

    def upload(self, path: str, *, replace: bool, nbytes: int = 0) -> AbstractContextManager[Upload]:
        """Return a context manager of an upload, of `nbytes` bytes where that is known; an error in it aborts it.

        Raises UnsupportedError where this kind of server is not written to, and FileExistsError where there is a
        file at the path and it is not to be replaced.
        """

    def remove(self, path: str) -> None:
        """Remove a file; where there is none, nothing happens. Raises UnsupportedError as `upload` does."""
