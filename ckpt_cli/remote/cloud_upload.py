"""Objects written to a store: nothing is visible before all of one is there, and nothing stays where that fails."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_cli.errors import CkptError, NetworkError
from ckpt_cli.remote.cloud_access import UPLOAD_TRIES, Access, split_url
from ckpt_cli.remote.cloud_requests import ExistsError, PassingError, asked, version_of
from ckpt_cli.remote.store import Version

if TYPE_CHECKING:
    from ckpt_cli.remote.cloud import CloudStore

T = TypeVar("T")

PART = 8 << 20
"""Bytes of a part of an upload; of what is shorter there is one."""

_PARTS = 9_000
"""Parts of an upload at most: S3 takes 10,000."""

_AT_ONCE = 4
"""Parts that are under way at once."""


@contextmanager
def upload(store: CloudStore, path: str, *, replace: bool, nbytes: int = 0) -> Iterator[CloudUpload]:
    """Context manager of an upload, which is aborted where the block raises or does not end it.

    Raises FileExistsError where there is an object at the path and it is not to be replaced.
    """
    made = CloudUpload(store, path, replace=replace, nbytes=nbytes)
    try:
        yield made
    finally:
        made.abort()


class CloudUpload:
    """An object that is being written."""

    def __init__(self, store: CloudStore, path: str, *, replace: bool, nbytes: int) -> None:
        self._store = store
        self._path = path
        self._key = split_url(path)[1]
        self._replace = replace
        self._part = max(PART, -(-nbytes // _PARTS))
        self._held = bytearray()
        """Bytes that were not handed on yet."""
        self._nbytes = 0
        self._writer: Any = None
        """Sends parts; None while there is less than one."""
        self._may_be_there = self._is_done = False
        self._was_there = self._exists()
        self._refuse_existing()

    def write(self, data: memoryview) -> None:
        """Add bytes at the end."""
        self._held += data
        self._nbytes += len(data)
        while len(self._held) > self._part:
            self._send(bytes(self._held[: self._part]))
            del self._held[: self._part]

    def done(self) -> Version:
        """Make the object visible, and return its version; raises NetworkError and leaves nothing where it fails."""
        data = bytes(self._held)
        try:
            if self._writer is None:
                self._put(data)
            else:
                self._send(data)
                if not self._replace:
                    self._was_there = self._exists()
                    self._refuse_existing()
                self._may_be_there = True
                self._sent(lambda _: self._writer.close(), to_its_end=True)
                self._writer = None
        except ExistsError:
            self._may_be_there = False
            raise self._existing() from None
        meta = self._store.meta_of(self._path)
        if meta["size"] != self._nbytes or not self._has_arrived(data, version_of(meta)):
            raise NetworkError("what its server has is not what was sent", path=self._path)
        self._is_done = True
        return version_of(meta)

    def abort(self) -> None:
        """Leave nothing of it, unless it is done."""
        if self._is_done:
            return
        self._is_done = True
        if self._writer is not None:
            with suppress(CkptError, OSError, PassingError):  # what failed before is what is reported
                error = RuntimeError()
                asked(self._path, lambda: self._writer.__exit__(RuntimeError, error, None))
        if self._may_be_there and not self._was_there:
            with suppress(CkptError, OSError):
                self._store.remove(self._path)

    def _exists(self) -> bool:
        try:
            self._store.meta_of(self._path)
        except FileNotFoundError:
            return False
        return True

    def _refuse_existing(self) -> None:
        if self._was_there and not self._replace:
            raise self._existing()

    def _existing(self) -> FileExistsError:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._path)

    def _send(self, data: bytes) -> None:
        """Hand on a part."""
        import obstore

        if self._writer is None:
            self._writer = self._sent(
                lambda access: obstore.open_writer(
                    access.uploader, self._key, buffer_size=self._part, max_concurrency=_AT_ONCE
                )
            )
        self._sent(lambda _: self._writer.write(data))

    def _put(self, data: bytes) -> None:
        """Send all of it at once: where nothing is to be replaced, the server itself refuses to."""
        import obstore

        self._may_be_there = True
        mode: Any = "overwrite" if self._replace else "create"
        times = 0

        def put(access: Access) -> None:
            nonlocal times
            times += 1
            obstore.put(access.client, self._key, data, mode=mode, use_multipart=False)

        try:
            self._store.request(self._path, put, to_its_end=True)
        except ExistsError:  # what was sent before may have arrived, though no reply came
            if times == 1 or not self._has_arrived(data, version_of(self._store.meta_of(self._path))):
                raise

    def _sent(self, call: Callable[[Access], T], *, to_its_end: bool = False) -> T:
        """Return the result of a call, which obstore itself tries several times."""
        try:
            return self._store.request(self._path, call, tries=1, to_its_end=to_its_end)
        except NetworkError as error:
            if error.status is not None and error.status < 500:
                raise
            raise NetworkError(f"{error.problem}, {UPLOAD_TRIES} times", path=error.path, status=error.status) from None

    def _has_arrived(self, data: bytes, version: Version) -> bool:
        """True if an object of one part is what was sent: its tag is its MD5, or it is read back."""
        if self._nbytes > len(data):
            return True
        if version.tag == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return True
        buffer = memoryview(bytearray(len(data)))
        if version.size == len(data):
            self._store.object_at(self._path, version).read_into(buffer, 0)
        return buffer == data
